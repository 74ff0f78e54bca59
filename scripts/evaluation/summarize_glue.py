"""`neobert summarize-glue`: compare results of `neobert glue` side by side."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("summarize-glue")
