"""`neobert pseudo-perplexity`: pseudo-perplexity of texts."""

from neobert.commands.table import run_command

if __name__ == "__main__":
    run_command("pseudo-perplexity")
