"""`neobert finetune`: fine-tune an encoder on labels or on pairs."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("finetune")
