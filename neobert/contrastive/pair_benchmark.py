"""What packing and cached gradients are worth: pairs per second and peak memory of whole training steps.

| variant | a step |
|---|---|
| `unpadded` | `--batch-size` pairs at once, texts side by side, as in training |
| `padded` | the same pairs, one text a row, every row as long as the longest text |
| `cached` | `--cached-batch-size` pairs, `--batch-size` of them at a time through the encoder (GradCache) |
| `whole` | `--cached-batch-size` pairs at once |
| `accumulated` | the same pairs, `--batch-size` at a time and compared with each other only: gradients add up |

Every variant runs in its own process, so that its peak is its own: what a step takes beyond model, optimizer and
data, of the allocator on a GPU, of resident memory on a CPU. That is more than tensors: freed memory that the C library
has not found a use for counts too. Losses are printed too: unpadded and padded, cached and whole match. `accumulated`
is what `cached` is to be compared with: gradients of all weights are held beside the activations of a chunk in both.
"""

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neobert.config.schema_contrastive import ContrastiveSection, PairSource
from neobert.contrastive.batches import PairCollator
from neobert.contrastive.pair_order import TrainSet
from neobert.contrastive.reading import open_source
from neobert.data.rows.collate import Collator
from neobert.data.rows.packing import SPECIALS_PER_SEGMENT
from neobert.data.rows.side_by_side import NoMasks
from neobert.errors import DataError
from neobert.inference.model import DTYPES, choose_device, load
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import choose_attention
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.objectives.contrastive import ContrastiveEncoder
from neobert.objectives.pair_batch import PairBatch
from neobert.train.hardware.device import resolve_precision
from neobert.train.hardware.memory import current_bytes, forget_peak, peak_bytes
from neobert.train.step import train_step
from neobert.types import PackedBatch, PackedRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One variant."""

    variant: str
    pairs_per_second: float
    peak_mib: float
    loss: float
    slots_per_token: float


class PaddedEncoder(ContrastiveEncoder):
    """The same on padded rows: what unpadded training is compared with."""

    def _embed_chunk(self, chunk: PackedBatch, lengths: Tensor) -> Tensor:
        hidden = self.encoder(chunk.input_ids, chunk.positions, chunk.segments)
        real = torch.arange(chunk.input_ids.shape[1], device=lengths.device) < lengths[:, None]
        slots = torch.arange(real.numel(), device=lengths.device).view(real.shape)[real]
        return self.pool(hidden.index_select(0, slots).float(), lengths)


def make_rows(args: argparse.Namespace, count: int) -> tuple[list[PackedRow], int, int]:
    """Rows of two texts each, the size of the vocabulary and the padding id."""
    if args.pairs is None:
        rng = np.random.default_rng(0)
        lengths = np.clip(rng.lognormal(np.log(args.median_length), 0.6, 2 * count), 2, args.max_length - 2).astype(int)
        texts = [rng.integers(5, args.vocab_size, length, dtype=np.int32) for length in lengths]
        return [_row(number, texts[2 * number : 2 * number + 2], 1, 2) for number in range(count)], args.vocab_size, 0
    tokenizer = load(args.model, device="cpu").tokenizer
    examples = list(islice(open_source(PairSource(name=args.pairs)).examples, count))
    if len(examples) < count:
        raise DataError(f"--pairs: {args.pairs} has {len(examples)} pairs, {count} are needed for a step")
    tokens = tokenizer.encode_batch([text for x in examples for text in (x.anchor, str(x.positive))])
    tokens = [ids[: args.max_length - SPECIALS_PER_SEGMENT] for ids in tokens]
    ids = (tokenizer.cls_id, tokenizer.sep_id)
    return [_row(n, tokens[2 * n : 2 * n + 2], *ids) for n in range(count)], tokenizer.size, tokenizer.pad_id


def _row(number: int, texts: Sequence[NDArray[np.int32]], cls_id: int, sep_id: int) -> PackedRow:
    return PackedRow(
        tokens=np.concatenate([np.array([cls_id, *text, sep_id], dtype=np.int32) for text in texts]),
        lengths=tuple(len(text) + SPECIALS_PER_SEGMENT for text in texts),
        documents=(number,) * len(texts),
        offsets=(0,) * len(texts),
        sources=(0,) * len(texts),
        key=number,
    )


def build_batch(rows: list[PackedRow], *, chunk_rows: int, pad_id: int, max_length: int, padded: bool) -> PairBatch:
    """The batch of a step; padded ones hold one text a row."""
    store: Any = None  # Pairs of `infonce` are read from their rows alone.
    pairs = TrainSet(
        key="", store=store, kind="infonce", first=0, anchor_prefix="", positive_prefix="", num_negatives=0
    )
    collate = PairCollator(
        sets=[pairs],
        chunk_rows=chunk_rows,
        max_seq_length=max_length,
        pad_id=pad_id,
        seed=0,
        masks=NoMasks(),
    )
    batch = collate(rows)
    if not padded:
        return batch
    texts = [
        replace(row, tokens=tokens, lengths=(len(tokens),), documents=(row.key,), offsets=(0,), sources=(0,))
        for row in rows
        for tokens in np.split(row.tokens, np.cumsum(row.lengths)[:-1])
    ]
    longest = max(len(text.tokens) for text in texts)
    one_a_row = Collator(
        policy=NoMasks(), seed=0, draw="document", max_seq_length=longest, max_segments=1, pad_id=pad_id
    )
    return replace(batch, chunks=(one_a_row(texts),))


def build_module(args: argparse.Namespace, vocab_size: int, pad_id: int, *, padded: bool) -> ContrastiveEncoder:
    """The model of `--model`, or one of the sizes in `args` with random weights."""
    device = choose_device(args.device)
    kind = PaddedEncoder if padded else ContrastiveEncoder
    attention = choose_attention("auto", device=device, dtype=DTYPES[args.dtype])
    if args.model is not None:
        loaded = load(args.model, device="cpu").module
        config = replace(loaded.encoder.config, dropout_prob=0.0)  # Variants are to have one and the same loss.
        module = kind(Encoder(config, attention), ContrastiveSection(), kernel=KERNELS["torch"])
        module.load_state_dict(loaded.state_dict())
        return module.to(device)
    config = ModelConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 64 or 1,
        intermediate_size=3 * args.hidden_size,
        max_position_embeddings=args.max_length,
        vocab_size=vocab_size,
        pad_token_id=pad_id,
    )
    torch.manual_seed(0)
    return kind(Encoder(config, attention), ContrastiveSection(), kernel=KERNELS["torch"]).to(device)


def measure(args: argparse.Namespace, variant: str) -> Measurement:
    """Steps of one variant; call it in its own process."""
    if args.threads:
        torch.set_num_threads(args.threads)
    count = args.batch_size if variant in ("unpadded", "padded") else args.cached_batch_size
    rows, vocab_size, pad_id = make_rows(args, count)
    padded = variant == "padded"
    chunk = count if variant == "whole" else args.batch_size
    step = chunk if variant == "accumulated" else count
    batches = [
        build_batch(rows[n : n + step], chunk_rows=chunk, pad_id=pad_id, max_length=args.max_length, padded=padded)
        for n in range(0, count, step)
    ]
    module = build_module(args, vocab_size, pad_id, padded=padded)
    device = next(module.parameters()).device
    batches = [batch.to(device) for batch in batches]
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, fused=True)
    seconds, losses = [], []
    small = build_batch(rows[:2], chunk_rows=2, pad_id=pad_id, max_length=args.max_length, padded=padded)
    train_step(module, optimizer, [small.to(device)], lr=0.0, scale=1.0)  # Makes room for the optimizer's state.
    before = _forget_peak(device)
    for _ in range(args.steps + 1):  # The first one warms up.
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
            result = train_step(module, optimizer, batches, lr=0.0, scale=1 / count)
        losses.append(float(result.loss_sum) / count)  # Waits for the device.
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()
    return Measurement(
        variant=variant,
        pairs_per_second=count / float(np.median(seconds[1:])),
        peak_mib=(peak - before) / 2**20,
        loss=losses[0],
        slots_per_token=sum(batch.num_slots for batch in batches) / sum(batch.num_tokens for batch in batches),
    )


def _forget_peak(device: torch.device) -> int:
    """Bytes in use; peaks count from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    forget_peak()
    return current_bytes()


def bind_dtype(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with `bf16` or `fp32` for `auto`, which is said."""
    device = choose_device(args.device)
    inner, outer = args.hidden_size, 3 * args.hidden_size
    if args.dtype == "auto" and args.model is not None:
        config = load(args.model, device="cpu").module.encoder.config
        inner, outer = config.hidden_size, config.intermediate_size
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    dtype, reason = resolve_precision(args.dtype, device.type, inner, outer)
    torch.set_num_threads(threads)
    print(f"products in {dtype}, {reason}")
    return argparse.Namespace(**{**vars(args), "dtype": dtype})


def run_benchmark(args: argparse.Namespace) -> None:
    """Prints one line for each variant.

    Raises:
        ValueError: the device is unknown or not here.
    """
    args = bind_dtype(args)  # Before a process is started.
    where = "beyond model, optimizer and data"
    print(f"{'variant':<11} {'pairs/s':>9} {'peak MiB':>9} {'slots/token':>12} {'loss':>9}   (peak {where})")
    context = multiprocessing.get_context("spawn")
    for variant in args.variants:
        with context.Pool(1) as pool:
            found = pool.apply(measure, (args, variant))
        print(
            f"{found.variant:<11} {found.pairs_per_second:>9.1f} {found.peak_mib:>9.0f} {found.slots_per_token:>12.2f} "
            f"{found.loss:>9.5f}"
        )
