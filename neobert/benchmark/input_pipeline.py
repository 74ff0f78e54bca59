"""How fast text becomes training batches, and how full they are: this pipeline against a plain one.

The plain one is what a training script without a data room does: `datasets` tokenises with `map`, documents come in
file order, and a collator packs those of one batch greedily and masks them with torch. Both make batches of the same
shape from the same files with the same tokenizer, in turn within one process, and only real tokens count. A measurement
must be long against the 1,000 documents that `map` tokenises at once and the batches kept ready here: some million
tokens. "No thread" makes batches in the calling thread, as the plain one does; in training they are made beside it.

| mode | here | plain |
|---|---|---|
| streamed | text is tokenised in the lanes | `load_dataset(streaming=True).map(...)` |
| on disk | `dataset.streaming: false`, indexed | `load_dataset(...).map(...)`, cached on disk |
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars, load_dataset

from neobert.config.schema import Config
from neobert.data.pipeline import Reader
from neobert.data.rows.lanes import IntArray
from neobert.data.tokenizer import Tokenizer
from neobert.train.build import build_config_data


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSpeed:
    """One measured run over a number of batches."""

    tokens_per_second: float
    fill: float
    """Fraction of the slots that hold real tokens."""


def measure(batches: Generator[tuple[int, int], None, None], num_batches: int) -> InputSpeed:
    """The speed of (real tokens, slots) pairs; the first batch, which opens files, is not counted. Closes `batches`."""
    with closing(batches):
        next(batches)
        start = time.perf_counter()
        tokens = slots = 0
        for _ in range(num_batches):
            real, size = next(batches)
            tokens, slots = tokens + real, slots + size
        return InputSpeed(tokens_per_second=tokens / (time.perf_counter() - start), fill=tokens / slots)


def our_batches(config: Config, tokenizer: Tokenizer, folder: Path) -> Generator[tuple[int, int], None, None]:
    """Steps of one micro-batch each from the real pipeline, with its threads."""
    reader = Reader(rows_per_step=config.trainer.micro_batch_rows, prepared_dir=folder)
    data = build_config_data(config, tokenizer, reader)
    loader = data.loader()
    try:
        for step in loader:
            yield step.counts.num_tokens, step.counts.num_slots
    finally:
        loader.close()


def plain_batches(
    config: Config, tokenizer: Tokenizer, path: str, cache_dir: Path, *, streaming: bool
) -> Generator[tuple[int, int], None, None]:
    """Documents in file order, packed greedily within one batch of documents and masked with torch."""
    dataset: Any = load_dataset("json", data_files=path, split="train", streaming=streaming, cache_dir=str(cache_dir))
    column = config.dataset.text_column or "text"

    def encode(batch: dict[str, list[str]]) -> dict[str, list[IntArray]]:
        return {"input_ids": tokenizer.encode_batch(batch[column])}

    extra = {} if streaming else {"keep_in_memory": False}
    tokenised = dataset.map(encode, batched=True, remove_columns=list(next(iter(dataset))), **extra)
    rows, length = config.trainer.micro_batch_rows, config.dataset.max_seq_length
    waiting: list[list[int]] = []
    while True:
        for example in tokenised:
            ids = list(example["input_ids"])
            waiting += [ids[at : at + length - 2] for at in range(0, len(ids), length - 2)]
            packed = _pack_greedily(waiting, rows, length, tokenizer)
            if packed is not None:
                waiting = []
                yield _mask(packed, config.datacollator.mlm_probability, tokenizer)


def _pack_greedily(pieces: list[list[int]], rows: int, length: int, tokenizer: Tokenizer) -> torch.Tensor | None:
    """`[rows, length]` when the pieces need more rows than that: each joins the last row or starts a new one."""
    if sum(len(piece) + 2 for piece in pieces) < rows * length // 2:
        return None
    packed: list[list[int]] = [[]]
    for piece in pieces:
        segment = [tokenizer.cls_id, *piece, tokenizer.sep_id]
        if len(packed[-1]) + len(segment) > length:
            packed.append([])
        packed[-1] += segment
    if len(packed) <= rows:
        return None
    ids = torch.full((rows, length), tokenizer.pad_id)
    for number, row in enumerate(packed[:rows]):
        ids[number, : len(row)] = torch.tensor(row)
    return ids


def _mask(ids: torch.Tensor, probability: float, tokenizer: Tokenizer) -> tuple[int, int]:
    real = ids != tokenizer.pad_id
    specials = torch.isin(ids, torch.tensor(sorted(tokenizer.special_ids)))
    chosen = torch.bernoulli(torch.full(ids.shape, probability)).bool() & ~specials
    ids[chosen & (torch.rand(ids.shape) < 0.8)] = tokenizer.mask_id
    return int(real.sum()), ids.numel()


def compare(
    config: Config,
    tokenizer: Tokenizer,
    path: str,
    num_batches: int,
    repeats: int,
    say: Callable[[str], None] = print,
) -> dict[str, list[InputSpeed]]:
    """Measures both pipelines in both modes `repeats` times in turn, and prints medians and ratios."""
    disable_progress_bars()
    found: dict[str, list[InputSpeed]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for mode, streaming in (("streamed", True), ("on disk", False)):
                for name, num_workers in (("here", None), ("here, no thread", 0)):
                    section = replace(config.dataset, streaming=streaming, num_workers=num_workers)
                    batches = our_batches(replace(config, dataset=section), tokenizer, Path(folder))
                    found.setdefault(f"{mode}, {name}", []).append(measure(batches, num_batches))
                batches = plain_batches(config, tokenizer, path, Path(folder), streaming=streaming)
                found.setdefault(f"{mode}, plain", []).append(measure(batches, num_batches))
    say("| pipeline | tokens/s (median) | lowest - highest | fill | ratio |\n|---|---|---|---|---|")
    for mode in ("streamed", "on disk"):
        plain = statistics.median(f.tokens_per_second for f in found[f"{mode}, plain"])
        for name in (f"{mode}, here", f"{mode}, here, no thread", f"{mode}, plain"):
            rates = sorted(f.tokens_per_second for f in found[name])
            middle, fill = statistics.median(rates), statistics.median(f.fill for f in found[name])
            say(f"| {name} | {middle:,.0f} | {rates[0]:,.0f} - {rates[-1]:,.0f} | {fill:.2%} | {middle / plain:.2f} |")
    return found
