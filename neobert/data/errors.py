"""The one error of this package that a user can correct."""

from neobert.errors import UserError


class DataError(UserError, ValueError):
    """Data or tokenizer cannot be used as configured; the message names the key, the value and the remedy."""


OR_SKIP_SHARD = ", or set dataset.on_bad_shard: skip"
"""The last remedy for a file that is no good; commands without that key drop it."""
