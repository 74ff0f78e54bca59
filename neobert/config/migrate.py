"""A config file written for other NeoBERT code -> one for this code, with the list of edits.

The names are those of the fork whose training guide this project follows. Keys are renamed or removed as
`neobert.config.refused` says, and where that code had another default than this one, its default is written out, so
that the file trains the same thing. Values stay as they were typed, `variables:` and references too; comments are lost.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from neobert.config.fields import FIELDS, SECTIONS, LeafError, parse_value
from neobert.config.load import ConfigError, parse_config
from neobert.config.refused import find_refusal, find_renamed
from neobert.config.rules import BUDGETS
from neobert.config.rules_glue import OF_THE_SUITE
from neobert.config.schema_optimizer import MUON
from neobert.config.source import Leaf, Tree, VariableError, YamlError, parse_yaml, substitute
from neobert.errors import UserError
from neobert.key import show_value
from neobert.model.config import ARCHITECTURE

_DEFAULTS: dict[str, Any] = {
    "tokenizer.name": "bert-base-uncased",
    "tokenizer.truncation": True,
    "datacollator.mlm_probability": 0.15,
    "datacollator.pack_sequences": False,
    "optimizer.lr": 1e-4,
    "optimizer.weight_decay": 0.01,
    "optimizer.betas": (0.9, 0.999),
    "scheduler.warmup_steps": 10000,
    "trainer.gradient_clipping": None,
}
"""Defaults of that code which differ from ours and change what is trained."""

_WITHOUT_EFFECT: dict[str, str] = {
    "model.vocab_size": "it was overwritten by the tokenizer's size; null follows the tokenizer",
    "tokenizer.vocab_size": "it is only the size of a tokenizer to train",
    "trainer.overwrite_output_dir": "it was never read; here true replaces an earlier run",
}
"""Keys of the schema that meant nothing there and would mean something here."""

_ATTENTION_FLAGS = ("model.flash_attention", "model.use_flash_attention", "model.xformers_attention")

_OTHER_VALUES: dict[str, dict[str, str]] = {
    "model.attn_backend": {"flash": "flash_attn_varlen", "flash_attn": "flash_attn_varlen"},
    "optimizer.name": {"muon": "muonclip"},
    "trainer.eval_strategy": {"epoch": "steps"},
    "trainer.save_strategy": {"epoch": "steps", "best": "steps"},
}
"""Values that are written differently here, or replaced by the nearest there is."""


class MigrationError(UserError):
    """A file that cannot be migrated; the message says why."""


def migrate(text: str) -> tuple[str, list[str]]:
    """The YAML `text` in this code's keys, and one sentence for each edit.

    Raises:
        MigrationError: not YAML, a task that is not migrated, or values that no edit can fix.
    """
    try:
        tree = parse_yaml(text)
    except YamlError as error:
        raise MigrationError(f"not valid YAML: {error}") from error
    variables = tree.pop("variables", {})
    task = tree.get("task", Leaf("pretraining"))
    name = task.text.lower() if isinstance(task, Leaf) else ""
    if name not in _EDITS:
        raise MigrationError(f"task: {name}: only files of {', '.join(_EDITS)} are migrated")
    draft = _Rewrite(variables=variables if isinstance(variables, dict) else {})
    _rename(draft, _flatten(tree, ""))
    for edit in _EDITS[name]:
        edit(draft)
    result = _to_yaml(draft)
    try:
        parse_config(result, source="the migrated file")
    except ConfigError as error:
        raise MigrationError(f"{error}\nFix these keys in the old file and migrate it again.") from error
    return result, draft.edits


@dataclass(slots=True)
class _Rewrite:
    """The file while it is edited: dotted key -> value as typed."""

    variables: dict[str, Tree]
    values: dict[str, Tree] = field(default_factory=dict)
    edits: list[str] = field(default_factory=list)

    def read(self, key: str) -> Any:
        """The value as the type of its field; the default for a key that is missing or cannot be read."""
        try:
            return parse_value(FIELDS[key], substitute(self.values[key], self.variables))
        except (KeyError, LeafError, VariableError):
            return FIELDS[key].default

    def choice(self, key: str) -> str:
        """The value as text in lower case, empty for a missing key, a list or a mapping."""
        value = self.values.get(key)
        return value.text.lower() if isinstance(value, Leaf) else ""

    def write(self, key: str, value: Any, edit: str) -> None:
        self.values[key] = [Leaf(show_value(v)) for v in value] if isinstance(value, tuple) else Leaf(show_value(value))
        self.edits.append(edit)

    def remove(self, key: str, reason: str) -> None:
        self.edits.append(f"removed {key}: {reason}")
        self.values.pop(key, None)


def _flatten(tree: dict[str, Tree], prefix: str) -> dict[str, Tree]:
    flat: dict[str, Tree] = {}
    for name, value in tree.items():
        key = prefix + name
        if isinstance(value, dict) and key not in FIELDS:
            flat |= _flatten(value, f"{key}.")
        elif key not in SECTIONS or not (isinstance(value, Leaf) and value.is_null):
            flat[key] = value
    return flat


def _rename(draft: _Rewrite, old: dict[str, Tree]) -> None:
    """Fill the draft. A key that is unknown to everything stays, so that loading reports it."""
    for key, value in old.items():
        text = value.text.lower() if isinstance(value, Leaf) else ""
        empty = isinstance(value, Leaf) and (value.is_null or not value.text)
        empty = empty and not (key in FIELDS and text in FIELDS[key].choices)
        new, refusal = None if key in FIELDS else find_renamed(key), find_refusal(key)
        if new is not None and (new in old or empty):
            draft.remove(key, f"{new} is in the file" if new in old else "it was null")
        elif new is not None:
            draft.edits.append(f"renamed {key} to {new}")
            draft.values[new] = value
        elif key in _WITHOUT_EFFECT:
            draft.remove(key, _WITHOUT_EFFECT[key])
        elif key in _ATTENTION_FLAGS and "model.attn_backend" not in old:
            backend = "flash_attn_varlen" if text in ("true", "yes", "on") else "sdpa"
            draft.write("model.attn_backend", backend, f"replaced {key} by model.attn_backend: {backend}")
        elif key.rpartition(".")[2].startswith("fsdp") or ".fsdp_config." in f".{key}":
            _rename_fsdp(draft, key, text)
        elif refusal is not None:
            draft.remove(key, refusal.partition(": ")[2])
        elif empty and key in FIELDS and not FIELDS[key].nullable:
            draft.remove(key, f"it was null; the default is {show_value(FIELDS[key].default)}")
        else:
            draft.values[key] = value


_FSDP = "trainer.parallel"


def _rename_fsdp(draft: _Rewrite, key: str, text: str) -> None:
    """Any way to ask for FSDP becomes `trainer.parallel`; of its settings one has a counterpart."""
    if "reshard_after_forward" in key and text in ("true", "false"):
        draft.edits.append(f"renamed {key} to trainer.reshard_after_forward")
        draft.values["trainer.reshard_after_forward"] = Leaf(text)
    elif text in ("", "false", "no", "off", "null"):
        draft.remove(key, "it asked for nothing")
    elif "offload" in key or not (key == "trainer.fsdp" or key.endswith(("strategy", "version"))):
        what = "nothing is offloaded" if "offload" in key else "every block is a unit of FSDP2"
        draft.remove(key, f"{what} here")
    elif "hybrid" in text or _FSDP not in draft.values:
        engine = "hsdp" if "hybrid" in text else "fsdp2"
        draft.write(_FSDP, engine, f"replaced {key} by {_FSDP}: {engine}")
    else:
        draft.remove(key, "every block is a unit of FSDP2 here")


def _edit_values(draft: _Rewrite) -> None:
    for key, values in _OTHER_VALUES.items():
        old = draft.choice(key)
        if old in values:
            draft.write(key, values[old], f"changed {key} from {old} to {values[old]}")


def _remove_unneeded(draft: _Rewrite) -> None:
    """That code said nothing about keys that had no effect: of Muon beside another optimizer, of another task."""
    fields = [FIELDS[key] for key in draft.values if key in FIELDS]
    unmet = {f.key: need for f in fields for need in reversed(f.needs) if not need.holds(draft.read)}
    for key, need in unmet.items():
        draft.remove(key, f"it has no effect {need.reason(draft.read)}")
    if unmet:  # What needs a key that was removed has no effect either.
        _remove_unneeded(draft)


def _edit_source(draft: _Rewrite) -> None:
    name, path = draft.read("dataset.name"), draft.read("dataset.path")
    full = "tiiuae/falcon-refinedweb"
    if name == "refinedweb" or (name is None and path is None):
        draft.write("dataset.name", full, f"wrote dataset.name: {full}, the full name of refinedweb, the default there")


def _edit_ngpt(draft: _Rewrite) -> None:
    """There the normalised model had no 2/3 rule, and `base_scale` was allowed without it."""
    if not draft.read("model.ngpt"):
        if "model.base_scale" in draft.values:
            draft.remove("model.base_scale", "has no effect without model.ngpt")
        return
    key = "model.intermediate_size"
    old = draft.read(key)
    new = old * 3 // 2
    draft.write(key, new, f"changed {key} from {old} to {new}: 2/3 of it are used here, all of it there")


def _edit_contrastive(draft: _Rewrite) -> None:
    """What that code called simcse has in-batch and hard negatives; its tokenizer was named apart from the weights."""
    if draft.choice("contrastive.loss_type") in ("", "simcse"):
        draft.write("contrastive.loss_type", "infonce", "wrote contrastive.loss_type: infonce, which is simcse there")
    if draft.read("contrastive.pretrained_checkpoint_dir") is not None:
        for key in [key for key in draft.values if key.startswith("tokenizer.")]:
            draft.remove(key, "the tokenizer is the checkpoint's")


def _edit_glue(draft: _Rewrite) -> None:
    """There a file was one task with one learning rate, batch and seed, and said what evaluates and saves."""
    lists = {
        "glue.tasks": "glue.tasks",
        "optimizer.lr": "glue.learning_rates",
        "trainer.per_device_train_batch_size": "glue.batch_sizes",
    }
    rows, more = (draft.read(f"trainer.{x}") for x in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    if more is not None and isinstance(rows, int):
        draft.write(
            "trainer.per_device_train_batch_size", rows * more, f"multiplied the rows by {more} accumulated steps"
        )
    for key, new in lists.items():
        value = draft.values.get(key)
        if isinstance(value, Leaf) and not value.is_null:
            draft.values[new] = [Leaf(value.text)]
            draft.edits.append(f"wrote {new}: [{value.text}]")
    if "glue.seeds" not in draft.values:
        draft.write("glue.seeds", 1, "wrote glue.seeds: 1, as there")
    if draft.read("glue.model") is not None:
        others = ("tokenizer.", *(f"model.{name}" for name in ARCHITECTURE if name != "dropout_prob"))
        for key in [key for key in draft.values if key.startswith(others)]:
            draft.remove(key, "the architecture and the tokenizer are those of glue.model")
    for key, instead in OF_THE_SUITE.items():
        if key in draft.values:
            draft.remove(key, instead)


def _write_finetuning_defaults(draft: _Rewrite) -> None:
    _write_defaults(draft, [key for key in _DEFAULTS if key.startswith(("optimizer.", "scheduler.", "trainer."))])


def _edit_lengths(draft: _Rewrite) -> None:
    length, longest = draft.read("dataset.max_seq_length"), draft.read("model.max_position_embeddings")
    for key in ("tokenizer.max_length", "datacollator.max_length"):
        if draft.read(key) not in (None, length):
            draft.remove(key, f"{draft.read(key)} has no effect, dataset.max_seq_length = {length} decides")
    if longest < length:
        key = "model.max_position_embeddings"
        draft.write(key, length, f"changed {key} from {longest} to dataset.max_seq_length = {length}")
    key = "datacollator.pad_to_multiple_of"
    multiple = draft.read(key)
    if multiple is not None and draft.choice("datacollator.pack_sequences") in ("true", "yes", "on"):
        draft.remove(key, f"{multiple} has no effect, packed rows have a fixed length")
    elif multiple is not None and length % multiple:
        draft.remove(key, f"{multiple} does not divide dataset.max_seq_length = {length}")


def _choose_budget(draft: _Rewrite) -> None:
    """Steps won over epochs there, and without either there were a million steps."""
    explicit = [key for key in BUDGETS if draft.read(key) is not None]
    for key in explicit[1:]:
        draft.remove(key, f"{explicit[0]} is the budget")
    if not explicit:
        draft.write(BUDGETS[0], 1_000_000, f"wrote {BUDGETS[0]}: 1000000, the default there")


def _write_defaults(draft: _Rewrite, keys: Iterable[str] = _DEFAULTS) -> None:
    for key in keys:
        default = _DEFAULTS[key]
        replacement = {"tokenizer.name": "tokenizer.path", "scheduler.warmup_steps": "scheduler.warmup_percent"}.get(
            key
        )
        if key in draft.values or (replacement is not None and draft.read(replacement) is not None):
            continue
        here = show_value(FIELDS[key].default)
        draft.write(key, default, f"wrote {key}: {show_value(default)}, the default there (here {here})")


def _write_clipping_default(draft: _Rewrite) -> None:
    """There the last micro-batch of a step was measured unless the file said otherwise; here all of them are."""
    muon = "optimizer.muon_config."
    key = f"{muon}capture_last_microbatch_only"
    clips = draft.read("optimizer.name") in MUON and draft.read(f"{muon}enable_clipping")
    if clips and key not in draft.values:
        draft.write(key, True, f"wrote {key}: true, the default there (here false)")


_EDITS: dict[str, tuple[Callable[[_Rewrite], None], ...]] = {
    "pretraining": (
        _edit_values,
        _remove_unneeded,
        _edit_source,
        _edit_ngpt,
        _edit_lengths,
        _choose_budget,
        _write_defaults,
        _write_clipping_default,
    ),
    "contrastive": (
        _edit_values,
        _edit_ngpt,
        _edit_contrastive,
        _remove_unneeded,
        _edit_lengths,
        _choose_budget,
        _write_finetuning_defaults,
    ),
    "glue": (_edit_values, _write_finetuning_defaults, _edit_glue, _remove_unneeded),
}
"""The edits of a task's file, in order."""


class _MigratedDumper(yaml.SafeDumper):
    """Writes leaves as they were typed and lists on one line."""


def _represent_leaf(dumper: yaml.SafeDumper, leaf: Leaf) -> yaml.Node:
    if leaf.quoted:
        return dumper.represent_scalar("tag:yaml.org,2002:str", leaf.text, style='"')
    return yaml.ScalarNode(dumper.resolve(yaml.ScalarNode, leaf.text, (True, False)), leaf.text)


_MigratedDumper.add_representer(Leaf, _represent_leaf)
_MigratedDumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, True)
)


def _to_yaml(draft: _Rewrite) -> str:
    """Sections in the order of the schema; keys that are not in it come last, where loading reports them."""
    values = draft.values
    tree: dict[str, Any] = {"variables": draft.variables} if draft.variables else {}
    for key in [*(key for key in FIELDS if key in values), *(key for key in values if key not in FIELDS)]:
        *path, name = key.split(".")
        target = tree
        for part in path:
            target = target.setdefault(part, {})
        target[name] = values[key]
    return yaml.dump(tree, Dumper=_MigratedDumper, sort_keys=False, allow_unicode=True, width=120)
