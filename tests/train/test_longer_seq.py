"""longer_seq.py: the long documents in source order, the overrides that continue a run, and errors before any work."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from calls import call
from datasets import Dataset, DatasetDict, load_from_disk
from records import log_lines

from neobert.commands.longer_seq import longer_overrides
from neobert.config.load import config_to_yaml, load_config
from neobert.config.schema import Config
from neobert.data.pipeline import build_tokenizer
from neobert.data.source.inventory import NO_FILES
from neobert.data.source.spec import SourceSpec
from neobert.data.store.offline import PreparedSource
from neobert.train.loop import pretrain


@pytest.fixture(scope="module")
def run(tiny: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run.yaml` and the checkpoint of its run at step 3."""
    folder = tmp_path_factory.mktemp("longer")
    config = tiny(folder / "outputs/run", "trainer.max_steps=3", "trainer.save_steps=0", "trainer.eval_steps=0")
    (folder / "run.yaml").write_text(config_to_yaml(config))
    pretrain(config)
    return folder


@pytest.fixture
def start(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)

    def command(*flags: str) -> tuple[int, str, str]:
        words = [str(run / "run.yaml"), "--checkpoint", str(run / "outputs/run"), "--trainer.max_steps", "5", *flags]
        code = call("pretraining/longer_seq.py", *words)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


@pytest.fixture
def encoded(tiny: Callable[..., Config], tmp_path: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = build_tokenizer(tiny(tmp_path), None, tmp_path)
    return [tokens.tolist() for tokens in tokenizer.encode_batch(texts)]


def test_long_documents_in_source_order(start: Callable[..., tuple[int, str, str]], encoded: list[list[int]]) -> None:
    """Half of the length by default; several lengths make one folder each; `--prepare-only` trains nothing."""
    code, out, _ = start("--max-length", "256", "--max-length", "128", "--prepare-only")
    assert code == 0
    for length in (128, 256):
        long = [tokens for tokens in encoded if len(tokens) >= length // 2]
        assert 0 < len(long) < len(encoded)
        assert load_from_disk(f"tokenized_data/run-long/{length}")["train"]["input_ids"][:] == long
        assert f"run-long/{length}: {len(long)} documents with at least {length // 2} tokens" in out
    assert out.count("continue at") == 2
    assert not Path("outputs").exists()
    code, _, _ = start("--max-length", "128", "--min-length", "100", "--output", "mine", "--prepare-only")
    assert load_from_disk("mine/128")["train"]["input_ids"][:] == [tokens for tokens in encoded if len(tokens) >= 100]


def test_pieces_on_disk_are_whole_documents_again(
    start: Callable[..., tuple[int, str, str]], corpus: Path, tokenizer_folder: Path, encoded: list[list[int]]
) -> None:
    words = ["--dataset", str(corpus), "--tokenizer", str(tokenizer_folder), "--output", "cut", "--max-length", "32"]
    assert call("pretraining/tokenize_dataset.py", *words) == 0
    assert max(map(len, load_from_disk("cut")["input_ids"][:])) == 32
    assert start("--dataset.path", "cut", "--max-length", "128", "--prepare-only")[0] == 0
    long = [tokens for tokens in encoded if len(tokens) >= 64]
    assert load_from_disk("tokenized_data/run-long/128")["train"]["input_ids"][:] == long


def test_the_evaluation_split_stays_whole(
    start: Callable[..., tuple[int, str, str]], encoded: list[list[int]], tmp_path: Path
) -> None:
    rows = {"train": encoded[:100], "validation": encoded[100:120]}
    DatasetDict({name: Dataset.from_dict({"input_ids": part}) for name, part in rows.items()}).save_to_disk("both")
    assert start("--dataset.path", "both", "--max-length", "128", "--prepare-only")[0] == 0
    found = load_from_disk("tokenized_data/run-long/128")
    assert found["train"]["input_ids"][:] == [tokens for tokens in encoded[:100] if len(tokens) >= 64]
    assert found["validation"]["input_ids"][:] == encoded[100:120]


def test_overrides_that_continue_a_run(tiny: Callable[..., Config]) -> None:
    subset = [
        PreparedSource(
            folder=Path("long/256"),
            spec=SourceSpec(path=("x",)),
            train_split="train",
            eval_split=None,
            manifests={},
            inventory=NO_FILES,
        )
    ]
    old = tiny(Path("outputs/run"))
    same = ["dataset.streaming=false", "dataset.path=long/256", "dataset.max_seq_length=256"]
    arguments = {"checkpoint": Path("outputs/run/checkpoints/12"), "subset": subset, "max_length": 256}
    assert longer_overrides(old, old, rope_theta=40000.0, **arguments) == [
        "trainer.resume_from_checkpoint=outputs/run/checkpoints/12",
        "trainer.output_dir=outputs/run-256",
        *same,
        "model.max_position_embeddings=256",
        "model.rope_theta=40000.0",
        "trainer.resume_allow=[dataset.max_seq_length,model.max_position_embeddings,model.rope_theta]",
    ]
    roomy = tiny(Path("outputs/other"), "model.max_position_embeddings=512", "tokenizer.max_length=64")
    assert longer_overrides(roomy, roomy, rope_theta=None, **arguments) == [
        "trainer.resume_from_checkpoint=outputs/run/checkpoints/12",
        "trainer.output_dir=outputs/other",
        *same,
        "model.max_position_embeddings=512",
        "model.rope_theta=10000.0",
        "trainer.resume_allow=[dataset.max_seq_length]",
        "tokenizer.max_length=256",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-length", "64"), "--max-length: 64 is not longer than the checkpoint's dataset.max_seq_length = 64"),
        (
            ("--max-length", "128", "--trainer.max_steps", "3"),
            "trainer.max_steps: 3 is spent, the checkpoint is at step 3",
        ),
        (("--max-length", "128", "--rope-theta", "0"), "--rope-theta: 0.0 must be greater than 0"),
        (("--max-length", "128", "--min-length", "0"), "--min-length: 0 must be at least 1"),
        (("--max-length", "128", "--checkpoint", "nowhere"), "--checkpoint: nowhere is neither a checkpoint nor a run"),
    ],
)
def test_errors_come_before_any_work(
    start: Callable[..., tuple[int, str, str]], flags: tuple[str, ...], message: str
) -> None:
    code, _, err = start(*flags)
    assert code == 2
    assert message in err
    assert not Path("tokenized_data").exists()


def test_no_document_is_long_enough(start: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = start("--max-length", "100000", "--prepare-only")
    assert code == 2
    assert "with fewer than 50000 tokens" in err


def test_a_run_continues_at_four_times_the_length(start: Callable[..., tuple[int, str, str]], run: Path) -> None:
    """Weights, optimizer and step from the checkpoint; rows, positions and RoPE base of the longer run."""
    code, _, err = start(
        "--max-length",
        "256",
        "--rope-theta",
        "40000",
        "--dataset.eval_samples",
        "2",
        "--trainer.output_dir",
        "outputs/new",
    )
    assert code == 0, err
    new = Path("outputs/new")
    assert [line["step"] for line in log_lines(new, "step")] == [4, 5]
    config = load_config(new / "checkpoints" / "5" / "config.yaml")
    assert (config.dataset.max_seq_length, config.model.max_position_embeddings) == (256, 256)
    assert config.model.rope_theta == 40000.0
    state = json.loads((new / "checkpoints" / "5" / "train_state.json").read_text())
    assert state["step"] == 5
    first = log_lines(new, "step")[0]
    assert np.isfinite(first["loss"])
    assert first["loss"] < log_lines(run / "outputs/run", "step")[0]["loss"], "it did not start from random weights"
