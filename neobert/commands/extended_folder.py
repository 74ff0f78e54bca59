"""The folder of a model with more tokens: tokenizer, weights with rows for the new ones, and what was learned.

It is written in one stroke and has a manifest, as the mean of checkpoints has: `model.init_from` starts from it.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from neobert.config.nesting import parse_json
from neobert.data.new_pieces import check_round_trip, learn_pieces, write_extended
from neobert.data.tokenizer import Tokenizer, padded_vocab_size, tokenizer_info
from neobert.disk import write_json, write_text
from neobert.weights.encoder_weights import EncoderWeights
from neobert.weights.folder import MODEL_FILE, write_manifest
from neobert.weights.new_rows import AddedTokens, add_rows
from neobert.weights.vocabulary import VOCABULARY_TENSORS

EXTENSION_FILE = "extension.json"
"""What was added; in an extended folder only."""


def write_extension(
    weights: EncoderWeights,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    folder: Path,
    *,
    num_new: int,
    init: str,
    seed: int,
    samples: Sequence[str],
) -> None:
    """Learns new tokens from texts, and writes tokenizer and weights with them.

    Args:
        init: a key of INITIAL_ROWS.
        samples: texts that must be the same after encoding and decoding as they were with the old tokenizer.

    Raises:
        DataError: there are none, or the tokenizer would not be the old one beside them.
    """
    learned = learn_pieces(tokenizer, texts, num_new)
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        extended = write_extended(tokenizer, learned, temporary / "tokenizer")
        check_round_trip(tokenizer, extended, samples)
        added = AddedTokens(
            texts=[piece.text for piece in learned.pieces],
            parts=[piece.parts for piece in learned.pieces],
            old={text: number for text, number in tokenizer.vocabulary.items() if number not in tokenizer.special_ids},
            num_old=tokenizer.size,
            seed=seed,
        )
        num_rows = max(padded_vocab_size(None, extended.size), weights.config.vocab_size)
        tensors = {
            name: add_rows(tensor, added, init, num_rows) if name in VOCABULARY_TENSORS else tensor
            for name, tensor in weights.tensors.items()
        }
        save_file({name: x.contiguous() for name, x in tensors.items()}, temporary / MODEL_FILE, {"format": "pt"})
        config = dataclasses.replace(weights.config, vocab_size=num_rows)
        write_json(temporary / "model_config.json", config.to_dict())
        write_json(temporary / "tokenizer_info.json", tokenizer_info(extended))
        facts = {
            "num_new": len(learned.pieces),
            "num_tokens": extended.size,
            "num_rows": num_rows,
            "init": init,
            "tokens_of_text": learned.num_tokens,
            "saved": learned.num_saved,
            "pieces": {piece.text: piece.uses for piece in learned.pieces},
        }
        write_text(temporary / EXTENSION_FILE, json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
        write_manifest(temporary, weights.step or 0)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_extension(folder: Path) -> dict[str, Any]:
    """What was added to an extended folder, without the tokens themselves."""
    facts = parse_json((folder / EXTENSION_FILE).read_text())
    return {name: value for name, value in facts.items() if name != "pieces"}


def describe_extension(folder: Path) -> str:
    """One line for people."""
    facts = read_extension(folder)
    return (
        f"{facts['num_new']:,} new tokens ({facts['num_tokens']:,} in all, {facts['num_rows']:,} rows, new ones "
        f"{facts['init']}) save {facts['saved'] / facts['tokens_of_text']:.1%} of the {facts['tokens_of_text']:,} "
        f"tokens of the own text: {folder}"
    )
