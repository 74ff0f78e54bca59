"""`neobert gpu-check`: everything that has to be seen on a GPU once."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("gpu-check")
