"""The command line that scripts share: help, --print-config, errors with exit code 2."""

import os
import subprocess
import sys

import pytest

from neobert.config.command_line import parse_command_line
from neobert.config.fields import FIELDS
from neobert.config.load import load_config, parse_config

BASE = "dataset: {name: python_stdlib}\ntokenizer: {train: true}\ntrainer: {max_tokens: 1e9}\n"


@pytest.fixture
def run_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return str(path)


def parse(*argv: str):
    return parse_command_line(argv, description="Trains an encoder.", program="pretrain.py")


def exit_code(*argv: str) -> object:
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    return caught.value.code


def test_a_file_and_overrides_in_any_order(run_yaml):
    expected = load_config(run_yaml, ["trainer.max_steps=3", "seed=4", "trainer.use_cpu=true"])
    assert parse(run_yaml, "--trainer.max_steps", "3", "--seed=4", "--trainer.use_cpu") == expected
    assert parse("--trainer.max_steps", "3", "seed=4", "--trainer.use_cpu=true", run_yaml) == expected


def test_a_value_may_equal_the_files_name(run_yaml):
    assert parse("--trainer.output_dir", run_yaml, run_yaml).trainer.output_dir == run_yaml


def test_print_config_prints_what_loads_back_and_touches_nothing(run_yaml, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code(run_yaml, "--print-config", "--trainer.max_steps", "100") == 0
    printed = capsys.readouterr()
    assert parse_config(printed.out) == load_config(run_yaml, ["trainer.max_steps=100"])
    assert printed.err.startswith("warning: scheduler.warmup_steps: the warm-up takes 2000 steps but the run has 100")
    assert os.listdir(tmp_path) == ["run.yaml"]


def test_print_config_checks_first(run_yaml, capsys):
    assert exit_code(run_yaml, "--print-config", "--trainer.max_step", "100") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "trainer.max_step: unknown key. Did you mean trainer.max_steps?" in printed.err


def test_errors_go_to_stderr(run_yaml, capsys):
    assert exit_code(run_yaml, "--optimizer.lr=x", "--seed=y") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        f"2 errors in {run_yaml}:",
        "  - optimizer.lr: 'x' is not a number",
        "  - seed: 'y' is not an integer",
    ]


def test_help_lists_every_key_with_its_text(capsys):
    assert exit_code("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: python pretrain.py CONFIG.yaml [--section.key VALUE ...] Trains an encoder.")
    for field in FIELDS.values():
        assert f"--{field.key} (" in text
        assert " ".join(field.doc.split()) in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "no config file was given"),
        (("seed=3",), "no config file was given"),
        (("a.yaml", "b.yaml"), "one config file is expected, got 2: a.yaml, b.yaml"),
        (("-v", "a.yaml"), "unknown option -v; --help lists all keys"),
        (("missing.yaml",), "1 error in missing.yaml:\n  - the config file does not exist"),
    ],
)
def test_wrong_calls(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*argv) == 2
    assert message in capsys.readouterr().err


def test_no_config_names_the_shipped_ones(capsys, tmp_path, monkeypatch):
    (tmp_path / "configs" / "pretraining").mkdir(parents=True)
    (tmp_path / "configs" / "pretraining" / "quickstart.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    assert exit_code() == 2
    assert "for example configs/pretraining/quickstart.yaml" in capsys.readouterr().err


def test_print_config_needs_neither_torch_nor_a_data_library(run_yaml):
    code = (
        "import sys\n"
        "from neobert.config.command_line import parse_command_line\n"
        "try:\n"
        "    parse_command_line([sys.argv[1], '--print-config'], description='')\n"
        "finally:\n"
        "    heavy = ('torch', 'datasets', 'transformers', 'accelerate')\n"
        "    print([m for m in heavy if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, run_yaml], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
