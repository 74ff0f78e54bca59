"""The schema as documentation: docs/configuration.md and the text of `--help`.

python -m neobert.config.reference        # writes docs/configuration.md
"""

import sys
import textwrap
from pathlib import Path

from neobert.config.fields import FIELDS, SECTIONS, Field
from neobert.config.refused import EXPLAINED, FOREIGN_KEYS, REFUSED, RENAMED
from neobert.key import RESUME, show_value

_INTRODUCTION = """\
# Configuration

This page is made from `neobert/config/schema.py` by `python -m neobert.config.reference`. Edit the schema, not this
page.

A config file is YAML with one mapping per section. Every key has a default, but a run needs a source
(`dataset.name` or `dataset.path`), a tokenizer (`tokenizer.name`, `tokenizer.path` or `tokenizer.train: true`) and
exactly one budget (`trainer.max_steps`, `trainer.max_tokens` or `trainer.num_train_epochs`).

```yaml
dataset:
  name: python_stdlib
tokenizer:
  train: true
trainer:
  max_steps: 1000
```

## Overrides

Every script that takes a config file takes any key after it, in three spellings:

```bash
python scripts/pretraining/pretrain.py configs/pretraining/quickstart.yaml \\
  --trainer.max_steps 100 --optimizer.lr=1e-4 seed=0
```

- A budget on the command line replaces the file's budget of any kind; a source (`dataset.path`, `dataset.mixture`,
  `dataset.name`) replaces the file's source, with its `dataset.config` and `dataset.revision`.
- `--trainer.use_cpu` alone means true. Lists are written `--optimizer.betas "[0.9, 0.95]"`.
- `--print-config` checks everything, prints the whole config and exits; `--help` lists the keys.

## How values are read

- Each value is read by the type of its key: a text is read as typed (`no`, `012` and `1e5` stay texts), `1e-4` is a
  number, and an integer may be written `1e5`.
- `null`, `none` and, in a file, an empty value mean none where the table says "or null"; quotes make a text of them:
  `"none"`.
- Unknown keys, wrong types and values that contradict each other are errors, all reported together.

## Variables

Values under `variables:` can be used anywhere. Alone, a reference keeps the type of its value, also for lists and
mappings; inside a text it is in braces.

```yaml
variables:
  root: /data
  length: 1024
dataset:
  path: "{$variables.root}/books"    # or "${variables.root}/books"
  max_seq_length: $variables.length
model:
  max_position_embeddings: $variables.length
```

`$$variables` and `$${variables` mean the text with one dollar.
"""

_CHEAT_SHEET = """
## The keys that matter

Most runs change a few of these and nothing else.

| key | default | meaning |
|---|---|---|
"""

_MATTERS = (
    "dataset.path",
    "dataset.max_seq_length",
    "dataset.eval_samples",
    "dataset.mixture",
    "tokenizer.path",
    "tokenizer.train",
    "model.hidden_size",
    "model.num_hidden_layers",
    "model.num_attention_heads",
    "model.intermediate_size",
    "model.init_from",
    "datacollator.mlm_probability",
    "optimizer.name",
    "optimizer.lr",
    "optimizer.weight_decay",
    "scheduler.name",
    "trainer.max_steps",
    "trainer.global_batch_size",
    "trainer.per_device_train_batch_size",
    "trainer.output_dir",
    "trainer.mixed_precision",
    "trainer.eval_steps",
    "trainer.save_steps",
    "trainer.resume_from_checkpoint",
    "seed",
)

_ON_RESUME = """
## On resume

Every setting of a resumed run is compared with the checkpoint's. The column "on resume" of the tables says what another
value does; a key that only some runs read (`only with`) is an error in the others.

| on resume | another value |
|---|---|
"""

_REST = """
Another source (`dataset.path`, `name`, `mixture`, ...) is its own declaration, and the same data under another name is
free; see [resume.md](resume.md#identity).
"""

_RENAMED = """
## Keys of other NeoBERT code

Files written for other NeoBERT code bring keys that are refused with a sentence that says what to write. The edits are
made by `python scripts/migrate_config.py OLD.yaml > new.yaml`, which lists them on stderr.

| written there | written here |
|---|---|
"""

_REFUSED = """
| refused | because |
|---|---|
"""

_FOREIGN = """
Key names of transformers and axolotl, alone or in any section, are refused with the key to write.

| written there | written here |
|---|---|
"""


def build_markdown() -> str:
    """The text of docs/configuration.md."""
    parts = [_INTRODUCTION, _CHEAT_SHEET, *(_short_row(FIELDS[key]) for key in _MATTERS), _ON_RESUME]
    parts += [*(f"| {name} | {text} |\n" for name, text in RESUME.items()), _REST]
    for section, about in [("", "Keys outside of sections."), *SECTIONS.items()]:
        rows = [_markdown_row(f) for f in FIELDS.values() if f.key.rpartition(".")[0] == section]
        title = f"`{section}`" if section else "Top level"
        parts.append(f"\n## {title}\n\n{about}\n")
        if rows:
            parts += ["\n| key | type | default | on resume | meaning |\n|---|---|---|---|---|\n", *rows]
    parts += [_RENAMED, *(f"| `{old}` | `{new}` |\n" for old, new in sorted(RENAMED.items()))]
    parts += [_REFUSED, *(f"| `{key}` | {_escape(text)} |\n" for key, text in sorted(REFUSED.items()))]
    parts += [_FOREIGN, *(f"| `{name}` | `{key}` |\n" for name, key in sorted(FOREIGN_KEYS.items()))]
    parts += [f"| `{name}` | {_escape(text)} |\n" for name, text in sorted(EXPLAINED.items())]
    return "".join(parts)


def build_help(usage: str, description: str) -> str:
    """The text of `--help`: how to call the script, and every key with its type, default and meaning."""
    lines = [usage, "", *textwrap.wrap(description, 100), "", "options:"]
    lines += [
        "  --help               show this and exit",
        "  --print-config       check everything, print the whole config and exit",
        "  --section.key VALUE  override a key of the file; also --section.key=VALUE and section.key=VALUE",
        "",
        "keys:",
    ]
    for field in FIELDS.values():
        lines.append(f"  --{field.key}  ({_describe_values(field)}; default {show_value(field.default)})")
        about = f"{field.doc}{_describe_needs(field)} On resume: {field.known.resume}."
        lines += textwrap.wrap(about, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _short_row(field: Field) -> str:
    """With the first sentence of its meaning."""
    first = field.doc.split(". ")[0].removesuffix(".")
    return f"| `{field.key}` | `{show_value(field.default)}` | {_escape(first)} |\n"


def _markdown_row(field: Field) -> str:
    name = field.key.rpartition(".")[2]
    cells = [
        f"`{name}`",
        _describe_values(field),
        f"`{show_value(field.default)}`",
        str(field.known.resume),
        f"{field.doc}{_describe_needs(field)}",
    ]
    return f"| {' | '.join(map(_escape, cells))} |\n"


def _describe_values(field: Field) -> str:
    return ", ".join(part for part in (field.type_name, field.known.range_text) if part)


def _describe_needs(field: Field) -> str:
    """What it needs by itself, beside what its section needs."""
    return f" Only with {'; '.join(map(str, field.known.needs))}." if field.known.needs else ""


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """Write docs/configuration.md in the current folder's `docs`."""
    target = Path("docs/configuration.md")
    if not target.parent.is_dir():
        sys.exit(f"{target.parent}/ is not here: run this in the root of the repository")
    target.write_text(build_markdown(), encoding="utf-8")


if __name__ == "__main__":
    main()
