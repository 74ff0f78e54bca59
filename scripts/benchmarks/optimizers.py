"""`neobert benchmark-optimizers`: time of every optimizer's step, and how orthogonal Muon's updates are."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("benchmark-optimizers")
