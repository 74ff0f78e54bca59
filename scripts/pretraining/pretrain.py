"""`neobert pretrain`: pretrain an encoder."""

from neobert.commands.table import run_command

if __name__ == "__main__":
    run_command("pretrain")
