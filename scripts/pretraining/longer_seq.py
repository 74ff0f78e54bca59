"""`neobert longer-seq`: continue a run at a longer context, on documents that are long enough for it."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("longer-seq")
