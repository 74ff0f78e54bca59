"""`neobert preprocess`: tokenise the data of a config once, before the run."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("preprocess")
