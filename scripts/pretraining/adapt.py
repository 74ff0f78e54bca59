"""`neobert adapt`: adapt an encoder to a domain or a language: new tokens, then training on own and general text."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("adapt")
