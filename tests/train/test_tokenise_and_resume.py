"""A run that streams, then goes on from its checkpoint on the same data, tokenised to disk."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from calls import call
from records import log_lines

from neobert.config.schema import Config
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
    assert lines[4]["loss"] < lines[0]["loss"], "weights and optimizer went on"
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert "source_switched" in events
    evaluations = [line["num_targets"] for line in log_lines(run, "eval")]
    assert len(set(evaluations)) == 1, "the documents held out are the same ones"
