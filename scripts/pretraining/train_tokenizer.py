"""`neobert train-tokenizer`: train a tokenizer on any text source."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("train-tokenizer")
