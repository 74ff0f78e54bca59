"""The base of the errors that a user can correct."""


class UserError(Exception):
    """The message names the key, flag or file, what is wrong with it, and the remedy; a command shows it alone."""


class StartupError(UserError):
    """The run cannot start; the message names the key and the remedy."""
