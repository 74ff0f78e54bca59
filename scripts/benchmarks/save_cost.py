"""`neobert benchmark-save`: what a checkpoint costs to save and to load."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("benchmark-save")
