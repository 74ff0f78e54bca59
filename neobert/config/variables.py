"""The `variables:` section: values named once and used in many places.

    variables:
      root: /data
      length: 512
    dataset:
      path: "{$variables.root}/books"          # inside a text; "${variables.root}/books" is the same
      max_seq_length: $variables.length        # alone: keeps its type, also for lists and mappings

Variables may use other variables. `$$variables` and `$${variables` stand for the plain text with one dollar.
"""

import re
from collections.abc import Callable

from neobert.config.source import Leaf, Tree

_NAME = r"variables((?:\.\w+)+)"
_ALONE = re.compile(rf"\$(?:{_NAME}|\{{{_NAME}\}})|\{{\${_NAME}\}}")
_INSIDE = re.compile(rf"\{{\${_NAME}\}}|(?<!\$)\$\{{{_NAME}\}}")
_ESCAPED = re.compile(r"\$\$(?=\{?variables)")
_TO_ESCAPE = re.compile(r"\$(?=\{?variables)")


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
            raise VariableError(f"{match.group()} stands inside a text, but it is a list or a mapping")
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
