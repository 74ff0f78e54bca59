"""The errors that a user can correct, one family."""

from neobert.secrets import scrub


class UserError(Exception):
    """The message names the key, flag or file, what is wrong with it, and the remedy; a command shows it alone.

    It may quote an address: whoever prints it, in a traceback too, prints no secret.
    """

    outcome: str = "wrong_call"
    """The key of `cli.EXIT_CODES` that a command ends with."""

    def __str__(self) -> str:
        return scrub(super().__str__())


class CallError(UserError):
    """A command line that cannot be read; the message names the flag and the remedy."""


class StartupError(UserError):
    """The run cannot start; the message names the key and the remedy."""


class DataError(UserError, ValueError):
    """Data or tokenizer cannot be used as configured; the message names the key, the value and the remedy."""


OR_SKIP_SHARD = ", or set dataset.on_bad_shard: skip"
"""The last remedy for a file that is no good; commands without that key drop it."""
