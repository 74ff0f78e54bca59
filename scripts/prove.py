"""`neobert prove`: make random steps of a run again, and compare them with its record."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("prove")
