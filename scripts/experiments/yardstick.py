"""`neobert yardstick`: how much a config learns in seven minutes of training."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("yardstick")
