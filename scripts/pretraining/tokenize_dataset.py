"""`neobert tokenize-dataset`: tokenise a dataset into a folder that pretraining reads by index."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("tokenize-dataset")
