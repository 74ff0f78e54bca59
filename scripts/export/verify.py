"""`neobert verify-export`: check that an exported folder, loaded with transformers, matches our model."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("verify-export")
