"""Documentation made from the schema."""

import dataclasses
from pathlib import Path

import yaml

from neobert.config.fields import FIELDS, SECTIONS, Field
from neobert.config.load import parse_config
from neobert.config.reference import build_markdown, show_value
from neobert.config.refused import EXPLAINED, FOREIGN_KEYS, REFUSED, REFUSED_VALUES, RENAMED, find_refusal
from neobert.config.schema import Config

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == build_markdown(), "run `python -m neobert.config.reference` and commit docs/configuration.md"


def test_every_field_and_section_has_a_text():
    assert all(len(field.doc) > 10 for field in FIELDS.values())
    assert all(len(text) > 10 for text in SECTIONS.values())

    def leaves(section: object) -> int:
        values = [getattr(section, f.name) for f in dataclasses.fields(section) if f.name != "explicit"]
        return sum(leaves(value) if dataclasses.is_dataclass(value) else 1 for value in values)

    assert len(FIELDS) == leaves(Config())


def test_types_as_text():
    def words(key: str) -> str:
        return FIELDS[key].type_name

    assert words("trainer.max_steps") == "integer or null"
    assert words("optimizer.betas") == "list of 2 numbers"
    assert words("wandb.tags") == "list of texts"
    assert words("trainer.use_cpu") == "true or false"
    assert words("model.hidden_act") == "swiglu | gelu | geglu"


def test_the_table_shows_defaults_and_escapes_bars():
    page = build_markdown()
    assert "| `max_steps` | integer or null, at least 1 | `null` | schedule | Budget in optimizer steps. |" in page
    assert "| `hidden_act` | swiglu \\| gelu \\| geglu | `swiglu` | fixed |" in page
    assert "| `betas` | list of 2 numbers, at least 0 and less than 1 | `[0.9, 0.95]` | declared |" in page


def test_the_examples_of_the_page_load():
    blocks = [block.partition("```")[0] for block in build_markdown().split("```yaml\n")[1:]]
    assert parse_config(blocks[0]).trainer.max_steps == 1000
    config = parse_config(blocks[1], ["tokenizer.train=true", "trainer.max_steps=1"])
    assert (config.dataset.path, config.dataset.max_seq_length) == ("/data/books", 1024)


def test_shown_defaults_are_yaml():
    for field in FIELDS.values():
        shown = yaml.safe_load(show_value(field.default))
        # plain YAML reads `off` as false and `1e-05` as a text; the loader goes by the field's type
        if not isinstance(field.default, str | float):
            assert shown == (list(field.default) if isinstance(field.default, tuple) else field.default)


def test_the_tables_of_refused_keys_are_consistent():
    assert set(RENAMED.values()) <= set(FIELDS)
    tables = [RENAMED, REFUSED]
    assert sum(map(len, tables)) == len({key for table in tables for key in table})
    for table in tables:
        assert not set(table) & set(FIELDS)
        for key in table:
            assert (find_refusal(key) or "").startswith(f"{key}: ")
    assert set(FOREIGN_KEYS.values()) <= set(FIELDS)
    assert not set(FOREIGN_KEYS) & set(EXPLAINED)
    # A word is looked for in any section, so it may be the name of no key.
    assert not (set(FOREIGN_KEYS) | set(EXPLAINED)) & {key.rpartition(".")[2] for key in FIELDS}
    for key, words in REFUSED_VALUES.items():
        field: Field = FIELDS[key]
        assert not set(words) & set(field.choices)
