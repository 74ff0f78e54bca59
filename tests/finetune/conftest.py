"""Labelled rows made on the spot, and the config of a run on them that takes a second."""

import json
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from devices import DEVICE, KEYS
from small_corpus import OBJECTS, SUBJECTS, VERBS

from neobert.config.load import parse_config
from neobert.config.schema import Config

NUM_ROWS = 96
Labelled = Callable[..., Config]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def labelled_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of each kind: classes.jsonl, pairs.jsonl, numbers.jsonl, several.jsonl, words.jsonl."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = random.Random(7)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("classes", "pairs", "numbers", "several", "words")}
    for number in range(NUM_ROWS):
        subject, thing, verb = rng.choice(SUBJECTS), rng.choice(OBJECTS), VERBS[number % 3]
        text = f"{subject} {verb} {thing}"
        rows["classes"].append({"text": text, "label": verb})
        other = "again" if number % 2 else "never"
        rows["pairs"].append({"sentence1": text, "sentence2": other, "label": "same" if number % 2 else "other"})
        rows["numbers"].append({"sentence1": text, "sentence2": other, "score": float(number % 6) / 2})
        rows["several"].append({"text": text, "labels": [verb, "animal"] if number % 2 else [verb]})
        words = text.split()
        tags = ["B-who", *["I-who"] * (len(subject.split()) - 1)] + ["O"] * (len(words) - len(subject.split()))
        rows["words"].append({"tokens": words, "ner_tags": tags})
    for name, found in rows.items():
        write_rows(folder / f"{name}.jsonl", found)
    return folder


@pytest.fixture(scope="session")
def labelled(labelled_files: Path, tokenizer_folder: Path) -> Labelled:
    """`labelled(output_dir, "dataset.path=...", ...)`; it starts from random weights unless `finetune.model` is set."""
    base = [
        "task=finetune",
        "seed=3",
        "model.hidden_size=32",
        "model.num_hidden_layers=2",
        "model.num_attention_heads=2",
        "model.intermediate_size=48",
        "model.max_position_embeddings=64",
        "model.dropout_prob=0.1",
        f"dataset.path={labelled_files}/classes.jsonl",
        "dataset.max_seq_length=32",
        "dataset.eval_samples=24",
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
    ]

    def build(output_dir: Path, *overrides: str) -> Config:
        starts = any(text.startswith("finetune.model=") for text in overrides)
        random_start = [f"tokenizer.path={tokenizer_folder}", "finetune.allow_random_weights=true"]
        start = [] if starts else random_start
        return parse_config("", [*base, *start, f"trainer.output_dir={output_dir}", *overrides])

    return build
