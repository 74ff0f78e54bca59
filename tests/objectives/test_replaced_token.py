"""Replaced-token detection: what is replaced, and the loss against a plain reference, forward and backward."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from definition import MASKS, VOCABULARY, assert_is_definition, rows
from torch import Tensor

from neobert.config.load import load_config
from neobert.config.rules import validate
from neobert.config.schema import Config
from neobert.data.rows.collate import Collator
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.segments import Segments
from neobert.objectives.base import EvalSums
from neobert.objectives.masking import MaskPolicy
from neobert.objectives.replaced_token import ReplacedTokenDetector, build_metrics, build_replacements
from neobert.objectives.table import OBJECTIVES, choose_objective, load_part, recognise_objective
from neobert.types import PackedBatch, PackedRow, WordEdges


def build(**options: Any) -> ReplacedTokenDetector:
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "embedding_init_range": 0.5,
        "decoder_init_range": 0.3,
    }
    config = ModelConfig(**{**values, **options})
    return ReplacedTokenDetector(Encoder(config, ATTENTION["sdpa"])).double()


def collate(packed: list[PackedRow], masks: MaskPolicy = MASKS, **options: Any) -> PackedBatch:
    settings: dict[str, Any] = {"seed": 1, "draw": "row", "max_seq_length": 24, "max_segments": 8, "pad_id": 0}
    return Collator(policy=build_replacements(masks), **{**settings, **options})(packed)


def reference(module: ReplacedTokenDetector, packed: list[PackedRow], batch: PackedBatch) -> Tensor:
    """One document at a time through the encoder, one token at a time through the loss."""
    total = torch.zeros((), dtype=torch.float64)
    for row, fed in zip(packed, batch.input_ids):
        end = 0
        for length in row.lengths:
            start, end = end, end + length
            borders = torch.tensor([0, length], dtype=torch.int32)
            segments = Segments(
                ids=torch.ones(1, length, dtype=torch.int32),
                cu_seqlens=borders,
                cu_seqlens_cpu=borders,
                max_seqlen=length,
            )
            hidden = module.encoder(fed[None, start:end], torch.arange(length)[None], segments)
            head = module.discriminator
            for slot in range(start, end):
                original, shown = int(row.tokens[slot]), int(fed[slot])
                if original in MASKS.special_ids:
                    continue
                inner = F.gelu(head.dense.weight @ hidden[slot - start] + head.dense.bias)
                p = torch.sigmoid(head.out.weight[0] @ inner + head.out.bias[0]).float().double()
                total = total - torch.log(p if shown != original else 1 - p)
    return total


@pytest.mark.parametrize("documents", [((9, 12), (7, 5, 8)), ((20,), (11,))], ids=["packed", "one a row"])
def test_loss_and_gradients_are_those_of_the_definition(documents: tuple[tuple[int, ...], ...]) -> None:
    module, packed = build(), rows(*documents)
    batch = collate(packed)
    assert (batch.input_ids[0, : len(packed[0].tokens)].numpy() != packed[0].tokens).any(), "something is replaced"
    found, expected = module(batch).loss_sum, reference(module, packed, batch)
    assert_is_definition(module, found, expected)


@pytest.mark.parametrize("units", ["tokens", "words"])
def test_replaced_are_the_tokens_that_masking_would_hide(units: str) -> None:
    edges = WordEdges(continues=np.arange(VOCABULARY) % 2 == 1, is_continued=np.ones(VOCABULARY, dtype=bool))
    masks = replace(MASKS, units=units, edges=edges)
    packed = rows((20, 4), (22,))
    hidden = Collator(
        policy=replace(masks, mask_all=True), seed=1, draw="row", max_seq_length=24, max_segments=8, pad_id=0
    )(packed)
    batch = collate(packed, masks)
    tokens = np.zeros((2, 24), dtype=np.int32)
    for number, row in enumerate(packed):
        tokens[number, : len(row.tokens)] = row.tokens
    changed = batch.input_ids.numpy() != tokens
    masked = hidden.input_ids.numpy() != tokens
    assert changed.any()
    assert not (changed & ~masked).any(), "a replacement may be the token itself, and nothing else stays"
    assert changed.sum() >= 0.8 * masked.sum()
    assert not np.isin(batch.input_ids.numpy()[changed], masks.special_ids).any()
    assert batch.num_targets == sum(len(row.tokens) - 2 * len(row.lengths) for row in packed)
    assert batch.targets.shape == batch.masked_index.shape == (48,), "as many entries as slots, whatever the content"


def test_an_evaluation_counts_and_training_does_not() -> None:
    module, packed = build(), rows((20,), (22,))
    batch = collate(packed, draw="document")
    assert module(batch).num_correct is None
    with torch.no_grad():
        module.discriminator.out.bias.fill_(100.0)  # Calls every token replaced.
        sums = module.eval()(batch)
    replaced = sum(int((fed[: len(r.tokens)].numpy() != r.tokens).sum()) for fed, r in zip(batch.input_ids, packed))
    assert sums.counts.tolist() == [replaced, batch.num_targets, replaced]
    assert int(sums.num_correct) == replaced
    metrics = build_metrics(
        EvalSums(
            loss_sum=float(sums.loss_sum),
            num_correct=float(sums.num_correct),
            counts=tuple(sums.counts.tolist()),
            num_targets=batch.num_targets,
            num_tokens=batch.num_tokens,
            num_documents=2,
        )
    )
    assert (metrics.recall, metrics.precision) == (1.0, replaced / batch.num_targets)
    assert "precision" in metrics.describe()


def test_the_vocabulary_projection_stays_as_it_is() -> None:
    module = build(tie_word_embeddings=False, decoder_bias=True)
    module(collate(rows((20,)))).loss_sum.backward()
    without = {name for name, weight in module.named_parameters() if weight.grad is None}
    assert without == {"decoder.weight", "decoder_bias"}
    assert not any(module.get_parameter(name).requires_grad for name in without)


def test_every_objective_of_the_table_is_whole() -> None:
    for name, objective in OBJECTIVES.items():
        assert objective.name == name
        assert load_part(objective.job).evaluate is not None
        assert load_part(objective.answers).example
    assert recognise_objective(build().state_dict()).name == "replaced_token"
    assert recognise_objective(["encoder.norm.weight", "log_scale"]).name == "contrastive"
    assert recognise_objective(["encoder.norm.weight", "logit_scale"]).name == "mlm"
    assert choose_objective(Config(task="contrastive")).name == "contrastive"


def test_keys_without_effect_are_named() -> None:
    base = ["dataset.name=python_stdlib", "tokenizer.train=true", "trainer.max_steps=1"]
    keys = ["trainer.objective=replaced_token", "datacollator.random_fraction=0.2", "trainer.z_loss=1e-4"]
    found = validate(replace_all(base, keys))
    assert [error.split(":")[0] for error in found] == ["datacollator.random_fraction", "trainer.z_loss"]
    assert any("model.ngpt" in x for x in validate(replace_all(base, [*keys[:1], "model.ngpt=true"])))


def replace_all(base: list[str], keys: list[str]) -> Config:
    """The config with keys that `load_config` would refuse together."""
    config = load_config(None, base)
    for word in keys:
        section, key, value = (*word.split("=")[0].split("."), word.split("=")[1])
        kind = {"true": True}.get(value, value if key == "objective" else 0.2)
        config = replace(config, **{section: replace(getattr(config, section), **{key: kind})})
    return config
