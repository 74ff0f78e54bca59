"""`neobert checkpoint`: verify, list, compare and prune checkpoints."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("checkpoint")
