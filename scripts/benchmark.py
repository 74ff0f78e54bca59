"""`neobert benchmark`: tokens per second, utilisation and memory of the training step."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("benchmark")
