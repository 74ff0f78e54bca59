"""What an adaptation brought: models with different tokenizers on the same held-out texts.

Losses a token of different tokenizers cannot be compared; those of the same masked words, a byte or a word of text,
can: `neobert.inference.mlm_loss` says what is still not equal.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neobert.cli import say
from neobert.config.nesting import parse_json
from neobert.config.schema import TokenizerSection
from neobert.data.new_pieces import measure_fertility
from neobert.data.tokenizer import load_tokenizer
from neobert.inference.mlm_loss import LossSettings, measure_mlm_loss
from neobert.inference.model import load
from neobert.inference.packed import BATCH_TOKENS
from neobert.inference.scorer import load_scorer
from neobert.inference.texts import open_texts
from neobert.train.probes.labelled_sets import load_probe_set, name_sets
from neobert.train.probes.probing import score_set
from neobert.weights.folder import record_file

PROBE_EXAMPLES = 400
"""Of a probe set, as `trainer.probe_examples` has it."""


def measure_models(
    models: Mapping[str, Path],
    held_out: Mapping[str, Path],
    folder: Path,
    settings: LossSettings,
    probe_sets: Sequence[str],
) -> dict[str, Any]:
    """Loss and fertility of every model on every held-out text, and its probes.

    Args:
        held_out: Name to JSONL file.
        folder: Keeps every measurement, so that none is made twice.
    """
    folder.mkdir(exist_ok=True)
    texts: dict[str, dict[str, Any]] = {name: {} for name in held_out}
    probes: dict[str, Any] = {}
    for kind, model in models.items():
        tokenizer = load_tokenizer(TokenizerSection(path=str(_find_tokenizer(model))))
        for name, file in held_out.items():
            with open_texts(str(file)) as opened:
                fertility = measure_fertility(tokenizer, [text.text for text in opened.read()])
            loss = _measure_loss(model, file, settings, folder, kind)
            texts[name][kind] = {
                "nats_per_byte": loss["bits_per_byte"] * math.log(2),
                "nats_per_word": loss["loss"] * loss["num_targets"] / loss["num_words"],
                "nats_per_token": loss["loss"],
                "tokens_per_word": fertility.tokens_per_word,
                "num_words": loss["num_words"],
            }
        if probe_sets:
            probes[kind] = _probe(model, probe_sets)
    return {"texts": texts, "probes": probes}


def _find_tokenizer(folder: Path) -> Path:
    return next(p for p in (folder, folder / "tokenizer") if (p / "tokenizer.json").is_file())


def _measure_loss(model: Path, text: Path, settings: LossSettings, folder: Path, kind: str) -> dict[str, Any]:
    # Another length of pieces, or other weights, are another result.
    digests = "".join(record_file(path).sha256 for path in sorted(model.glob("*.safetensors")))
    weights = hashlib.sha256(digests.encode()).hexdigest()[:12]
    file = folder / f"{text.stem}-{kind}-{weights}-{settings.piece_chars}.json"
    if not file.is_file():
        say(f"measuring {kind} on {text.stem}")
        with open_texts(str(text)) as opened:
            measure_mlm_loss(load_scorer(str(model)), opened, settings, file)
    measured: dict[str, Any] = parse_json(file.read_text())
    return measured


def _probe(folder: Path, paths: Sequence[str]) -> dict[str, dict[str, float | None]]:
    model = load(folder)
    found = {}
    for path, name in zip(paths, name_sets(paths)):
        one = load_probe_set(path, name, model.tokenizer, most=PROBE_EXAMPLES, seed=0, max_length=model.max_length)
        vectors = model.embed_tokens(one.documents, pooling="mean", normalize=False, batch_tokens=BATCH_TOKENS)
        found[name] = score_set(one, vectors.numpy())
    return found


_ROWS = {
    "nats_per_byte": "nats a byte",
    "nats_per_word": "nats a word",
    "nats_per_token": "nats a token (not comparable)",
    "tokens_per_word": "tokens a word",
}
"""Of a text: key in `result.json` -> what the table calls it."""


def describe_result(result: dict[str, Any]) -> str:
    """The table for people."""
    rows: list[tuple[str, list[float | None]]] = []
    kinds: list[str] = []
    for name, text in result["texts"].items():
        kinds = list(text)
        rows += [(f"{name}: {label}", [text[kind][key] for kind in kinds]) for key, label in _ROWS.items()]
    for name in next(iter(result["probes"].values()), {}):
        metrics = result["probes"][kinds[0]][name]
        rows += [(f"{name}: {m}", [result["probes"][kind][name][m] for kind in kinds]) for m in metrics]
    width = max(len(label) for label, _ in rows)
    lines = [" ".join([" " * width, *(f"{kind:>9}" for kind in kinds)])]
    for label, values in rows:
        lines.append(" ".join([f"{label:<{width}}", *("        -" if v is None else f"{v:>9.4f}" for v in values)]))
    return "\n".join(lines)
