"""What must not be written down, and what is written instead.

| where | what is hidden | by |
|---|---|---|
| saved configs | credentials in addresses, `api_key=...`, tokens of known shape | `hide_credentials` |
| console, logs, events, trackers, errors | the same, `name: value`, secret variables | `scrub` |

A marker is where a secret was (`<hidden:X-Amz-Signature>`). A config with a marker in it cannot be mistaken for the
config that was saved: loading it is an error. So a config is changed only where there surely is a secret, and never
because a part of a path is also the value of some variable; a log line may be hidden more freely: nothing reads it.

Names are judged by their last word, because `api_key` is a secret and `tokenizer`, `max_tokens` and
`allow_special_token_rewrite` are not.
"""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

_MARKER = re.compile(r"<hidden:[^<>\s]+>|\*\*\*")
"""Three stars are what earlier versions wrote."""

# The words of a vocabulary are no secrets.
_WORDS = (
    r"(?<!mask_)(?<!(?:cls|sep|pad|unk|bos|eos)_)token|secret|password|passwd|credentials?"
    "|api_?key|access_?key|account_?key|private_?key|secret_?key|auth_?key"
)
_SECRET_NAME = re.compile(rf"(^|.*[_\-.])({_WORDS}|key)$", re.IGNORECASE)
_SURELY_SECRET_NAME = re.compile(rf"(^|.*[_\-.])({_WORDS})$", re.IGNORECASE)
_PARAMETER = re.compile(
    rf".*({_WORDS}|signature)$|(.*[_\-.])?(sig|key|auth|pwd)$|awsaccesskeyid$|googleaccessid$|key-pair-id$|policy$",
    re.IGNORECASE,
)
# A scheme is short: without the bound a text without any is searched from each of its letters to its end.
_ADDRESS = re.compile(r"[a-z][a-z0-9+.\-]{0,30}://[^\s'\"]+", re.IGNORECASE)
# Keys of S3 hold slashes; a number after the colon is a port.
_USER = re.compile(r"(?<=://)(?:[^\s/?#'\"]+|[^\s/?#'\":@\[]+:(?!\d+/)[^\s?#'\"@]+)@")
_CONTAINER = re.compile(r"(?:abfss?|wasbs?)://[^\s/?#'\":@]+@", re.IGNORECASE)
"""Azure names a container where others have a user."""

# The punctuation of a sentence that ends with the address is no part of the value.
_QUERY = re.compile(r"(?P<head>[?&;](?P<name>[\w.\-]+)=)(?P<value>[^\s&#'\"]+?)(?=[;,.:)\]}]*(?:[\s&#'\"]|$))")
# A name after a slash is a part of a path: `data/token=bpe/part-0.jsonl`.
_ASSIGNED = re.compile(
    rf"(?<![\w/.\-])(?P<head>(?P<name>[\w\-.]*?(?:{_WORDS}))['\"]?=['\"]?)(?P<value>[^\s'\",&/}}\]]+)(?![\w/])",
    re.IGNORECASE,
)
_NAMED = re.compile(
    rf"(?<![\w/.\-])(?P<head>(?P<name>[\w\-.]*?(?:{_WORDS}))['\"]?[ \t]*[=:][ \t]*['\"]?)(?P<value>[^\s'\",&}}\]]+)",
    re.IGNORECASE,
)
_OPTION = re.compile(rf"(?P<head>--(?P<name>[\w\-.]*(?:{_WORDS}))[ \t]+)(?P<value>\S+)", re.IGNORECASE)
_HEADER = re.compile(
    r"(?P<head>(?P<name>authorization)['\"]?[ \t]*[=:][ \t]*['\"]?(?:[a-z]+[ \t]+)?)(?P<value>[^\s'\",}]+)",
    re.IGNORECASE,
)
_SHAPES = re.compile(
    r"(?<![\w/.\-])(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|A[KS]IA[A-Z0-9]{16}"
    r"|sk-(?=[\w\-]*[0-9])(?=[\w\-]*[A-Z])[A-Za-z0-9_\-]{20,})(?![\w/\-])"
)

_LEAST_LENGTH = 8
"""A value of the environment that is shorter is no secret worth its false alarms."""


def is_secret_name(name: str) -> bool:
    """Whether a key or variable of this name holds a secret: its last word is token, key, secret, password or alike."""
    return _SECRET_NAME.match(name) is not None


def mark_hidden(name: str) -> str:
    """The marker of the secret `name`."""
    return f"<hidden:{name}>"


def find_marker(value: Any) -> str | None:
    """The first marker in a text, or in the texts of a list, mapping or dataclass; None without any."""
    if isinstance(value, str):
        found = _MARKER.search(value)
        return None if found is None else found.group()
    return next((marker for item in _items(value) if (marker := find_marker(item)) is not None), None)


def _items(value: Any) -> list[Any]:
    if is_dataclass(value):
        return [getattr(value, f.name) for f in fields(value)]
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def hide_credentials(text: str, *, is_path: bool = False) -> str:
    """`text` without what is a secret wherever it is: users, passwords and signatures in addresses, values that are
    assigned to a secret name (`api_key=...`), tokens of known shape.

    Args:
        is_path: `text` is a path or an address. In a path, `token=bpe` is the name of a folder.
    """
    if not (is_path and "://" not in text):
        text = _ADDRESS.sub(lambda address: _hide_in_address(address.group()), text)
        text = _ASSIGNED.sub(_hide_value, text)
    return _SHAPES.sub(mark_hidden("token"), text)


def _hide_in_address(address: str) -> str:
    named = address if _CONTAINER.match(address) else _USER.sub(f"{mark_hidden('credentials')}@", address)
    return _QUERY.sub(_hide_parameter, named)


def _hide_parameter(found: re.Match[str]) -> str:
    return _hide_value(found) if _PARAMETER.match(found["name"]) else found.group()


def _hide_value(found: re.Match[str]) -> str:
    return found["head"] + mark_hidden(found["name"])


def scrub(text: str) -> str:
    """`text` for people: as `hide_credentials`, without `name: value` and `--name value` of secret names, and without
    the values of this process's secret environment variables where they are words of their own."""
    # Errors of HTTP quote an address without its host.
    text = _QUERY.sub(_hide_parameter, hide_credentials(text))
    for named in (_HEADER, _NAMED, _OPTION):
        text = named.sub(_hide_value, text)
    for name, value in os.environ.items() if len(text) >= _LEAST_LENGTH else ():
        if len(value) >= _LEAST_LENGTH and value in text and _is_secret_variable(name, value):
            text = _hide_variable(text, name, value)
    return text


def _is_secret_variable(name: str, value: str) -> bool:
    """Variables called KEY often hold the name of something: of an object in a bucket, of a file."""
    if _SURELY_SECRET_NAME.match(name) is None:
        return is_secret_name(name) and _looks_random(value)
    return "/" not in value or _looks_random(value)


def _looks_random(value: str) -> bool:
    return all(re.search(kind, value) for kind in ("[a-z]", "[A-Z]", "[0-9]"))


def _hide_variable(text: str, name: str, value: str) -> str:
    word = re.compile(rf"(?<![\w\-]){re.escape(value)}(?![\w\-])")
    alone = re.compile(rf"(?<![\w\-./\\~]){re.escape(value)}(?![\w\-/\\]|\.\w)")
    text = _ADDRESS.sub(lambda address: word.sub(mark_hidden(name), address.group()), text)
    return alone.sub(mark_hidden(name), text)


def scrub_config(config: Any) -> dict[str, Any]:
    """A config (or any dataclass or mapping) as nested plain values, without keys of secret names, texts scrubbed."""
    items = {f.name: getattr(config, f.name) for f in fields(config) if f.compare} if is_dataclass(config) else config
    return {name: _scrub_value(value) for name, value in items.items() if not is_secret_name(name)}


def _scrub_value(value: Any) -> Any:
    if isinstance(value, Mapping) or is_dataclass(value):
        return scrub_config(value)
    if isinstance(value, list | tuple):
        return [_scrub_value(item) for item in value]
    return scrub(value) if isinstance(value, str) else value


def build_logger(name: str) -> logging.Logger:
    """The logger of a module whose messages may quote an address."""
    logger = logging.getLogger(name)
    logger.addFilter(_scrub_record)
    return logger


def _scrub_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = scrub(record.getMessage()), None
    return True


def readable(name: str) -> str:
    """A path without the folders of the machine it was on, an address without what signs it."""
    name = name.split("?")[0].rstrip("/")
    return name.split("/")[-1] if name.startswith(("/", ".", "~")) else name
