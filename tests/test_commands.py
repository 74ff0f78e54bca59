"""Every script answers `--help` and a wrong config without its libraries, and ends through one function."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from calls import SCRIPTS, call

from neobert import cli
from neobert.benchmark.against import RUNS
from neobert.benchmark.settings import CONTESTANTS
from neobert.contrastive.mine import MineSettings
from neobert.data.tokenizer import DEFAULT_VOCAB_SIZE
from neobert.errors import UserError
from neobert.inference.command_line import POOLING_HELP, model_parser
from neobert.inference.embed import EmbedSettings
from neobert.inference.load import DTYPES
from neobert.inference.mlm_loss import LossSettings
from neobert.inference.pseudo_perplexity import ScoreSettings
from neobert.model.pooling import POOLING
from neobert.weights.load import WEIGHTS

ROOT = SCRIPTS.parent
BLOCKED = ("torch", "transformers", "datasets", "pyarrow", "accelerate", "tokenizers", "safetensors")

ALL_IN_ONE = f"""
import json, runpy, sys
for name in {BLOCKED!r}:
    sys.modules[name] = None  # An import of it is an error.
for words in json.load(sys.stdin):
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        print("ENDED", words[0], ended.code, flush=True)
"""

WRONG = {
    "contrastive/finetune.py": ["CONFIG"],
    "contrastive/preprocess.py": ["CONFIG"],
    "pretraining/longer_seq.py": ["CONFIG", "--checkpoint", "x", "--max-length", "9"],
    "pretraining/preprocess.py": ["CONFIG"],
    "pretraining/pretrain.py": ["CONFIG"],
    "experiments/compare.py": ["PLAN", "--data", "x"],
    "experiments/yardstick.py": ["CONFIG", "--data", "x"],
    "benchmark.py": ["--config", "CONFIG"],
    "kill_storm.py": ["STORM", "trainer.max_stepz=3"],
    "pipeline.py": ["PIPELINE"],
}
"""Scripts that read a config, with one in which a key is misspelled."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What all scripts say to `--help`, then to a config with a typo, in one process without the libraries."""
    folder = tmp_path_factory.mktemp("typo")
    (folder / "CONFIG").write_text(
        "dataset: {path: x}\ntokenizer: {train: true}\ntrainer: {max_stepz: 3, max_steps: 1}\n"
    )
    (folder / "PLAN").write_text("config: CONFIG\nruns: {one: {}}\n")
    (folder / "PIPELINE").write_text(f"output: x\nstages: [{{name: one, run: pretrain, config: {folder}/CONFIG}}]\n")
    scripts = sorted(SCRIPTS.rglob("*.py"))
    calls = [[str(path), "--help"] for path in scripts]
    for script, words in WRONG.items():
        given = [str(folder / word) if word.isupper() else word for word in words]
        calls.append([str(SCRIPTS / script), *given])
    command = [sys.executable, "-c", ALL_IN_ONE]
    done = subprocess.run(command, input=json.dumps(calls), cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(scripts) > 30
    return done.stdout + done.stderr


def test_help_needs_no_library(told: str) -> None:
    helped = set(re.findall(rf"^ENDED {SCRIPTS}/(\S+) 0$", told, re.M))
    assert helped == {str(path.relative_to(SCRIPTS)) for path in SCRIPTS.rglob("*.py")}


def test_a_typo_in_a_config_needs_no_library(told: str) -> None:
    assert set(re.findall(rf"^ENDED {SCRIPTS}/(\S+) 2$", told, re.M)) == set(WRONG)
    assert len(re.findall(r"trainer\.max_stepz: unknown key", told)) == len(WRONG)


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
    actions = {action.dest: action for action in model_parser("")._actions}
    assert actions["dtype"].choices == list(DTYPES)
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


def test_every_script_ends_through_one_function() -> None:
    for path in SCRIPTS.rglob("*.py"):
        text = path.read_text()
        assert "    cli.run(" in text, path
        assert "sys.exit" not in text, path
    # What may quote an address is printed by `cli.say`, which hides what signs it.
    printed = [path for path in (ROOT / "neobert").rglob("*.py") if "file=sys.stderr" in path.read_text()]
    assert {str(path.relative_to(ROOT / "neobert")) for path in printed} == {
        "benchmark/lives.py",
        "cli.py",
        "config/command_line.py",
        "data/store/prepare.py",
        "output.py",
    }


def test_a_tokenizer_is_not_written_over_another(
    tokenizer_folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tokenizer_folder / "tokenizer.json").read_bytes()
    assert call("pretraining/train_tokenizer.py", "--input", corpus, "--output", tokenizer_folder) == 2
    assert "holds a tokenizer already" in capsys.readouterr().err
    assert (tokenizer_folder / "tokenizer.json").read_bytes() == before
