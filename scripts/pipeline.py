"""`neobert pipeline`: run a list of stages, each from what the one before it made."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("pipeline")
