"""`neobert benchmark-loss`: time and memory of the loss kernels."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("benchmark-loss")
