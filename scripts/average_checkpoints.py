"""`neobert average-checkpoints`: average the last checkpoints of a run."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("average-checkpoints")
