"""`neobert glue`: fine-tune models on the tasks of GLUE."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("glue")
