"""`neobert benchmark-inference`: tokens per second of a model, against transformers with padded batches."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("benchmark-inference")
