"""`neobert pseudo-perplexity`: pseudo-perplexity of texts."""

from neobert.commands.registry import run_command

if __name__ == "__main__":
    run_command("pseudo-perplexity")
