"""Every command answers `--help` and a wrong config without its libraries, and ends through one function."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from calls import SCRIPTS, call

from neobert import cli
from neobert.benchmark.against import RUNS
from neobert.benchmark.settings import CONTESTANTS
from neobert.benchmark.trial import Stopped
from neobert.commands.flags import POOLING_HELP, build_model_parser
from neobert.commands.registry import COMMANDS
from neobert.contrastive.mine import MineSettings
from neobert.data.tokenizer import DEFAULT_VOCAB_SIZE
from neobert.errors import UserError
from neobert.inference.embed import EmbedSettings
from neobert.inference.mlm_loss import LossSettings
from neobert.inference.model import DTYPES
from neobert.inference.pseudo_perplexity import ScoreSettings
from neobert.model.pooling import POOLING
from neobert.weights.encoder_weights import WEIGHTS

ROOT = SCRIPTS.parent
BLOCKED = ("torch", "transformers", "datasets", "pyarrow", "accelerate", "tokenizers", "safetensors")

ALL_IN_ONE = f"""
import contextlib, io, json, runpy, sys
for name in {BLOCKED!r}:
    sys.modules[name] = None  # An import of it is an error.
from neobert.commands.registry import main
answers = []
for words in json.load(sys.stdin):
    sys.argv, said = words, io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main() if words[0] == "neobert" else runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        answers.append([ended.code, said.getvalue()])
print(json.dumps(answers))
"""

WRONG = {
    "contrastive/finetune.py": ["CONFIG"],
    "finetuning/finetune.py": ["CONFIG"],
    "contrastive/preprocess.py": ["CONFIG"],
    "pretraining/adapt.py": ["x", "--text", "x", "--output", "x", "--config", "CONFIG"],
    "pretraining/longer_seq.py": ["CONFIG", "--checkpoint", "x", "--max-length", "9"],
    "pretraining/preprocess.py": ["CONFIG"],
    "pretraining/pretrain.py": ["CONFIG"],
    "evaluation/run_glue.py": ["CONFIG"],
    "experiments/compare.py": ["PLAN", "--data", "x"],
    "experiments/yardstick.py": ["CONFIG", "--data", "x"],
    "benchmark.py": ["--config", "CONFIG"],
    "kill_storm.py": ["STORM", "trainer.max_stepz=3"],
    "pipeline.py": ["PIPELINE"],
}
"""Scripts that read a config, with one in which a key is misspelled."""


Answer = tuple[int, str]


def ask(calls: list[list[str]]) -> list[Answer]:
    """Exit code and output of each call, all in one process that cannot import the libraries."""
    done = subprocess.run(
        [sys.executable, "-c", ALL_IN_ONE],
        input=json.dumps(calls),
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "COLUMNS": "1000"},
    )
    assert done.returncode == 0, done.stderr
    answers = [(code, said) for code, said in json.loads(done.stdout)]
    assert len(answers) == len(calls)
    return answers


@pytest.fixture(scope="module")
def helped() -> dict[str, Answer]:
    """What scripts, by their path, and commands, by their name, say to `--help`."""
    scripts = [str(SCRIPTS / command.script) for command in COMMANDS.values() if command.script is not None]
    calls = [*([script, "--help"] for script in scripts), *(["neobert", name, "--help"] for name in COMMANDS)]
    return dict(zip([*scripts, *COMMANDS], ask(calls)))


def test_help_needs_no_library(helped: dict[str, Answer]) -> None:
    assert len(helped) > 60
    assert {name: said for name, (code, said) in helped.items() if code != 0} == {}
    assert all(said.startswith("usage: ") for _, said in helped.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_script_is_its_command(name: str, helped: dict[str, Answer]) -> None:
    command = COMMANDS[name]
    if command.script is None:
        return
    path = SCRIPTS / command.script
    imported, called = "from neobert.commands.registry import run_command", f'    run_command("{name}")'
    assert path.read_text().split("\n")[1:] == ["", imported, "", 'if __name__ == "__main__":', called, ""]
    script, own = helped[str(path)][1], helped[name][1]
    assert script.replace(f"python {path}", f"neobert {name}") == own


def test_every_script_is_a_command() -> None:
    scripts = [command.script for command in COMMANDS.values() if command.script is not None]
    scripts += [script for command in COMMANDS.values() for script in command.others]
    assert sorted(scripts) == sorted(str(path.relative_to(SCRIPTS)) for path in SCRIPTS.rglob("*.py"))


def test_a_typo_in_a_config_needs_no_library(tmp_path: Path) -> None:
    (tmp_path / "CONFIG").write_text(
        "dataset: {path: x}\ntokenizer: {train: true}\ntrainer: {max_stepz: 3, max_steps: 1}\n"
    )
    (tmp_path / "PLAN").write_text("config: CONFIG\nruns: {one: {}}\n")
    (tmp_path / "PIPELINE").write_text(
        f"output: x\nstages: [{{name: one, run: pretrain, config: {tmp_path}/CONFIG}}]\n"
    )
    calls = [
        [str(SCRIPTS / script), *(str(tmp_path / word) if word.isupper() else word for word in words)]
        for script, words in WRONG.items()
    ]
    for (code, said), script in zip(ask(calls), WRONG):
        assert (code, "trainer.max_stepz: unknown key" in said) == (2, True), (script, said)


def test_the_list_of_commands() -> None:
    (code, said), (code_of_none, usage), (code_of_typo, error), (_, far) = ask(
        [["neobert", "--help"], ["neobert"], ["neobert", "mlm_los"], ["neobert", "xyzzy"]]
    )
    assert (code, code_of_none, code_of_typo) == (0, 2, 2)
    assert said == usage
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.help)}$", said, re.M)
    assert error == "error: mlm_los: there is no such command; did you mean mlm-loss? `neobert --help` lists them\n"
    assert far == "error: xyzzy: there is no such command; `neobert --help` lists them\n"


def test_the_package_is_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "neobert", "config", "copy", "quickstart"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "quickstart copied to quickstart.yaml\n"), done.stderr
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"neobert": "neobert.commands.registry:main"}
    assert project["tool"]["setuptools"]["package-data"]["*"] == ["*.yaml"]


@pytest.mark.parametrize(
    ("script", "settings", "fields"),
    [
        ("embed.py", EmbedSettings(), ["batch_tokens", "chunk_texts"]),
        ("evaluation/mlm_loss.py", LossSettings(), ["batch_tokens", "mlm_probability", "min_length", "piece_chars"]),
        ("evaluation/pseudo_perplexity.py", ScoreSettings(max_length=9), ["batch_tokens", "bias_documents"]),
        ("contrastive/mine_negatives.py", MineSettings(), ["num_negatives", "margin", "skip"]),
    ],
)
def test_help_says_the_defaults_that_hold(
    script: str, settings: Any, fields: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """They are written out, since the settings themselves are imported with the libraries."""
    assert call(script, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields:
        flag = "--" + field.replace("_", "-")
        assert re.search(rf"  ?{flag} [A-Z_]+ [^-]*default {getattr(settings, field)}\b", text), (flag, text)


def test_names_that_help_writes_out_are_those_of_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(re.findall(r"\w+", POOLING_HELP)) >= set(POOLING)
    actions = {action.dest: action for action in build_model_parser("", "")._actions}
    assert actions["dtype"].choices == ["auto", *DTYPES]
    assert actions["weights"].choices == list(WEIGHTS)
    assert tuple(RUNS) == CONTESTANTS
    assert call("pretraining/train_tokenizer.py", "--help") == 0
    assert f"default: {DEFAULT_VOCAB_SIZE}" in capsys.readouterr().out


class _Typo(UserError):
    pass


@pytest.mark.parametrize(
    ("error", "settings", "code", "said"),
    [
        (_Typo("key: wrong"), {}, 2, "error: key: wrong"),
        (_Typo("s3://user:hunter2@host/x is not there"), {}, 2, "error: s3://<hidden:credentials>@host/x is not there"),
        (ValueError("--flag: wrong"), {"also": (ValueError,)}, 2, "error: --flag: wrong"),
        (FileNotFoundError(2, "No such file", "x"), {"also": (OSError,)}, 2, "error: x: No such file"),
        (
            OSError(28, "No space left on device", "x"),
            {"resumes": True},
            2,
            "error: x: No space left on device; fix that, and the same command resumes where it stopped",
        ),
        (KeyboardInterrupt(), {}, 130, "stopped"),
        (KeyboardInterrupt(), {"resumes": True}, 130, "stopped; the same command resumes where it stopped"),
    ],
)
def test_one_way_out(
    error: BaseException, settings: dict[str, Any], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.run(main, **settings)
    assert (ended.value.code, capsys.readouterr().err) == (code, said + "\n")


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)


def test_errors_are_printed_in_one_file() -> None:
    sources = {path: path.read_text() for path in (ROOT / "neobert").rglob("*.py")}
    assert [path.name for path, text in sources.items() if '"error: ' in text] == ["cli.py"]
    # What may quote an address is printed by `cli.say`, which hides what signs it.
    printed = {str(path.relative_to(ROOT / "neobert")) for path, text in sources.items() if "file=sys.stderr" in text}
    assert printed == {"cli.py", "data/store/prepare.py"}


def test_an_error_says_how_the_command_ends(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise Stopped("numbers")

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == cli.EXIT_CODES["numbers"] == 76
    assert "error: the run stopped early (numbers)" in capsys.readouterr().err


def test_a_tokenizer_is_not_written_over_another(
    tokenizer_folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tokenizer_folder / "tokenizer.json").read_bytes()
    assert call("pretraining/train_tokenizer.py", "--input", corpus, "--output", tokenizer_folder) == 2
    assert "holds a tokenizer already" in capsys.readouterr().err
    assert (tokenizer_folder / "tokenizer.json").read_bytes() == before
