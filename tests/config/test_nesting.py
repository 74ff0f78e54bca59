"""YAML and JSON nested without end is one sentence, in every file that somebody gives."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import yaml

from neobert.benchmark.experiment_plan import PlanError, load_plan
from neobert.commands.staged_run import load_pipeline
from neobert.commands.stages import PipelineError
from neobert.config.load import ConfigError, load_config, parse_config
from neobert.config.migrate import MigrationError, migrate
from neobert.config.nesting import MOST_LEVELS, compose, load_plain_yaml, parse_json
from neobert.weights.describe import WeightsError
from neobert.weights.encoder_weights import load_encoder_weights

SHIPPED_TEXTS = [file.read_text() for file in sorted((Path(__file__).parents[2] / "neobert").rglob("*.yaml"))]
LAUGHS = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
ENDLESS = {
    "flow": "model: " + "[" * 400,
    "closed": "model: " + "[" * 300 + "]" * 300,
    "mappings": "\n".join(" " * n + "a:" for n in range(2000)),
    "a few": "model: " + "{a: " * 25 + "1" + "}" * 25,
    "an anchor in itself": "model: &a {a: *a}",
    "anchors of anchors": LAUGHS,
}
SAID = r"nested more than 20 levels deep|more than 100,000 values"


@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS)
def test_every_yaml_file_is_refused_in_a_sentence(text: str, tmp_path: Path) -> None:
    file = tmp_path / "endless.yaml"
    file.write_text(text)
    readers: list[tuple[type[Exception], Callable[[], object]]] = [
        (ConfigError, lambda: load_config(file)),
        (PlanError, lambda: load_plan(file)),
        (PipelineError, lambda: load_pipeline(file)),
        (MigrationError, lambda: migrate(text)),
    ]
    for error, read in readers:
        with pytest.raises(error, match=SAID) as caught:
            read()
        assert len(str(caught.value)) < 300


def test_a_list_of_the_command_line_is_refused_too() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.betas: .* is not a list of 2 numbers"):
        parse_config("", ["optimizer.betas=" + "[" * 500])


def test_what_people_nest_is_read() -> None:
    text = "a: " + "[" * (MOST_LEVELS - 1) + "1" + "]" * (MOST_LEVELS - 1)
    assert str(load_plain_yaml(text)["a"]).count("[") == MOST_LEVELS - 1
    assert load_plain_yaml("b: &b {x: 1}\nc: [*b, *b]\nd: {<<: *b, y: 2}")["d"] == {"x": 1, "y": 2}
    assert load_plain_yaml("") is None
    assert parse_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}


@pytest.mark.parametrize("name", ["config.json", "config.yaml"])
def test_a_model_folder_with_an_endless_config_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("[" * (200_000 if name.endswith("json") else 500))
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(WeightsError, match=r"nested too deeply to be read|nested more than 20 levels"):
        load_encoder_weights(tmp_path)


def test_endless_json_is_an_error_of_json() -> None:
    with pytest.raises(json.JSONDecodeError, match="nested too deeply to be read"):
        parse_json('{"a":' * 200_000)


def describe_nodes(node: yaml.Node | None) -> object:
    """All that is read of nodes, and where they start."""
    if node is None:
        return None
    if isinstance(node, yaml.ScalarNode):
        value: object = (node.value, node.style)
    elif isinstance(node, yaml.MappingNode):
        value = [(describe_nodes(name), describe_nodes(item)) for name, item in node.value]
    else:
        value = [describe_nodes(item) for item in node.value]
    return node.tag, node.start_mark.line, node.start_mark.column, value


SCALARS = ["'it''s'", '"x\\u1234"', "|\n  x\n  y", ">-\n  x", "é", "1_000", "# c\n  b", "2001-01-01", "0x1F", "~", "''"]
WRONG = ["a: b: c", "a: [1", "  a: 1\n b: 2", "a: @x", "a: \x07", "--- a\n--- b", "a:\tb", "a: *b"]


@pytest.mark.parametrize("text", [*SHIPPED_TEXTS, *(f"a: {text}" for text in SCALARS), "", "- 1\n- {b: &c [c], d: *c}"])
def test_libyaml_reads_what_the_parser_in_python_reads(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, values = describe_nodes(compose(text)), load_plain_yaml(text)
    monkeypatch.setattr(yaml, "__with_libyaml__", False)
    assert fast == describe_nodes(compose(text))
    assert values == yaml.safe_load(text)


FLOW = [
    "b: ",
    "- ",
    "\n  ",
    "[",
    "]",
    "{",
    "}",
    ", ",
    ": ",
    "#c",
    "'",
    '"',
    "|\n",
    ">\n",
    "|",
    ">-",
    "---\n",
    "...\n",
    "? ",
    "\t",
]
TAGS = ["a", "=", "&a ", "*a", "!!str ", "!x ", "<<: ", "%", "@", "~", "1", "1.5e3", "yes"]
CHARACTERS = ["\xe9", "\r\n", "\u2028", "\x85", "\ufeff", "\ud800", "\x00", "\U0001f600"]


def test_both_parsers_give_random_texts_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    random, num_valid = Random(0), 0
    for _ in range(600):
        lines = (
            "".join(random.choices([*FLOW, *TAGS, *CHARACTERS], k=random.randint(0, 4)))
            for _ in range(random.randint(1, 4))
        )
        text, read = "".join(f"{random.choice('abc')}: {line}\n" for line in lines), []
        for has_libyaml in (True, False):
            monkeypatch.setattr(yaml, "__with_libyaml__", has_libyaml)
            try:
                read.append(repr(load_plain_yaml(text)))
            except yaml.YAMLError:
                read.append("error")
        assert read[0] == read[1], repr(text)
        num_valid += read[0] != "error"
    assert 50 < num_valid < 550


@pytest.mark.parametrize("text", [*WRONG, *ENDLESS.values()])
def test_what_is_wrong_is_said_alike_with_and_without_libyaml(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    for has_libyaml in (True, False):
        monkeypatch.setattr(yaml, "__with_libyaml__", has_libyaml)
        with pytest.raises(yaml.YAMLError) as caught:
            compose(text)
        said.append(str(caught.value))
    assert said[0] == said[1]
