"""`neobert benchmark-input`: tokens per second and fill of the input pipeline, against datasets.map."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("benchmark-input")
