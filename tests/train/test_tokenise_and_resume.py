"""A run that streams, then continues from its checkpoint on the same data, tokenised to disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calls import call
from datasets import Dataset
from records import exact_steps, log_lines

from neobert.config.schema import Config
from neobert.data.store.arrow import ArrowTexts
from neobert.data.store.tokens import TokenStore
from neobert.errors import StartupError
from neobert.train.loop import pretrain


@pytest.mark.parametrize("more", [(), ("datacollator.pack_sequences=false",)], ids=["packed", "unpacked"])
def test_stream_tokenise_resume(
    tiny: Callable[..., Config], corpus: Path, tokenizer_folder: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    run, tokens = tmp_path / "run", tmp_path / "tokens"
    pretrain(tiny(run, "dataset.streaming=true", "trainer.max_steps=4", *more))
    flags = ["--dataset", str(corpus), "--tokenizer", str(tokenizer_folder), "--output", str(tokens)]
    assert call("pretraining/tokenize_dataset.py", *flags, "--max-length", "1024") == 0
    onto_disk = ["dataset.streaming=false", f"dataset.path={tokens}", "trainer.resume_from_checkpoint=latest"]
    result = pretrain(tiny(run, *onto_disk, "trainer.max_steps=8", *more))
    assert result.state.step == 8
    lines = log_lines(run, "step")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[4]["loss"] < lines[0]["loss"], "weights and optimizer continued"
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert "source_switched" in events
    evaluations = [line["num_targets"] for line in log_lines(run, "eval")]
    assert len(set(evaluations)) == 1, "the documents held out are the same ones"


@pytest.mark.parametrize("kind", ["tokens", "tokenised once"])
def test_runs_of_the_version_before_go_on_and_their_tokens_are_kept(
    tiny: Callable[..., Config], tokenizer_folder: Path, texts: list[str], tmp_path: Path, kind: str
) -> None:
    """Its fingerprints of indexed data were others."""
    source, run, whole = tmp_path / "texts", tmp_path / "run", tmp_path / "whole"
    Dataset.from_dict({"text": texts}).save_to_disk(source)
    if kind == "tokens":
        flags = ["--dataset", str(source), "--tokenizer", str(tokenizer_folder), "--output", str(tmp_path / "tokens")]
        assert call("pretraining/tokenize_dataset.py", *flags) == 0
        source = tmp_path / "tokens"
    data = [f"dataset.path={source}", "dataset.streaming=false", "trainer.eval_strategy=no"]
    with pytest.MonkeyPatch.context() as earlier:
        for store in (TokenStore, ArrowTexts):
            earlier.setattr(store, "_make_fingerprint", store._first_fingerprint)
        pretrain(tiny(run, *data, "trainer.max_steps=4", "scheduler.total_steps=12"))
    written = {path: path.stat().st_mtime_ns for path in run.glob("tokenized/**/*.arrow")}
    assert bool(written) == (kind == "tokenised once")
    more = ["trainer.resume_from_checkpoint=latest", "trainer.max_steps=6", "scheduler.total_steps=12"]
    pretrain(tiny(run, *data, *more))
    assert {path: path.stat().st_mtime_ns for path in written} == written
    pretrain(tiny(whole, *data, "trainer.max_steps=6", "scheduler.total_steps=12"))
    assert exact_steps(run) == exact_steps(whole)
    states = [json.loads((run / "checkpoints" / step / "train_state.json").read_text()) for step in "46"]
    assert states[0]["data_fingerprint"] != states[1]["data_fingerprint"]
    _edit_in_the_middle(source)
    with pytest.raises(StartupError, match="the data under this run changed"):
        pretrain(tiny(run, *data, *more[:1], "trainer.max_steps=8", "scheduler.total_steps=12"))


def _edit_in_the_middle(folder: Path) -> None:
    """Writes a folder of `save_to_disk` again, one document shorter by one."""
    rows: dict[str, list[Any]] = Dataset.load_from_disk(str(folder)).to_dict()
    column = "text" if "text" in rows else "input_ids"
    rows[column][1] = rows[column][1][:-1]
    for file in folder.glob("*.arrow"):
        file.unlink()
    Dataset.from_dict(rows).save_to_disk(folder)
