"""The schema seen as a flat table: dotted key -> type, default and documentation.

The documentation of a field is the string literal under it, read from the source with `ast`, so that the
schema stays plain dataclasses.
"""

import ast
import dataclasses
import inspect
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import attrgetter, or_
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from neobert.config.schema import Config


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

    @property
    def choices(self) -> tuple[str, ...]:
        """The words of a Literal, else nothing."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def type_name(self) -> str:
        """The type in words, for error messages and documentation."""
        return describe_type(self.kind) + (" or null" if self.nullable else "")

    def value_in(self, config: Config) -> Any:
        """This field's value in `config`."""
        return attrgetter(self.key)(config)


TEXTS = str | tuple[str, ...]
"""A text or a list of texts."""

COUNT_OR_AUTO = int | Literal["auto"]
"""A number of things, or `auto`: the run chooses it."""


def describe_type(kind: Any) -> str:
    """A type in words, without articles: `integer`, `number`, `true or false`, `text`, `a | b`, `list of 2 numbers`."""
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
    """Field name -> the string literal that follows the field."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(owner)).body if isinstance(node, ast.ClassDef))
    texts = {}
    for statement, follower in pairwise(body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant):
            texts[statement.target.id] = " ".join(str(follower.value.value).split())
    return texts


def list_fields(owner: type, prefix: str = "") -> list[Field]:
    """The fields of a dataclass, and below those that are sections, the fields of the sections."""
    hints, docs = get_type_hints(owner), read_docs(owner)
    found = []
    for f in dataclasses.fields(owner):
        if not f.compare:  # No key, but what is known about the keys.
            continue
        kind, nullable = _split_optional(hints[f.name])
        if dataclasses.is_dataclass(kind):
            found += list_fields(hints[f.name], f"{prefix}{f.name}.")
            continue
        doc = docs.get(f.name, "")
        found.append(Field(key=prefix + f.name, kind=kind, nullable=nullable, default=f.default, doc=doc))
    return found


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
