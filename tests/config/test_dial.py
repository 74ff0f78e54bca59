"""The size dial: a depth decides the other sizes, the budget and the rates, and what is typed wins."""

from pathlib import Path

import pytest

from neobert.commands.ladder_command import TOKENS_PER_PARAMETER
from neobert.commands.training_commands import parse_command_line
from neobert.config.dial import LENGTH, VOCABULARY, DialSize, describe_sizes, set_depth
from neobert.config.load import load_config
from neobert.config.schema import Config
from neobert.config.shipped import copy_shipped
from neobert.errors import CallError

RECIPES = Path(__file__).parents[2] / "docs" / "recipes.md"


def parse(*argv: str) -> Config:
    return parse_command_line(argv, description=None, program="neobert pretrain")


def slots(config: Config) -> int:
    assert config.trainer.max_tokens is not None
    return config.trainer.max_tokens


def test_the_shipped_file_is_what_the_laws_give_at_depth_four() -> None:
    plain = load_config("dial")
    dialled = parse("dial", "--depth", "4")
    assert (plain.model, plain.optimizer, plain.trainer) == (dialled.model, dialled.optimizer, dialled.trainer)
    assert plain.dataset.max_seq_length == LENGTH


def test_everything_follows_from_the_depth() -> None:
    config = parse("dial", "--depth", "9")
    model, trainer, optimizer = config.model, config.trainer, config.optimizer
    assert (model.num_hidden_layers, model.hidden_size, model.head_dim, model.intermediate_size) == (9, 576, 64, 2304)
    parameters = 9 * (4 * 576**2 + 3 * model.ffn_size * 576) + VOCABULARY * 576
    assert slots(config) == pytest.approx(20 * parameters, rel=0.01)
    assert trainer.global_batch_size == 80
    assert trainer.per_device_train_batch_size == 8
    assert optimizer.lr == 8e-3
    assert optimizer.groups.embeddings.lr == optimizer.groups.vectors.lr == pytest.approx(2e-3 / 1.5, rel=1e-2)
    assert optimizer.lr * optimizer.muon_config.muon_decay * DialSize(depth=9).steps == pytest.approx(
        8e-5 * 782, rel=1e-2
    )


def test_what_is_typed_wins_in_any_order() -> None:
    for argv in (["--depth", "6", "--model.hidden_size", "192"], ["--model.hidden_size", "192", "--depth=6"]):
        config = parse("dial", *argv)
        assert (config.model.hidden_size, config.model.num_hidden_layers) == (192, 6)
    budget = parse("dial", "--depth", "6", "--trainer.max_steps", "50").trainer
    assert (budget.max_steps, budget.max_tokens) == (50, None)
    few = parse("dial", "--depth", "6", "--tokens_per_parameter", "0.5")
    assert slots(few) == pytest.approx(DialSize(depth=6).tokens / 40, rel=0.01)


def test_the_saved_config_holds_plain_values(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        parse("dial", "--depth", "2", "--print-config")
    (tmp_path / "saved.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "saved.yaml") == parse("dial", "--depth", "2")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--depth", "0"], "--depth: '0'; write a number of layers from 1 to 128"),
        (["--depth"], "--depth: ''"),
        (["--depth", "4", "--tokens_per_parameter", "nan"], "--tokens_per_parameter: 'nan'; write a number above 0"),
        (["--tokens_per_parameter", "1e308"], "--tokens_per_parameter: '1e308'; write a number above 0"),
    ],
)
def test_a_wrong_depth_is_one_sentence(argv: list[str], said: str) -> None:
    with pytest.raises(CallError, match=said.replace("(", r"\(")):
        parse("dial", *argv)


def test_other_configs_have_no_depth(tmp_path: Path) -> None:
    copied = copy_shipped("dial", tmp_path / "dial.yaml")
    for file in ("quickstart", str(copied)):
        assert set_depth(file, ["--seed=4"]) == ["--seed=4"]
        with pytest.raises(CallError, match=r"--depth: is of the shipped config dial .*, and .* has sizes of its own"):
            parse(file, "--depth", "4")


@pytest.mark.parametrize("depth", range(1, 33))
def test_every_size_is_a_config_and_larger_ones_learn_from_more(depth: int) -> None:
    small, large = DialSize(depth=depth), DialSize(depth=depth + 1)
    load_config("dial", small.overrides())
    assert small.rows % small.micro_rows == 0
    assert small.rows <= large.rows
    assert small.decay > large.decay
    assert small.flops < large.flops


def test_the_tables_of_the_page_are_what_the_laws_give() -> None:
    page = RECIPES.read_text()
    assert describe_sizes([*range(2, 13), 28]) in page
    ratio = float(TOKENS_PER_PARAMETER)
    assert describe_sizes(range(1, 6), ratio) in page
    flops = sum(DialSize(depth=depth, tokens_per_parameter=ratio).flops for depth in range(1, 6))
    assert f"need {flops / 1e12:.0f} TFLOP" in page
