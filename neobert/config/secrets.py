"""What must not be written down: passwords in URLs, values called token or password, and secrets of the environment.

`scrub` takes them out of a text, `scrub_config` out of a whole config. Names are judged by their last word, because
`api_key` is a secret and `tokenizer`, `max_tokens` and `allow_special_token_rewrite` are not.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

HIDDEN = "***"
"""Stands where a secret was."""

_WORDS = "token|secret|password|passwd|api_?key|access_?key|private_?key|secret_?key|auth_?key|credentials?"
_SECRET_NAME = re.compile(rf"(^|.*[_\-.])({_WORDS}|key)$", re.IGNORECASE)
_URL = re.compile(r"(?<=://)[^\s/@'\"]+@")
_NAMED = re.compile(
    rf"\b(?P<name>[\w\-.]*?(?:{_WORDS})['\"]?[ \t]*[=:][ \t]*['\"]?)(?P<value>[^\s'\",&}}\]]+)", re.IGNORECASE
)
_OPTION = re.compile(rf"(?P<name>--[\w\-.]*(?:{_WORDS})[ \t]+)(?P<value>\S+)", re.IGNORECASE)
_SHAPES = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_\-]{20,}|AKIA[A-Z0-9]{16})\b")

_LEAST_LENGTH = 8
"""A value of the environment that is shorter is no secret worth its false alarms."""


def is_secret_name(name: str) -> bool:
    """Whether a key or variable of this name holds a secret: its last word is token, key, secret, password or alike."""
    return _SECRET_NAME.match(name) is not None


def scrub(text: str) -> str:
    """`text` without credentials in URLs, without values of secret names (`hf_token=...`), without tokens of known
    shape, and without the values of this process's secret environment variables."""
    for name, value in os.environ.items():
        if len(value) >= _LEAST_LENGTH and value in text and is_secret_name(name):
            text = text.replace(value, HIDDEN)
    text = _URL.sub(f"{HIDDEN}@", text)
    text = _SHAPES.sub(HIDDEN, text)
    for named in (_NAMED, _OPTION):
        text = named.sub(rf"\g<name>{HIDDEN}", text)
    return text


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
