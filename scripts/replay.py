"""`neobert replay`: print a row of a run by its number."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("replay")
