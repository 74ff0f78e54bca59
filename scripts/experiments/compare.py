"""`neobert compare`: train the runs of a plan one by one and compare them."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("compare")
