"""`neobert export`: export an encoder to a folder for transformers, sentence-transformers and the hub."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("export")
