"""`neobert mteb`: an encoder on tasks of MTEB, and on local sets of the same kinds."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("mteb")
