"""`neobert benchmark-contrastive`: pairs per second and peak memory of contrastive steps."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("benchmark-contrastive")
