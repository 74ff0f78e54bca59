"""Small corpora of every kind, a word tokenizer whose ids are easy to read, and a plain mask policy."""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from neobert.config.schema import (
    Config,
    DatacollatorSection,
    DatasetSection,
    TokenizerSection,
    TrainerSection,
)
from neobert.data.pipeline import DataPipeline, Reader, build_data
from neobert.data.tokenizer import SPECIAL_TOKENS, Tokenizer

disable_progress_bars()

NUM_WORDS = 400


@dataclass(frozen=True, kw_only=True)
class PlainPolicy:
    """Hides the maskable tokens with the smallest words, always as [MASK]."""

    mask_id: int
    probability: float = 0.25
    is_causal = False

    def corrupt(self, tokens, words, offset, *, step=0):
        maskable = np.flatnonzero(tokens >= len(SPECIAL_TOKENS))
        count = int(self.probability * len(maskable) + offset)
        selected = np.sort(maskable[np.argsort(words[maskable], kind="stable")[:count]])
        corrupted = tokens.copy()
        corrupted[selected] = self.mask_id
        return corrupted, selected

    def max_targets(self, num_slots):
        return int(np.ceil(self.probability * num_slots)) + 1


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """One token a word: `w7` is id 12."""
    words = [*SPECIAL_TOKENS.values(), *(f"w{n}" for n in range(NUM_WORDS))]
    backend = Backend(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=SPECIAL_TOKENS["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS))


@pytest.fixture(scope="session")
def policy(tokenizer: Tokenizer) -> PlainPolicy:
    return PlainPolicy(mask_id=tokenizer.mask_id)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents of 1 to 90 words; document n repeats word n, so that every token says where it is from."""
    sizes = np.random.default_rng(0).integers(1, 90, size=150)
    return [" ".join([f"w{n}"] * int(size)) for n, size in enumerate(sizes)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    lines = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(lines))
    return path


def write_shards(folder: Path, texts: list[str], pattern: str, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        part = texts[len(texts) * number // count : len(texts) * (number + 1) // count]
        path = folder / pattern.format(number)
        if path.suffix == ".parquet":
            pq.write_table(pa.table({"text": part}), path, row_group_size=10)
        elif path.suffix == ".txt":
            path.write_text("".join(f"{text}\n" for text in part))
        elif path.suffix == ".csv":
            path.write_text("id,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(part)))
        else:
            write_jsonl(path, part)
    return folder


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizer: Tokenizer) -> dict[str, Path]:
    """The same documents as every kind of source."""
    root = tmp_path_factory.mktemp("corpora")
    Dataset.from_dict({"text": texts}).save_to_disk(root / "text_indexed")
    Dataset.from_dict({"input_ids": tokenizer.encode_batch(texts)}).save_to_disk(root / "indexed")
    return {
        "indexed": root / "indexed",
        "text_indexed": root / "text_indexed",
        "jsonl": write_shards(root / "jsonl", texts, "part-{}.jsonl", 2),
        "jsonl.gz": write_shards(root / "gz", texts, "part-{}.jsonl.gz", 7),
        "parquet": write_shards(root / "parquet", texts, "part-{}.parquet", 3),
        "jsonl.zst": write_shards(root / "zst", texts, "part-{}.jsonl.zst", 4),
        "text": write_shards(root / "plain", texts, "part-{}.txt", 2),
        "csv": write_shards(root / "csv", texts, "part-{}.csv", 3),
        "half": write_shards(root / "half", texts[75:], "part-{}.jsonl.gz", 1),
    }


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """A small config; keywords set `dataset` fields, except those of the other sections named here."""

    def make(**values: object) -> Config:
        sections = {
            "trainer": ("per_device_train_batch_size", "per_device_eval_batch_size", "enforce_full_packed_batches"),
            "datacollator": ("pack_sequences", "pad_to_multiple_of"),
            "tokenizer": ("truncation",),
        }
        chosen = {s: {n: values.pop(n) for n in names if n in values} for s, names in sections.items()}
        chosen["trainer"] |= {n: values.pop(n) for n in ("eval_max_batches", "eval_seed") if n in values}
        small = {
            "max_seq_length": 32,
            "min_length": 1,
            "num_lanes": 3,
            "window_documents": 16,
            "max_document_chars": 150,
            "num_workers": 0,
        }
        dataset = replace(DatasetSection(), **(small | values))
        return Config(
            seed=5,
            dataset=dataset,
            tokenizer=TokenizerSection(**chosen["tokenizer"]),
            datacollator=DatacollatorSection(**chosen["datacollator"]),
            trainer=TrainerSection(
                **({"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4} | chosen["trainer"])
            ),
        )

    return make


@pytest.fixture
def make_data(tmp_path: Path, tokenizer: Tokenizer, policy: PlainPolicy) -> Callable[..., DataPipeline]:
    """`build_data` with the small tokenizer and 24 rows a step."""

    def make(config: Config, *, rank: int = 0, world: int = 1, rows_per_step: int = 24) -> DataPipeline:
        return build_data(
            config,
            tokenizer,
            Reader(rows_per_step=rows_per_step, prepared_dir=tmp_path / "prepared", rank=rank, world=world),
            train_masks=policy,
            eval_masks=policy,
        )

    return make
