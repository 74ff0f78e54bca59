"""What must not be written to disk or sent anywhere: passwords in addresses, and values of secret names."""

import re

_RULES = (
    # https://user:password@host -> https://***@host
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@'\"]+@", re.IGNORECASE), r"\1***@"),
    # HF_TOKEN=abc and ?api_key=abc anywhere, `password: abc` as a line of YAML; but not max_tokens: 5.
    (
        re.compile(
            r"((?:^\s*|(?<![A-Za-z0-9])(?=\S*=))(?:[a-z0-9]+[_-])*(?:token|secret|password|passwd|api[_-]?key)\s*[=:]\s*['\"]?)"
            r"(?!(?:null|true|false)\b)[^\s'\"&]+",
            re.IGNORECASE | re.MULTILINE,
        ),
        r"\1***",
    ),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "***"),
)


def scrub(text: str) -> str:
    """`text` with secrets replaced by `***`."""
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text
