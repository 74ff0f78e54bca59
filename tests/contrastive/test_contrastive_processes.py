"""Two processes train on the pairs one process would, against the same negatives, with equal results."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import run_in_two
from safetensors.torch import load_file

from neobert.cli import EXIT_CODES
from neobert.config.schema import Config
from neobert.contrastive.finetune import finetune


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def launch(folder: Path, config: Config) -> None:
    printed = run_in_two(lambda: EXIT_CODES[finetune(config).reason], folder)
    assert [text.count("budget") for text in printed] == [1, 0], "only one process speaks"


def test_two_processes_equal_one(contrastive: Callable[..., Config], tmp_path: Path, all_sets: str) -> None:
    one, two, on = tmp_path / "one", tmp_path / "two", tmp_path / "on"
    batch = ["trainer.global_batch_size=8", "trainer.max_steps=8", "dataset.name=null", all_sets, "dataset.alpha=0"]
    batch += ["contrastive.both_directions=true", "contrastive.learn_temperature=true"]
    batch += ["contrastive.hard_negative_weight=0.5", "contrastive.num_hard_negatives=2", "optimizer.lr=1e-3"]
    # Embeddings that are apart from each other: among nearly equal ones rounding grows from step to step.
    batch += ["model.embedding_init_range=0.5", "model.decoder_init_range=0.2", "optimizer.eps=1e-4"]
    finetune(contrastive(one, *batch))
    launch(tmp_path, contrastive(two, *batch, "trainer.per_device_train_batch_size=2"))
    check_equal(one, two, after=0)
    resume = f"trainer.resume_from_checkpoint={two / 'checkpoints' / '4'}"
    finetune(contrastive(on, *batch, resume))
    check_equal(one, on, after=4)
    kinds = {x["num_tokens"] for x in lines(one, "step")}
    assert len(kinds) > 2, "several sets were drawn"


@pytest.mark.parametrize(
    "more",
    [
        ["contrastive.pooling=tokens", "contrastive.both_directions=true"],
        pytest.param(
            ["contrastive.hard_negative_weight=0.5", "contrastive.num_hard_negatives=2"], marks=pytest.mark.full
        ),
        pytest.param(["optimizer.name=normuon", "contrastive.matryoshka_dims=[8]"], marks=pytest.mark.full),
    ],
)
def test_two_processes_with_sharded_weights_equal_one(
    contrastive: Callable[..., Config], tmp_path: Path, all_sets: str, more: list[str]
) -> None:
    """Two rows of a process are in the encoder at a time, so each block is gathered several times in a step."""
    one, two = tmp_path / "one", tmp_path / "two"
    batch = [*more, "trainer.global_batch_size=8", "trainer.max_steps=4", "dataset.name=null"]
    batch += [all_sets, "dataset.alpha=0", "optimizer.lr=1e-3"]
    batch += ["model.embedding_init_range=0.5", "model.decoder_init_range=0.2", "optimizer.eps=1e-4"]
    finetune(contrastive(one, *batch))
    launch(tmp_path, contrastive(two, *batch, "trainer.per_device_train_batch_size=2", "trainer.parallel=fsdp2"))
    check_equal(one, two, after=0)
    assert (two / "checkpoints/4/optimizer").is_dir(), "which only shards have"
    weights = [load_file(run / "checkpoints/4/model.safetensors") for run in (one, two)]
    torch.testing.assert_close(*weights, atol=1e-5, rtol=0)


def check_equal(one: Path, other: Path, *, after: int) -> None:
    for a, b in zip(lines(one, "step")[after:], lines(other, "step"), strict=True):
        for exact in ("step", "num_tokens", "num_targets", "batch_digest"):
            assert a[exact] == b[exact]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert lines(one, "eval")[-1]["score"] == pytest.approx(lines(other, "eval")[-1]["score"], abs=1e-3)
