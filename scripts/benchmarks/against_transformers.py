"""`neobert benchmark-transformers`: the training step against a plain loop on transformers (CPU)."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("benchmark-transformers")
