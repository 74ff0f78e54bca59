"""YAML text -> a tree of leaves that remember how they were written.

A plain parse gives the structure and each scalar as it was typed, because YAML reads `no` as false, `012` as ten and
`1234e5` as a number, and only the field's own type can say what was meant. Where more than that is written (merge keys,
a key twice, names that are no text, tags), omegaconf resolves or refuses it.

The section `variables:` names values once, for repeated use:

    variables:
      root: /data
      length: 512
    dataset:
      path: "{$variables.root}/books"          # inside a text; "${variables.root}/books" is the same
      max_seq_length: $variables.length        # alone: keeps its type, also for lists and mappings

Variables may use other variables. `$$variables` and `$${variables` mean the plain text with one dollar.
"""

import difflib
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from neobert.config.nesting import compose
from neobert.config.shipped import find_close, find_file, is_bare, suggest
from neobert.errors import UserError

_DOLLAR = "\ue000"
"""Replaces the dollar of `${` while omegaconf reads, so that it parses no interpolations of its own."""


_TEXT = "tag:yaml.org,2002:str"
_PLAIN_TAGS = {
    yaml.ScalarNode: {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")},
    yaml.SequenceNode: {"tag:yaml.org,2002:seq"},
    yaml.MappingNode: {"tag:yaml.org,2002:map"},
}

_NAME = r"variables((?:\.\w+)+)"
_ALONE = re.compile(rf"\$(?:{_NAME}|\{{{_NAME}\}})|\{{\${_NAME}\}}")
_INSIDE = re.compile(rf"\{{\${_NAME}\}}|(?<!\$)\$\{{{_NAME}\}}")
_ESCAPED = re.compile(r"\$\$(?=\{?variables)")
_TO_ESCAPE = re.compile(r"\$(?=\{?variables)")


@dataclass(frozen=True, slots=True)
class Leaf:
    """One scalar of a config file or one value of the command line."""

    text: str
    """As typed, without YAML's quotes."""

    quoted: bool = False
    """Whether it was quoted, so that `"none"` is a text and `none` is null."""

    @property
    def is_null(self) -> bool:
        return not self.quoted and self.text.lower() in ("", "null", "none", "~")


Tree = Leaf | list[Any] | dict[str, Any]
"""A leaf, a list of trees, or a mapping of names to trees."""


class YamlError(UserError):
    """A file that is not there, or text that is not YAML or not a mapping; the message says where."""


def read_yaml_text(path: Path, name: str = "the file") -> str:
    """The text of a YAML file, or of the shipped one that a bare name means; errors call it `name`.

    Raises:
        YamlError: it cannot be read; of a file that is not there, with those nearby whose names are similar.
    """
    try:
        return find_file(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise YamlError(f"not a UTF-8 text file: {error}") from error
    except OSError as error:
        reason = "is a folder" if path.is_dir() else "does not exist" if not path.exists() else str(error.strerror)
        close = find_close(str(path)) if is_bare(path) else []
        raise YamlError(f"{name} {reason}{suggest(close) if close else _list_nearby(path)}") from error


def _list_nearby(path: Path) -> str:
    """The YAML files closest by name in the nearest folder above `path` that has any."""
    for folder in (path, *path.parents):
        if folder.is_dir():
            found = sorted(str(p) for pattern in ("*.yaml", "*.yml") for p in _walk(folder, pattern))
            if found:
                close = difflib.get_close_matches(str(path), found, 8, 0.0)
                return "; YAML files nearby: " + ", ".join(close)
    return "; no YAML file is nearby, and `neobert config list` has the names of shipped ones"


def _walk(folder: Path, pattern: str) -> list[Path]:
    """Files two folders deep at most, so that a mistyped path does not search a whole disk."""
    return [*folder.glob(pattern), *folder.glob(f"*/{pattern}"), *folder.glob(f"*/*/{pattern}")]


def parse_yaml(text: str) -> dict[str, Tree]:
    """The mapping in `text`; an empty text is an empty mapping.

    Raises:
        YamlError: `text` is not valid YAML, writes a key twice, or holds something else than a mapping.
    """
    tree = _parse(text)
    if isinstance(tree, Leaf) and tree.is_null:
        return {}
    if not isinstance(tree, dict):
        raise YamlError("the file must hold `key: value` lines")
    return tree


def parse_yaml_list(text: str) -> list[Tree] | None:
    """The items of a list written as in YAML (`[a, b]`), or None when `text` is not one."""
    try:
        tree = _parse(text)
    except YamlError:
        return None
    return tree if isinstance(tree, list) else None


def _parse(text: str) -> Tree:
    return _copy(_parse_once(text))


def _copy(tree: Tree) -> Tree:
    """The same leaves in lists and mappings of its own."""
    if isinstance(tree, dict):
        return {name: _copy(item) for name, item in tree.items()}
    return [_copy(item) for item in tree] if isinstance(tree, list) else tree


@functools.lru_cache(maxsize=16)
def _parse_once(text: str) -> Tree:
    """A run that resumes reads one text several times: its own config and that of its checkpoint."""
    try:
        node = compose(text)
        if not isinstance(node, yaml.CollectionNode):
            return Leaf("" if node is None else str(node.value))
        if _is_plain(node):  # omegaconf takes ten times as long, and a run reads its own config again and again.
            return _from_nodes(node)
        value = OmegaConf.to_container(OmegaConf.create(text.replace("${", _DOLLAR + "{")), resolve=False)
    except yaml.YAMLError as error:
        raise YamlError(_describe(error)) from error
    return _with_source(value, node)


def _describe(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return str(error)


def _is_plain(node: yaml.Node) -> bool:
    """Whether mappings of different names, lists and scalars are all that is written."""
    if node.tag not in _PLAIN_TAGS[type(node)]:
        return False
    if isinstance(node, yaml.MappingNode):
        names = {str(name.value) for name, _ in node.value if name.tag == _TEXT}
        return len(names) == len(node.value) and all(_is_plain(item) for _, item in node.value)
    return isinstance(node, yaml.ScalarNode) or all(map(_is_plain, node.value))


def _from_nodes(node: yaml.Node) -> Tree:
    if isinstance(node, yaml.MappingNode):
        return {name.value: _from_nodes(item) for name, item in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_from_nodes(item) for item in node.value]
    return Leaf(node.value, quoted=node.style is not None)


def _with_source(value: Any, node: yaml.Node | None) -> Tree:
    """`value` as omegaconf read it, each scalar replaced by its source text. `node` is None below a merge key."""
    if isinstance(value, dict):
        pairs = [(k.value, v) for k, v in node.value] if isinstance(node, yaml.MappingNode) else []
        if len(pairs) == len(value) and not any(k == "<<" for k, _ in pairs):
            return {name: _with_source(v, child) for v, (name, child) in zip(value.values(), pairs)}
        nodes = dict(pairs)
        return {str(k): _with_source(v, nodes.get(str(k))) for k, v in value.items()}
    if isinstance(value, list):
        items = node.value if isinstance(node, yaml.SequenceNode) else [None] * len(value)
        return [_with_source(v, item) for v, item in zip(value, items)]
    if isinstance(node, yaml.ScalarNode):
        return Leaf(node.value, quoted=node.style is not None)
    if value is None:
        return Leaf("null")
    return Leaf(str(value).replace(_DOLLAR, "$"), quoted=isinstance(value, str))


# ---- variables ----


class VariableError(Exception):
    """A reference that cannot be replaced; the message names it."""


def escape_variables(text: str) -> str:
    """`text` written so that `substitute` gives it back unchanged."""
    return _TO_ESCAPE.sub("$$", text)


def substitute(tree: Tree, variables: dict[str, Tree]) -> Tree:
    """`tree` with every reference replaced.

    Raises:
        VariableError: a reference to an unknown variable, in a circle, or of a list or mapping inside a text.
    """
    return _substitute(tree, variables, ())


def _substitute(tree: Tree, variables: dict[str, Tree], parents: tuple[str, ...]) -> Tree:
    if isinstance(tree, dict):
        return {key: _substitute(value, variables, parents) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_substitute(item, variables, parents) for item in tree]
    alone = _ALONE.fullmatch(tree.text)
    if alone:
        return _look_up(_name(alone), variables, parents)
    text = _INSIDE.sub(_as_text(variables, parents), tree.text)
    return Leaf(_ESCAPED.sub("$", text), quoted=tree.quoted)


def _name(match: re.Match[str]) -> str:
    """The dotted name of a reference, without `variables.`; exactly one group of the pattern took part."""
    return next(group for group in match.groups() if group)[1:]


def _as_text(variables: dict[str, Tree], parents: tuple[str, ...]) -> Callable[[re.Match[str]], str]:
    def replace(match: re.Match[str]) -> str:
        value = _look_up(_name(match), variables, parents)
        if not isinstance(value, Leaf):
            raise VariableError(f"{match.group()} is inside a text, but it is a list or a mapping")
        return value.text

    return replace


def _look_up(name: str, variables: dict[str, Tree], parents: tuple[str, ...]) -> Tree:
    if name in parents:
        raise VariableError("variables refer to each other in a circle: " + " -> ".join((*parents, name)))
    value: Tree = variables
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            known = ", ".join(variables) or "none"
            raise VariableError(f"there is no variable {name!r} in the section `variables:` (it defines: {known})")
        value = value[part]
    return _substitute(value, variables, (*parents, name))
