"""`neobert pretrain`: pretrain an encoder."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("pretrain")
