"""`neobert mlm-loss`: masked-token loss of a model on any text."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("mlm-loss")
