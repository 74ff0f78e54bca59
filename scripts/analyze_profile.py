"""`neobert analyze-profile`: where the time of profiled steps went."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("analyze-profile")
