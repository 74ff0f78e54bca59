"""`neobert migrate-config`: rewrite a config of other NeoBERT code."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("migrate-config")
