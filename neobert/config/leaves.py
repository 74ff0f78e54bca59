"""One written value -> the type of its field.

A text field takes the value as it was typed. A word of a choice is matched whatever its case, and a YAML false stands
for `no` or `off` where that is a choice. An integer may be written `1e5` when it is whole. null, none and an empty
value are null where the field allows it, unless none is one of its words.
"""

import difflib
import math
import re
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin

from neobert.config.fields import COUNT_OR_AUTO, TEXTS, Field, describe_type, list_fields
from neobert.config.refused import REFUSED_VALUES
from neobert.config.source import Leaf, Tree, parse_yaml_list

TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")

SPELLINGS: dict[str, dict[str, str | None]] = {
    "contrastive.pooling": {"avg": "mean"},
    "trainer.mixed_precision": {"fp32": "no", "true": "bf16"},
    "trainer.resume_from_checkpoint": {
        **dict.fromkeys(("true", "yes", "on", "auto", "latest"), "latest"),
        **dict.fromkeys(("false", "no", "off"), None),
    },
}
"""Other words for a field's value, beside the general rules."""


class LeafError(Exception):
    """A value that does not fit its field; the message does not name the key."""


def parse_value(field: Field, value: Tree) -> Any:
    """`value` as the type of `field`.

    Raises:
        LeafError: it does not fit; the message shows the value and what was expected.
    """
    if isinstance(value, Leaf):
        word = value.text.lower()
        if word in REFUSED_VALUES.get(field.key, {}):
            raise LeafError(REFUSED_VALUES[field.key][word])
        if not value.quoted and word in SPELLINGS.get(field.key, {}):
            return SPELLINGS[field.key][word]
        if value.is_null and word not in field.choices and (field.nullable or get_origin(field.kind) is not tuple):
            if field.nullable:
                return None
            raise LeafError(f"may not be null, expected {field.type_name}; remove it for the default {field.default!r}")
    if field.kind in (str, TEXTS) and field.nullable and isinstance(value, Leaf) and not value.text:
        return None
    if field.kind == TEXTS:
        return _parse_texts(field, value)
    if get_origin(field.kind) is tuple:
        return _parse_mappings(field, value) if is_dataclass(get_args(field.kind)[0]) else _parse_tuple(field, value)
    if not isinstance(value, Leaf):
        raise LeafError(f"expected {field.type_name}, got a {'list' if isinstance(value, list) else 'mapping'}")
    if field.choices:
        return _parse_choice(field, value.text)
    return _parse_scalar(field.kind, value.text)


def _parse_scalar(kind: Any, text: str) -> Any:
    if kind is str:
        return text
    if kind is bool and text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    if kind == COUNT_OR_AUTO and text.lower() == "auto":
        return "auto"
    if kind in (int, COUNT_OR_AUTO):
        number = _number(text)
        if re.fullmatch(r"[+-]?\d[\d_]*", text):
            return int(text)
        if number is not None and number.is_integer():
            return int(number)
    if kind is float:
        number = _number(text)
        if number is not None:
            return number
    raise LeafError(f"{text!r} is not {_with_article(describe_type(kind))}")


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _parse_choice(field: Field, text: str) -> str:
    word = text.lower()
    if word in field.choices:
        return word
    if word in FALSE:
        for negative in ("no", "off"):
            if negative in field.choices:
                return negative
    close = difflib.get_close_matches(word, field.choices, 1)
    hint = f". Did you mean {close[0]}?" if close else ""
    raise LeafError(f"{text!r} is not one of {', '.join(field.choices)}{hint}")


def _parse_tuple(field: Field, value: Tree) -> tuple[Any, ...]:
    item_kind, *rest = get_args(field.kind)
    num_items = None if rest == [...] else 1 + len(rest)
    items = value
    if isinstance(value, Leaf):
        parsed = [] if value.is_null else parse_yaml_list(value.text)
        if parsed is None:
            example = "[0.9, 0.95]" if item_kind is float else '["a text", "another"]'
            raise LeafError(f"{value.text!r} is not a {field.type_name}; write it as {example}")
        items = parsed
    if not isinstance(items, list):
        raise LeafError(f"expected a {field.type_name}, got a mapping")
    if num_items is not None and len(items) != num_items:
        raise LeafError(f"expected a {field.type_name}, got {len(items)}")
    for item in items:
        if not isinstance(item, Leaf):
            raise LeafError(f"expected a {field.type_name}, but an item is itself a list or a mapping")
    return tuple(_parse_scalar(item_kind, item.text) for item in items)


def _parse_texts(field: Field, value: Tree) -> str | tuple[str, ...]:
    """A text as it stands, unless it is written as a list."""
    items: Any = value
    if isinstance(value, Leaf):
        items = parse_yaml_list(value.text) if value.text.startswith("[") and not value.quoted else None
        if items is None:
            return value.text
    if not isinstance(items, list) or not items or not all(isinstance(item, Leaf) for item in items):
        found = "an empty list" if items == [] else "a mapping"
        raise LeafError(f"expected a {describe_type(field.kind)}, got {found}")
    return tuple(item.text for item in items)


def _parse_mappings(field: Field, value: Tree) -> tuple[Any, ...]:
    """A list of mappings as a tuple of the dataclass that the field holds; errors of all items together."""
    item_type = get_args(field.kind)[0]
    items: Any = value
    if isinstance(value, Leaf):
        items = [] if value.is_null else parse_yaml_list(value.text)
    names = {f.key: f for f in list_fields(item_type)}
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise LeafError(f"expected a list of mappings with keys of {', '.join(names)}")
    parsed, problems = [], []
    for number, item in enumerate(items):
        values = {}
        for name, tree in item.items():
            if name not in names:
                close = difflib.get_close_matches(name, names, 1)
                problems.append(f"[{number}].{name}: unknown key; one of {', '.join(close or names)}")
                continue
            try:
                values[name] = parse_value(names[name], tree)
            except LeafError as error:
                problems.append(f"[{number}].{name}: {error}")
        parsed.append(item_type(**values))
    if problems:
        raise LeafError("; ".join(problems))
    return tuple(parsed)


def _with_article(name: str) -> str:
    return name if name.startswith(("true", "text")) else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
