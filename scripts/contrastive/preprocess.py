"""`neobert preprocess-pairs`: prepare the sets of a contrastive config."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("preprocess-pairs")
