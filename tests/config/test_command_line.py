"""The command line of all scripts: help, --print-config, errors with exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from calls import call

from neobert.commands.training_commands import config, parse_command_line
from neobert.config.fields import FIELDS
from neobert.config.load import ConfigError, load_config, parse_config
from neobert.config.shipped import SHIPPED
from neobert.errors import CallError, UserError

ROOT = Path(__file__).parents[2]
BASE = "dataset: {name: python_stdlib}\ntokenizer: {train: true}\ntrainer: {max_tokens: 1e9}\n"


@pytest.fixture
def run_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return str(path)


def parse(*argv: str):
    return parse_command_line(argv, description="Trains an encoder.", program="neobert pretrain")


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
    with pytest.raises(ConfigError, match=r"trainer.max_step: unknown key. Did you mean trainer.max_steps\?"):
        parse(run_yaml, "--print-config", "--trainer.max_step", "100")
    assert capsys.readouterr().out == ""


def test_errors_go_to_stderr(run_yaml, capsys):
    assert call("pretraining/pretrain.py", run_yaml, "--optimizer.lr=x", "--seed=y") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        f"error: 2 errors in {run_yaml}:",
        "  - optimizer.lr: 'x' is not a number",
        "  - seed: 'y' is not an integer",
    ]


def test_help_lists_every_key_with_its_text(capsys):
    assert exit_code("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: neobert pretrain CONFIG.yaml [--section.key VALUE ...] Trains an encoder.")
    for field in FIELDS.values():
        assert f"--{field.key} (" in text
        assert " ".join(field.doc.split()) in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "no config file"),
        (("seed=3",), "no config file"),
        (("a.yaml", "b.yaml"), "one config file is expected, got 2: a.yaml, b.yaml"),
        (("-v", "a.yaml"), "unknown option -v; --help lists all keys"),
        (("missing.yaml",), "1 error in missing.yaml:\n  - the config file does not exist"),
    ],
)
def test_wrong_calls(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert message in str(caught.value)


def test_a_shipped_config_is_found_by_its_name_unless_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = load_config(SHIPPED["quickstart"], ["seed=3"])
    assert parse("quickstart", "--seed", "3") == load_config("quickstart", ["seed=3"]) == shipped
    (tmp_path / "quickstart").write_text(BASE)
    assert parse("quickstart") == load_config(tmp_path / "quickstart") != shipped
    for name, message in (("quikstart", "did you mean quickstart?"), ("none/quickstar", "does not exist; ")):
        with pytest.raises(ConfigError) as caught:
            parse(name)
        assert message in str(caught.value)


def test_a_missing_file_in_an_empty_folder_leads_to_the_shipped_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"does not exist; .*`neobert config list`"):
        parse("missing.yaml")


def test_every_shipped_config_has_a_name_of_its_own():
    files = sorted(ROOT.glob("configs/**/*.yaml"))
    assert len(files) == len(SHIPPED) > 20
    assert {file.stem for file in files} == set(SHIPPED)


def test_a_shipped_config_is_copied_out_and_never_over_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for destination, made in (("folder", "folder/tiny.yaml"), ("x.yaml", "x.yaml")):
        config("", ["copy", "tiny", destination])
        assert Path(made).read_text() == SHIPPED["tiny"].read_text()
    config("", ["copy", "quickstart"])
    assert load_config("quickstart.yaml") == load_config("quickstart")
    Path("quickstart.yaml").write_text("mine")
    for words, message in (
        (["quickstart"], "quickstart.yaml exists already"),
        (["quikstart"], "did you mean quickstart?"),
        (["quickstart", "none/x.yaml"], "none/x.yaml cannot be written"),
    ):
        with pytest.raises(CallError) as caught:
            config("", ["copy", *words])
        assert message in str(caught.value)
    assert Path("quickstart.yaml").read_text() == "mine"


def test_print_config_needs_neither_torch_nor_a_data_library(run_yaml):
    code = (
        "import sys\n"
        "from neobert.commands.training_commands import parse_command_line\n"
        "try:\n"
        "    parse_command_line([sys.argv[1], '--print-config'], description='', program='')\n"
        "finally:\n"
        "    heavy = ('torch', 'datasets', 'transformers', 'accelerate')\n"
        "    print([m for m in heavy if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, run_yaml], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
