"""The schema seen as a flat table: dotted key -> type, default and documentation.

The documentation of a field is the string literal under it, read from the source with `ast`, so that the
schema stays plain dataclasses. `parse_value` turns one written value into the type of its field: a text is read as it
was typed; a choice is matched whatever its case, and a YAML false means `no` or `off` where that is a
choice; an integer may be written `1e5` when it is whole; null, none and an empty value are null where the field allows
it, unless none is one of its choices.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import re
from dataclasses import dataclass, is_dataclass
from functools import cache, reduce
from itertools import pairwise
from operator import attrgetter, or_
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from neobert.config.refused import REFUSED_VALUES
from neobert.config.schema import Config
from neobert.config.schema_trainer import TRACKER_NAMES
from neobert.config.source import Leaf, Tree, parse_yaml_list
from neobert.key import Condition, Known


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One key of a config file."""

    key: str
    """Dotted key, for example `trainer.max_steps`."""

    kind: Any
    """The annotation without `None`: bool, int, float, str, a Literal, a tuple type, `TEXTS` or `COUNT_OR_AUTO`."""

    nullable: bool
    default: Any
    doc: str
    """The text under the field, on one line."""

    known: Known
    """What its line in the schema says of it."""

    needs: tuple[Condition, ...] = ()
    """Without which it has no effect: those of its sections, then its own."""

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal, else nothing."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def item(self) -> type | None:
        """What a list of mappings holds: the dataclass of its items."""
        first: Any = get_args(self.kind)[0] if get_origin(self.kind) is tuple else None
        return first if isinstance(first, type) and dataclasses.is_dataclass(first) else None

    @property
    def type_name(self) -> str:
        """The type as text, for error messages and documentation."""
        return describe_type(self.kind) + (" or null" if self.nullable else "")

    def value_in(self, config: Config) -> Any:
        """This field's value in `config`."""
        return _build_getter(self.key)(config)


_build_getter = cache(attrgetter)


TEXTS = str | tuple[str, ...]
"""A text or a list of texts."""

COUNT_OR_AUTO = int | Literal["auto"]
"""A number of things, or `auto`: the run chooses it."""


def describe_type(kind: Any) -> str:
    """A type as text, without articles: `integer`, `number`, `true or false`, `text`, `a | b`, `list of 2 numbers`."""
    if kind == TEXTS:
        return "text or list of texts"
    if kind == COUNT_OR_AUTO:
        return "integer or auto"
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    if get_origin(kind) is tuple:
        item, *rest = get_args(kind)
        if dataclasses.is_dataclass(item):
            return "list of mappings"
        return f"list of {'' if rest == [...] else f'{1 + len(rest)} '}{describe_type(item)}s"
    return {bool: "true or false", int: "integer", float: "number", str: "text"}[kind]


def _split_optional(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) is UnionType and NoneType in get_args(annotation):
        kinds = [a for a in get_args(annotation) if a is not NoneType]
        return reduce(or_, kinds), True
    return annotation, False


def read_docs(owner: type) -> dict[str, str]:
    """Field name -> the string literal that follows the field, in the class itself or one that it extends."""
    classes = [kind for kind in reversed(owner.__mro__) if dataclasses.is_dataclass(kind)]
    return {name: text for kind in classes for name, text in _read_own_docs(kind).items()}


def _read_own_docs(owner: type) -> dict[str, str]:
    (body,) = (node.body for node in ast.parse(inspect.getsource(owner)).body if isinstance(node, ast.ClassDef))
    texts = {}
    for statement, follower in pairwise(body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant):
            texts[statement.target.id] = " ".join(str(follower.value.value).split())
    return texts


@cache
def list_fields(owner: type, prefix: str = "", needs: tuple[Condition, ...] = ()) -> tuple[Field, ...]:
    """The fields of a dataclass, and below those that are sections, the fields of the sections.

    Args:
        needs: what all of them need.

    Raises:
        TypeError: a field says nothing of itself: it is not written with `key`.
    """
    hints, docs = get_type_hints(owner), read_docs(owner)
    found: list[Field] = []
    for f in dataclasses.fields(owner):
        if not f.compare:  # No key, but what is known about the keys.
            continue
        kind, nullable = _split_optional(hints[f.name])
        if dataclasses.is_dataclass(kind):
            found += list_fields(hints[f.name], f"{prefix}{f.name}.", (*needs, *f.metadata.get("needs", ())))
            continue
        if "key" not in f.metadata:
            raise TypeError(f"{owner.__name__}.{f.name}: write it with neobert.key.key(default, resume=...)")
        known = f.metadata["key"]
        found.append(
            Field(
                key=prefix + f.name,
                kind=kind,
                nullable=nullable,
                default=f.default,
                doc=docs.get(f.name, ""),
                known=known,
                needs=(*needs, *known.needs),
            )
        )
    return tuple(found)


def _list_sections(owner: type, prefix: str = "") -> dict[str, str]:
    """Dotted name and description of every section below `owner`; a section comes before those inside of it."""
    found = {}
    for name, kind in get_type_hints(owner).items():
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            found[prefix + name] = (inspect.getdoc(kind) or "").strip()
            found |= _list_sections(kind, f"{prefix}{name}.")
    return found


def _build_tables() -> tuple[dict[str, Field], dict[str, str]]:
    fields = list_fields(Config)
    # Keys outside of sections come first.
    return {f.key: f for f in sorted(fields, key=lambda f: "." in f.key)}, _list_sections(Config)


FIELDS, SECTIONS = _build_tables()
"""Every key of the schema in file order, and every section with its description. Sections can hold sections."""


def list_keys(change: str) -> frozenset[str]:
    """The keys that change one thing of `neobert.key.CHANGES`."""
    return frozenset(key for key, field in FIELDS.items() if change in field.known.changes)


def can_be_declared(field: Field) -> bool:
    """Whether `trainer.resume_allow` may list it: another source is its own declaration, other weights are not."""
    return not {"declared", "order"}.isdisjoint(field.known.classes) and (
        "source" not in field.known.changes or field.item is not None
    )


# ---- one written value -> the type of its field ----

TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")

SPELLINGS: dict[str, dict[str, Any]] = {
    "contrastive.pooling": {"avg": "mean"},
    "trainer.mixed_precision": {"fp32": "no", "true": "bf16"},
    "trainer.report_to": {name: (name,) for name in ("none", "all", *TRACKER_NAMES)},
    "trainer.resume_from_checkpoint": {
        **dict.fromkeys(("true", "yes", "on", "auto", "latest"), "latest"),
        **dict.fromkeys(("false", "no", "off"), None),
    },
}
"""Other spellings of a field's value, beside the general rules."""


class LeafError(Exception):
    """A value that does not fit its field; the message does not name the key."""


def parse_value(field: Field, value: Tree) -> Any:
    """`value` as the type of `field`.

    Raises:
        LeafError: it does not fit; the message shows the value and what was expected.
    """
    if isinstance(value, Leaf):
        choice = value.text.lower()
        if choice in REFUSED_VALUES.get(field.key, {}):
            raise LeafError(REFUSED_VALUES[field.key][choice])
        if not value.quoted and choice in SPELLINGS.get(field.key, {}):
            return SPELLINGS[field.key][choice]
        if value.is_null and choice not in field.choices and (field.nullable or get_origin(field.kind) is not tuple):
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
    choice = text.lower()
    if choice in field.choices:
        return choice
    if choice in FALSE:
        for negative in ("no", "off"):
            if negative in field.choices:
                return negative
    close = difflib.get_close_matches(choice, field.choices, 1)
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
            if field.key in SPELLINGS:
                example = f"one of {', '.join(SPELLINGS[field.key])}, or as a list of them"
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
    """A text as it is, unless it is written as a list."""
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
