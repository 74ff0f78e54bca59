"""Our training step against a plain loop on transformers, and against our own reference paths, on the same text.

Documents of a JSONL file are tokenised once and cut into pieces that fit a row. Every contestant trains on the same
pieces with the same masks and the same number of pieces a step, so real tokens are equal and only the way differs:

    ours          packed rows, logits of the predicted tokens, attention per document, fused AdamW
    compiled      the same with compiled blocks
    reference     packed rows, logits of all tokens at once, one masked attention per row, AdamW one tensor at a time
    transformers  EuroBertForMaskedLM of the same shape: one piece a row, padded to the longest of the batch, logits of
                  all tokens, torch.optim.AdamW

Each runs in its own process, so that peak memory is its own, and they take turns. The first steps do not count.
"""

import dataclasses
import gzip
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import EuroBertConfig, EuroBertForMaskedLM

from neobert.benchmark.settings import PRESETS, AgainstSettings, StepSettings
from neobert.benchmark.step_batches import RowShape, Tokens, make_batches
from neobert.benchmark.step_time import RowSource, choose_clock, measure_step, peak_memory_bytes
from neobert.config.schema_data import TokenizerSection
from neobert.data.tokenizer import Tokenizer, load_tokenizer, padded_vocab_size
from neobert.model.config import ModelConfig
from neobert.train.build import build_mask_policy
from neobert.train.hardware.device import resolve_precision
from neobert.types import IGNORE_INDEX, PackedBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedResult:
    """What one contestant did."""

    tokens_per_second: float
    peak_memory_bytes: int


def read_pieces(settings: AgainstSettings, tokenizer: Tokenizer) -> list[Tokens]:
    """Pieces of the first documents, [CLS] and [SEP] around each, enough for all steps.

    Raises:
        ValueError: the text is too short.
    """
    needed = (settings.steps + settings.warmup + 2) * settings.rows * settings.length
    room = settings.length - 2
    pieces: list[Tokens] = []
    total = 0
    opener = gzip.open if settings.text.endswith(".gz") else open
    with opener(settings.text, "rt") as lines:
        while total < needed:
            texts = [json.loads(line)["text"] for line in itertools.islice(lines, 64)]
            if not texts:
                raise ValueError(
                    f"{settings.text}: {total} tokens, and {settings.warmup + settings.steps} steps need {needed}; "
                    "give more text or ask for fewer steps"
                )
            for ids in tokenizer.encode_batch(texts):
                parts = (ids[at : at + room] for at in range(0, len(ids), room))
                wrapped = [np.concatenate([[tokenizer.cls_id], part, [tokenizer.sep_id]]) for part in parts]
                pieces += [piece.astype(np.int32) for piece in wrapped]
                total += sum(map(len, wrapped))
    return pieces


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prepared:
    """The shape of the model and the text."""

    model: ModelConfig
    tokenizer: Tokenizer
    pieces: list[Tokens]

    def batches(self, settings: AgainstSettings, *, packed: bool) -> list[PackedBatch]:
        """The pieces in packed rows, or one to a row and as many of them a step."""
        average = sum(map(len, self.pieces)) / len(self.pieces)
        rows = settings.rows if packed else max(1, round(settings.rows * settings.length / average))
        shape = RowShape(rows=rows, length=settings.length, packed=packed)
        policy = build_mask_policy(self.tokenizer, 0.2, mask_all=False)
        return make_batches(self.pieces, shape, policy, pad_id=self.tokenizer.pad_id)


def prepare(settings: AgainstSettings) -> Prepared:
    """Reads what all contestants use."""
    tokenizer = load_tokenizer(TokenizerSection(path=settings.tokenizer))
    model = ModelConfig(
        **PRESETS[settings.preset],
        max_position_embeddings=settings.length,
        vocab_size=padded_vocab_size(None, tokenizer.size),
        pad_token_id=tokenizer.pad_id,
        tie_word_embeddings=False,
    )
    return Prepared(model=model, tokenizer=tokenizer, pieces=read_pieces(settings, tokenizer))


def run_ours(settings: AgainstSettings, prepared: Prepared, **changes: bool | str) -> SpeedResult:
    """Our step on packed rows, with settings of the step benchmark changed."""
    source = RowSource(
        model=prepared.model,
        batches=itertools.cycle(prepared.batches(settings, packed=True)),
        name=settings.text,
        real=False,
    )
    shared = {name: getattr(settings, name) for name in ("preset", "length", "rows", "precision", "steps", "warmup")}
    timing = measure_step(StepSettings(**{**shared, **changes}), source)
    return SpeedResult(tokens_per_second=timing.tokens_per_second, peak_memory_bytes=timing.peak_memory_bytes)


def run_reference(settings: AgainstSettings, prepared: Prepared) -> SpeedResult:
    """Our model without what makes it fast."""
    plain = {"all_positions": True, "plain_adamw": True}
    return run_ours(settings, prepared, attention="masked", kernel="reference", **plain)


def run_transformers(settings: AgainstSettings, prepared: Prepared) -> SpeedResult:
    """The loop that one writes with transformers."""
    torch.manual_seed(0)
    model = EuroBertForMaskedLM(_describe(prepared)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    batches = itertools.cycle(prepared.batches(settings, packed=False))
    tokens, seconds, clock = 0, 0.0, choose_clock(torch.device("cpu"))
    for number in range(settings.warmup + settings.steps):
        batch = next(batches)
        inputs = padded_inputs(batch)
        start = clock()
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number >= settings.warmup:
            seconds += clock() - start
            tokens += batch.num_tokens
    return SpeedResult(tokens_per_second=tokens / seconds, peak_memory_bytes=peak_memory_bytes(torch.device("cpu")))


def padded_inputs(batch: PackedBatch) -> dict[str, torch.Tensor]:
    """What transformers takes, cut to the longest piece of the batch."""
    longest = int((batch.segments.ids > 0).sum(dim=1).max())
    labels = torch.full(batch.input_ids.shape, IGNORE_INDEX, dtype=torch.int64).flatten()
    counted = batch.targets != IGNORE_INDEX
    labels[batch.masked_index[counted]] = batch.targets[counted]
    return {
        "input_ids": batch.input_ids[:, :longest].long(),
        "attention_mask": (batch.segments.ids[:, :longest] > 0).long(),
        "labels": labels.view(batch.input_ids.shape)[:, :longest].contiguous(),
    }


def _describe(prepared: Prepared) -> EuroBertConfig:
    model = prepared.model
    return EuroBertConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        intermediate_size=model.ffn_size,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=False,
        pad_token_id=prepared.tokenizer.pad_id,
        bos_token_id=prepared.tokenizer.cls_id,
        eos_token_id=prepared.tokenizer.sep_id,
        mask_token_id=prepared.tokenizer.mask_id,
    )


def compare(settings: AgainstSettings, names: Sequence[str], rounds: int) -> str:
    """Runs the contestants in turns, each time in a fresh process; the medians as a table.

    Raises:
        ValueError: there is no text or no tokenizer there, or a contestant failed.
    """
    load_tokenizer(TokenizerSection(path=settings.tokenizer))
    if not Path(settings.text).is_file():
        raise ValueError(f"{settings.text}: there is no such file; give JSONL (or .gz) with a field `text`")
    shape = PRESETS[settings.preset]
    precision, reason = resolve_precision(settings.precision, "cpu", shape["hidden_size"], shape["intermediate_size"])
    settings = dataclasses.replace(settings, precision=precision)
    found: dict[str, list[SpeedResult]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            command = [sys.executable, "-m", __name__, name, json.dumps(dataclasses.asdict(settings))]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            found[name].append(SpeedResult(**json.loads(done.stdout.splitlines()[-1])))
    return f"Products in {precision}, {reason}.\n\n{describe(found, base=names[0])}"


def describe(found: dict[str, list[SpeedResult]], *, base: str) -> str:
    """Medians, their spread, and ratios to the contestant called `base`."""
    lines = ["| | tokens/s | lowest - highest | ratio | peak memory | ratio |", "|---|---|---|---|---|---|"]
    speed = {name: statistics.median(o.tokens_per_second for o in all_) for name, all_ in found.items()}
    memory = {name: statistics.median(o.peak_memory_bytes for o in all_) for name, all_ in found.items()}
    for name, outcomes in found.items():
        rates = [o.tokens_per_second for o in outcomes]
        lines.append(
            f"| {name} | {speed[name]:,.0f} | {min(rates):,.0f} - {max(rates):,.0f} | {speed[name] / speed[base]:.2f} "
            f"| {memory[name] / 1e9:.2f} GB | {memory[name] / memory[base]:.2f} |"
        )
    return "\n".join(lines)


RUNS: dict[str, Callable[[AgainstSettings, Prepared], SpeedResult]] = {
    "ours": run_ours,
    "compiled": lambda settings, prepared: run_ours(settings, prepared, compile=True),
    "reference": run_reference,
    "transformers": run_transformers,
}
"""What each of CONTESTANTS does."""

if __name__ == "__main__":
    asked = AgainstSettings(**json.loads(sys.argv[2]))
    print(json.dumps(dataclasses.asdict(RUNS[sys.argv[1]](asked, prepare(asked)))))
