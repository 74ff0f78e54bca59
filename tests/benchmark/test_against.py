"""The comparison gives everybody the same tokens and masks, and its table says who is faster."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from children import run_forked

from neobert.benchmark.against import RUNS, AgainstSettings, SpeedResult, compare, describe, padded_inputs, prepare
from neobert.train.hardware import device
from neobert.types import IGNORE_INDEX


@pytest.fixture
def settings(tmp_path: Path, texts: list[str], tokenizer_folder: Path) -> AgainstSettings:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    shape = {"preset": "tiny", "length": 64, "rows": 2, "steps": 2, "warmup": 1}
    return AgainstSettings(text=str(text), tokenizer=str(tokenizer_folder), precision="fp32", **shape)  # type: ignore[arg-type]


def test_padding_shows_the_same_tokens_and_targets(settings: AgainstSettings) -> None:
    batch = prepare(settings).batches(settings, packed=False)[0]
    inputs = padded_inputs(batch)
    assert int(inputs["attention_mask"].sum()) == batch.num_tokens
    assert inputs["attention_mask"].sum(dim=1).max() == inputs["input_ids"].shape[1]
    labels = inputs["labels"][inputs["labels"] != IGNORE_INDEX]
    assert sorted(labels.tolist()) == sorted(batch.targets[batch.targets != IGNORE_INDEX].tolist())
    assert len(labels) == batch.num_targets


def test_packed_and_padded_steps_hold_about_as_many_tokens(settings: AgainstSettings) -> None:
    given = prepare(settings)
    packed, padded = (given.batches(settings, packed=way) for way in (True, False))
    mean = [sum(b.num_tokens for b in batches) / len(batches) for batches in (packed, padded)]
    assert mean[0] == pytest.approx(mean[1], rel=0.2)


def test_a_contestant_in_a_process_of_its_own(settings: AgainstSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", run_forked)
    table = compare(settings, ["ours"], rounds=1)
    assert [line.split("|")[1].strip() for line in table.splitlines()[4:]] == ["ours"]
    assert torch.get_num_threads() == 1


def test_contestants_take_turns(settings: AgainstSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, precisions = [], set()

    def run(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        turns.append(command[3])
        precisions.add(json.loads(command[4])["precision"])
        measured = {"tokens_per_second": 100.0 * len(turns), "peak_memory_bytes": 10**9}
        return subprocess.CompletedProcess(command, 0, f"a warning\n{json.dumps(measured)}\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    rates = {torch.float32: 1e9, torch.bfloat16: 2e9}
    monkeypatch.setattr(device, "measure_product", lambda rows, inner, outer, dtype: rates[dtype])
    table = compare(replace(settings, precision="auto"), ["ours", "transformers"], rounds=2)
    assert turns == ["ours", "transformers"] * 2
    assert precisions == {"bf16"}, "one choice for all"
    assert table.startswith("Products in bf16, auto: ")
    assert [line.split("|")[1].strip() for line in table.splitlines()[4:]] == ["ours", "transformers"]
    assert table.splitlines()[-1] == "| transformers | 300 | 200 - 400 | 1.50 | 1.00 GB | 1.00 |"


@pytest.mark.parametrize("name", ["reference", "transformers"])
def test_another_contestant(settings: AgainstSettings, name: str) -> None:
    """In this process: that each gets one of its own is seen above."""
    outcome = RUNS[name](settings, prepare(settings))
    assert outcome.tokens_per_second > 0
    assert outcome.peak_memory_bytes > 0


def test_ratios_are_to_the_first() -> None:
    slow = [SpeedResult(tokens_per_second=50.0, peak_memory_bytes=4 * 10**9)]
    table = describe(
        {"ours": [SpeedResult(tokens_per_second=100.0, peak_memory_bytes=10**9)], "other": slow}, base="ours"
    )
    assert table.splitlines()[-1] == "| other | 50 | 50 - 50 | 0.50 | 4.00 GB | 4.00 |"


def test_too_little_text_is_one_sentence(settings: AgainstSettings) -> None:
    Path(settings.text).write_text(json.dumps({"text": "short"}) + "\n")
    with pytest.raises(ValueError, match="give more text or ask for fewer steps"):
        prepare(settings)
