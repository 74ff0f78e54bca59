"""`neobert mine-negatives`: find hard negatives for pairs with an encoder."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("mine-negatives")
