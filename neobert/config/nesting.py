"""YAML and JSON that somebody else wrote: nested without end, it is one sentence instead of a full stack or memory."""

import json
from typing import Any

import yaml

MOST_LEVELS = 20
"""Of lists and mappings inside each other."""

MOST_VALUES = 100_000
"""Of a file, with every anchor followed wherever it is used."""


class NestingError(yaml.YAMLError):
    """The text is YAML, and no file that is meant to be read."""


def compose(text: str) -> yaml.Node | None:
    """The nodes of a YAML text; None for an empty one.

    Raises:
        YAMLError: it is no YAML, or `NestingError`: it is nested more than `MOST_LEVELS` levels deep, an anchor holds
            itself, or it comes to more than `MOST_VALUES` values.
    """
    node = _compose_fast(text)
    # Once more with every anchor followed, which can lead into itself or multiply.
    waiting, count = [(node, 0)], 0
    while waiting:
        here, level = waiting.pop()
        if not isinstance(here, yaml.CollectionNode):
            if here is not None:
                here.style = here.style or None  # libyaml has an empty text for plain scalars.
            continue
        if level == MOST_LEVELS:
            raise _too_deep(here.start_mark)
        is_mapping = isinstance(here, yaml.MappingNode)
        below = [item for pair in here.value for item in pair] if is_mapping else here.value
        count += len(below)
        if count > MOST_VALUES:
            line = here.start_mark.line + 1
            raise NestingError(f"line {line}: more than {MOST_VALUES:,} values, with every anchor followed; shorten it")
        waiting += [(item, level + 1) for item in below]
    return node


_READ_SLOWLY = ("\t", "\ufeff", "!", "?", "<<", "|", ">")
"""What libyaml allows in more places than PyYAML (tabs, byte order marks), and where it says less of what is wrong, or
another line: tags, keys with a question mark, merges, heads of blocks of text."""


def _compose_fast(text: str) -> yaml.Node | None:
    """By libyaml, five times as fast as PyYAML's own parser, where PyYAML has it. What is wrong is said by the latter,
    which also reads what both do not read alike."""
    if yaml.__with_libyaml__ and not any(piece in text for piece in _READ_SLOWLY):
        try:
            level = 0
            for event in yaml.parse(text, Loader=yaml.CSafeLoader):  # Its nodes are made on the stack.
                level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if level > MOST_LEVELS:
                    raise _too_deep(event.start_mark)
            return yaml.compose(text, Loader=yaml.CSafeLoader)
        except (yaml.YAMLError, UnicodeEncodeError):  # The latter of half a surrogate pair.
            pass
    return yaml.compose(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    """Stops at the first level that is too deep, long before Python's stack is full."""

    _level = -1

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self._level == MOST_LEVELS:
            raise _too_deep(self.peek_event().start_mark)
        self._level += 1
        try:
            node: yaml.Node | None = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
            return node
        finally:
            self._level -= 1


def _too_deep(mark: yaml.Mark) -> NestingError:
    return NestingError(
        f"line {mark.line + 1}: lists or mappings nested more than {MOST_LEVELS} levels deep, or an anchor that holds "
        "itself; flatten it"
    )


def load_plain_yaml(text: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        YAMLError: as `compose`, or it writes a value of no plain type.
    """
    node = compose(text)
    return None if node is None else yaml.SafeLoader("").construct_document(node)


def parse_json(text: str | bytes) -> Any:
    """The values of a JSON text.

    Raises:
        JSONDecodeError: it is no JSON, or nested deeper than can be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply to be read", "", 0) from None
