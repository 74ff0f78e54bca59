"""Pairs made on the spot, and the config of a contrastive run that takes a second."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from devices import DEVICE, KEYS
from small_corpus import OBJECTS, SUBJECTS, VERBS

from neobert.config.load import parse_config
from neobert.config.schema import Config
from neobert.contrastive.prepare_sets import prepare

NUM_PAIRS = 60
Contrastive = Callable[..., Config]


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def pair_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files pairs.jsonl (some rows with negatives), scored.jsonl, labelled.jsonl and texts.jsonl."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = random.Random(5)
    pairs, scored, labelled, texts = [], [], [], []
    for number in range(NUM_PAIRS):
        subject, verb, thing = rng.choice(SUBJECTS), rng.choice(VERBS), rng.choice(OBJECTS)
        row: dict[str, object] = {"anchor": f"{subject} {verb} {thing} {number}", "positive": f"{thing}, {number}"}
        if number % 3:
            row["negatives"] = [f"{rng.choice(OBJECTS)} not {number}"] * (number % 3)
        pairs.append(row)
        other = rng.choice(SUBJECTS)
        scored.append({"sentence1": f"{subject} {verb}", "sentence2": f"{other} {verb}", "score": float(number % 6)})
        labelled.append({"text": f"{subject} {verb} {thing}", "label": verb})
        texts.append({"text": f"{subject} {verb} {thing}. " * (1 + number % 3)})
    for name, rows in (("pairs", pairs), ("scored", scored), ("labelled", labelled), ("texts", texts)):
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


def make_config(files: Path, sets: Path, tokenizer: Path, output_dir: Path, *overrides: str) -> Config:
    base = [
        "task=contrastive",
        "seed=3",
        "model.hidden_size=32",
        "model.num_hidden_layers=2",
        "model.num_attention_heads=2",
        "model.intermediate_size=48",
        "model.max_position_embeddings=64",
        f"dataset.path={sets}",
        f"dataset.name={files}/pairs.jsonl",
        "dataset.max_seq_length=32",
        "dataset.eval_samples=8",
        f"tokenizer.path={tokenizer}",
        "optimizer.lr=1e-2",
        "scheduler.warmup_steps=2",
        "trainer.max_steps=12",
        "trainer.per_device_train_batch_size=8",
        "trainer.mixed_precision=no",
        "trainer.logging_steps=3",
        "trainer.eval_steps=4",
        "trainer.save_steps=4",
        "trainer.save_total_limit=null",
        *KEYS[DEVICE],
        f"trainer.output_dir={output_dir}",
    ]
    start = "contrastive.pretrained_checkpoint_dir" in " ".join(overrides)
    base += [] if start else ["contrastive.allow_random_weights=true"]
    return parse_config("", [*base, *overrides])


@pytest.fixture(scope="session")
def prepared(pair_files: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dataset.path` with the four files as sets."""
    sets = tmp_path_factory.mktemp("prepared")
    for name in ("pairs", "scored", "labelled", "texts"):
        override = f"dataset.name={pair_files}/{name}.jsonl"
        prepare(make_config(pair_files, sets, tokenizer_folder, sets / "run", override))
    return sets


@pytest.fixture(scope="session")
def contrastive(pair_files: Path, prepared: Path, tokenizer_folder: Path) -> Contrastive:
    """`contrastive(output_dir, "trainer.max_steps=3", ...)`; without a checkpoint it starts from random weights."""

    def build(output_dir: Path, *overrides: str) -> Config:
        return make_config(pair_files, prepared, tokenizer_folder, output_dir, *overrides)

    return build


@pytest.fixture(scope="session")
def all_sets(pair_files: Path) -> str:
    """An override that trains on pairs, scored pairs and labelled texts in turn."""
    names = ", ".join(f"{{name: {pair_files}/{name}.jsonl}}" for name in ("pairs", "scored", "labelled"))
    return f"contrastive.sets=[{names}]"
