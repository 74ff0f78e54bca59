"""A config file and dotted overrides -> a frozen `Config`.

    load_config("run.yaml", ["--trainer.max_steps", "100", "optimizer.lr=1e-4"])

1. read the YAML, 2. replace references to `variables:`, 3. flatten to dotted keys, 4. lay the overrides over them,
5. parse each value by the type of its field, 6. check the rules between fields. Errors of all stages are collected and
raised together, so that one attempt shows everything that is wrong.

Overrides are written `--a.b value`, `--a.b=value` or `a.b=value`; a bare `--a.b` sets a true-or-false key to true.
"""

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from neobert.config.fields import FIELDS, SECTIONS, Field, LeafError, list_fields, parse_value
from neobert.config.refused import explain_foreign_key, find_refusal, find_renamed, is_below_known_name
from neobert.config.rules import BUDGETS, validate
from neobert.config.rules_data import HELD_OUT, OF_HUB_SOURCE, SOURCES
from neobert.config.schema import Config
from neobert.config.source import (
    Leaf,
    Tree,
    VariableError,
    YamlError,
    escape_variables,
    parse_yaml,
    read_yaml_text,
    substitute,
)
from neobert.errors import UserError
from neobert.model.config import ARCHITECTURE
from neobert.secrets import find_marker, hide_credentials

SENTENCES = "trainer.fill_mask_texts"
"""The one key whose values are saved as they are."""


class ConfigError(UserError):
    """Everything that is wrong with a config. `str` is a list for people, `errors` its sentences."""

    def __init__(self, errors: Sequence[str], source: str) -> None:
        self.errors = list(errors)
        count = f"{len(errors)} error{'s' if len(errors) > 1 else ''}"
        super().__init__("\n".join([f"{count} in {source}:", *(f"  - {error}" for error in errors)]))


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file with overrides laid over it.

    Args:
        path: The file; None starts from the defaults.
        overrides: In any of the three spellings. A budget among them replaces the file's budget of any kind, and a
            source (`dataset.path`, `.mixture`, `.name`) the file's source.

    Raises:
        ConfigError: the file is missing or not YAML, or anything in it or in the overrides is wrong.
    """
    if path is None:
        return parse_config("", overrides, source="the overrides")
    return parse_config(_read(path), overrides, source=f"{path}")


def load_saved_config(path: str | Path) -> Config:
    """The config that a run has saved, to be compared with or described: secrets in it may be hidden, so nothing may be
    opened by its addresses.

    Raises:
        ConfigError: as `load_config`.
    """
    return parse_config(_read(path), source=f"{path}", may_hide=True)


def _read(path: str | Path) -> str:
    try:
        return read_yaml_text(Path(path), "the config file")
    except YamlError as error:
        raise ConfigError([str(error)], f"{path}") from error


def parse_config(
    text: str, overrides: Sequence[str] = (), *, source: str = "the config", may_hide: bool = False
) -> Config:
    """As `load_config`, from the YAML text itself; `source` names it in errors.

    Args:
        may_hide: takes values in which a secret was hidden when they were saved.
    """
    try:
        tree = parse_yaml(text)
    except YamlError as error:
        raise ConfigError([f"not valid YAML: {error}"], source) from error
    draft = _Draft()
    _add_file(draft, tree)
    _add_overrides(draft, overrides)
    values = _parse_leaves(draft)
    if not may_hide:
        _refuse_hidden(draft, values)
    config = dataclasses.replace(build_config(values), explicit=frozenset(values))
    if config.model.init_from is not None:  # Brings the architecture; the run checks the rules about it.
        draft.doubtful |= {key for name in ARCHITECTURE if (key := f"model.{name}") not in config.explicit}
    draft.errors += [error for error in validate(config) if not draft.follows(error)]
    if draft.errors:
        raise ConfigError(draft.errors, source)
    return config


def build_config(values: dict[str, Any]) -> Config:
    """A `Config` from values by dotted key; keys that are not set take their defaults. Nothing is checked."""
    config: Config = _build_section(Config, values, "")
    return config


_list_hints = functools.cache(get_type_hints)
"""Of a class, evaluated once: that takes longer than all the rest of building a config."""


def _build_section(kind: Any, values: dict[str, Any], prefix: str) -> Any:
    arguments = {}
    for name, hint in _list_hints(kind).items():
        key = prefix + name
        if key in SECTIONS:
            arguments[name] = _build_section(hint, values, f"{key}.")
        elif key in values:
            arguments[name] = values[key]
    return kind(**arguments)


def config_to_yaml(config: Config) -> str:
    """All keys of `config` as YAML, which `load_config` reads back to an equal `Config`."""
    tree: dict[str, Any] = {}
    for key, entry in FIELDS.items():
        *path, name = key.split(".")
        target = tree
        for section in path:
            target = target.setdefault(section, {})
        target[name] = _to_plain(entry.value_in(config))
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def without_secrets(config: Config) -> Config:
    """The config as it is written to disk: credentials hidden, but for the sentences that the model is to complete."""
    values = {key: entry.value_in(config) for key, entry in FIELDS.items()}
    return build_config({k: v if k == SENTENCES else _hide(FIELDS[k], v) for k, v in values.items()})


def _hide(field: Field, value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = list_fields(type(value))
        return dataclasses.replace(value, **{part.key: _hide(part, getattr(value, part.key)) for part in parts})
    if isinstance(value, tuple):
        return tuple(_hide(field, item) for item in value)
    return hide_credentials(value, is_path=field.known.path) if isinstance(value, str) else value


@functools.lru_cache(maxsize=1)
def saved_text(config: Config) -> str:
    """What a run writes of its config, for its folder and every checkpoint: `config_to_yaml` without secrets."""
    return config_to_yaml(without_secrets(config))


def save_config(config: Config, path: str | Path) -> None:
    """Write `config_to_yaml(config)` to `path`."""
    Path(path).write_text(config_to_yaml(config), encoding="utf-8")


def split_arguments(arguments: Sequence[str]) -> tuple[list[tuple[str, str | None]], list[str]]:
    """Command-line arguments -> (overrides as (dotted key, text), the others). The text is None for a bare `--a.b`."""
    overrides: list[tuple[str, str | None]] = []
    others = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if equals and (argument.startswith("--") or re.fullmatch(r"[A-Za-z_][\w.]*", key)):
            overrides.append((key, text))
        elif argument.startswith("--") and key:
            follows = bool(rest) and not rest[0].startswith("--") and not _is_assignment(rest[0])
            overrides.append((key, rest.pop(0) if follows else None))
        else:
            others.append(argument)
    return overrides, others


@dataclass(slots=True)
class _Draft:
    """What is known of a config while it is put together."""

    written: dict[str, Tree] = field(default_factory=dict)
    variables: dict[str, Tree] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    doubtful: set[str] = field(default_factory=set)
    """Keys (or sections) whose value is not known: because of an error, or because it is read later."""

    def refuse(self, key: str, error: str, meant: str | None = None) -> None:
        """Note an error at `key`, which the user meant for the key or section `meant`."""
        self.errors.append(error)
        self.doubtful.add(meant or key)

    def follows(self, error: str) -> bool:
        """Whether a broken rule names a key whose value is not known, so that it only repeats an error."""
        sections = {key.partition(".")[0] for key in self.written}
        names = "|".join(re.escape(key) for key in self.doubtful - (sections & set(SECTIONS)))
        return bool(names) and re.search(rf"(?<![\w.])({names})(?!\w)", error) is not None


def _is_assignment(argument: str) -> bool:
    key, equals, _ = argument.partition("=")
    return bool(equals) and (key in FIELDS or key.partition(".")[0] in SECTIONS)


def _add_file(draft: _Draft, tree: dict[str, Tree]) -> None:
    variables = tree.pop("variables", {})
    if isinstance(variables, dict):
        draft.variables = variables
    elif not (isinstance(variables, Leaf) and variables.is_null):
        draft.errors.append("variables: expected names with values below it")
    for key, value in _flatten(draft, tree, ""):
        draft.written[key] = value


def _add_overrides(draft: _Draft, overrides: Sequence[str]) -> None:
    pairs, others = split_arguments(overrides)
    draft.errors += [
        f"{argument!r}: not an override; write --section.key value or section.key=value" for argument in others
    ]
    explicit: dict[str, Tree] = {}
    for key, text in pairs:
        if not _is_known(draft, key):
            continue
        if text is None and FIELDS[key].kind is not bool:
            draft.refuse(key, f"{key}: --{key} needs a value, {FIELDS[key].type_name}")
            continue
        if text == "" and FIELDS[key].nullable:  # Else the run would be about another source, or start again.
            draft.refuse(key, f"{key}: is empty on the command line (a variable that is not set?); null means none")
            continue
        leaf = Leaf("true" if text is None else text)
        value = _substitute(draft, key, leaf)
        if value is not None:
            explicit[key] = value
    for chosen, replaced in _choose_replaced(draft.written | explicit):
        if any(key in explicit and not _is_null(explicit[key]) for key in chosen):
            for key in replaced:
                draft.written.pop(key, None)
    draft.written |= explicit


def _choose_replaced(values: dict[str, Tree]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(keys, what one of them replaces of the file when it is an override): a run has one budget and one source, and
    holds out documents in one way."""
    yield BUDGETS, BUDGETS
    yield HELD_OUT, HELD_OUT
    task = values.get("task")
    if not (isinstance(task, Leaf) and task.text.lower() == "contrastive"):  # There the set has a name in its folder.
        yield SOURCES, (*SOURCES, *OF_HUB_SOURCE)


def _is_null(value: Tree) -> bool:
    return isinstance(value, Leaf) and value.is_null


def _flatten(draft: _Draft, tree: dict[str, Tree], prefix: str) -> Iterator[tuple[str, Tree]]:
    for name, raw in tree.items():
        key = prefix + name
        value = _substitute(draft, key, raw)
        if value is None:
            continue
        if key in SECTIONS:
            if isinstance(value, dict):
                yield from _flatten(draft, value, f"{key}.")
            elif not (isinstance(value, Leaf) and value.is_null):
                draft.refuse(key, f"{key}: is a section; expected keys with values below it, got {_show(value)}")
        elif key not in FIELDS and isinstance(value, dict) and find_refusal(key) is None and is_below_known_name(key):
            yield from _flatten(draft, value, f"{key}.")
        elif _is_known(draft, key):
            yield key, value


def _substitute(draft: _Draft, key: str, tree: Tree) -> Tree | None:
    """`tree` with its references replaced; None after an error. Sections are left to their keys."""
    if key in SECTIONS and isinstance(tree, dict):
        return tree
    try:
        return substitute(tree, draft.variables)
    except VariableError as error:
        draft.refuse(key, f"{key}: {error}")
        return None


def _is_known(draft: _Draft, key: str) -> bool:
    """Whether `key` is in the schema; if not, the draft gets the error that explains it."""
    if key in FIELDS:
        return True
    refusal = find_refusal(key) or explain_foreign_key(key)
    if refusal is not None:
        draft.refuse(key, refusal, find_renamed(key))
        return False
    head = key.rpartition(".")[0]
    if key in SECTIONS:
        draft.errors.append(f"{key}: is a section; set its keys one by one, for example --{_first_key(key)}")
    elif head in FIELDS:
        draft.refuse(key, f"{key}: {head} is a value ({FIELDS[head].type_name}), nothing is below it", head)
    else:
        close = suggest_key(key)
        hint = f". Did you mean {close}?" if close else "; --help lists all keys"
        draft.refuse(key, f"{key}: unknown key{hint}", close)
    return False


def suggest_key(key: str) -> str | None:
    """The key of the schema that was probably meant, or the section for an unknown section."""
    section, _, name = key.rpartition(".")
    names = {known: known.rpartition(".")[2] for known in FIELDS}
    here = {known: short for known, short in names.items() if known.rpartition(".")[0] == section}
    elsewhere = [known for known, short in names.items() if short == name]
    if section not in SECTIONS and not elsewhere and not section:
        close = difflib.get_close_matches(key, [*SECTIONS, *here], 1)
        return close[0] if close else None
    if elsewhere:
        return max(elsewhere, key=lambda known: difflib.SequenceMatcher(None, key, known).ratio())
    fuller = [known for known, short in here.items() if _shortens(name, short)]
    return min(fuller, key=len) if fuller else _find_close(name, here) or _find_close(name, names)


def _shortens(name: str, known: str) -> bool:
    """Whether every word of `name` starts one of `known`: `num_heads` and `num_attention_heads`."""
    return all(any(word.startswith(part) for word in known.split("_")) for part in name.split("_"))


def _find_close(name: str, keys: Mapping[str, str]) -> str | None:
    """The key whose name is spelled most like `name`: sections apart, or two short names in one would look alike."""
    close = difflib.get_close_matches(name, keys.values(), 1, 0.75)
    return next(known for known, short in keys.items() if short == close[0]) if close else None


def _first_key(section: str) -> str:
    return next(key for key in FIELDS if key.startswith(f"{section}."))


def _parse_leaves(draft: _Draft) -> dict[str, Any]:
    values = {}
    for key, value in draft.written.items():
        try:
            values[key] = _expand_home(FIELDS[key], parse_value(FIELDS[key], value))
        except LeafError as error:
            draft.refuse(key, f"{key}: {error}")
    return values


def _expand_home(field: Field, value: Any) -> Any:
    """A first `~` of a path is the home folder; where data is named it is expanded when that is opened."""
    is_path = field.known.path and field.kind is str
    return os.path.expanduser(value) if is_path and value else value


def _refuse_hidden(draft: _Draft, values: dict[str, Any]) -> None:
    for key, value in values.items():
        marker = None if key == SENTENCES else find_marker(value)
        if marker is not None:
            draft.refuse(
                key,
                f"{key}: {marker} marks a secret that was hidden when this value was saved; write the whole value "
                f"again, in the file or with --{key} VALUE",
            )


def _show(value: Tree) -> str:
    return repr(value.text) if isinstance(value, Leaf) else "a list"


def _to_plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        items = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: _to_plain(item) for name, item in items.items() if item is not None}
    return escape_variables(value) if isinstance(value, str) else value


class _Dumper(yaml.SafeDumper):
    """Writes lists on one line, and quotes texts that would be read as null or hold control characters."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = '"' if Leaf(text).is_null or not text.isprintable() else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, True))
