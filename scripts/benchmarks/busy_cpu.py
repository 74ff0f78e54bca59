"""`neobert benchmark-busy`: the training step beside other programs, by how threads wait."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("benchmark-busy")
