"""`neobert serve`: answer embeddings and filled masks over HTTP on this machine."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("serve")
