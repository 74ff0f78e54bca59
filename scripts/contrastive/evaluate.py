"""`neobert evaluate-pairs`: evaluate embeddings of any model on any set of pairs."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("evaluate-pairs")
