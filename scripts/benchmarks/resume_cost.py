"""`neobert benchmark-resume`: seconds to the first batch of a resumed run."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("benchmark-resume")
