"""`neobert embed`: embed texts with a trained model."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("embed")
