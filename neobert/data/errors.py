"""The one error of this package that a user can mend."""

from neobert.config.secrets import Scrubbed


class DataError(Scrubbed, ValueError):
    """Data or tokenizer cannot be used as configured; the message names the key, the value and the remedy."""
