"""`neobert kill-storm`: kill a run at random instants, and compare it with one left alone."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("kill-storm")
