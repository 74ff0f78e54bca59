"""Causal language modelling: targets and loss against a plain reference, forward and backward."""

from typing import Any

import numpy as np
import pytest
import torch
from definition import MASKS, assert_is_definition, rows
from torch import Tensor

from neobert.config.load import load_config
from neobert.config.rules import validate
from neobert.data.rows.collate import Collator
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.segments import Segments
from neobert.objectives.causal_lm import CLM, CausalLM, build_next_tokens
from neobert.types import IGNORE_INDEX, PackedBatch, PackedRow


def build(**options: Any) -> CausalLM:
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "vocab_size": 50,
        "pad_token_id": 0,
        "embedding_init_range": 0.5,
        "decoder_init_range": 0.3,
    }
    encoder = Encoder(ModelConfig(**{**values, **options}), ATTENTION["sdpa"])
    return CausalLM(encoder, kernel=KERNELS["reference"]).double()


def collate(packed: list[PackedRow], **options: Any) -> PackedBatch:
    settings: dict[str, Any] = {"seed": 1, "draw": "row", "max_seq_length": 24, "max_segments": 8, "pad_id": 0}
    return Collator(policy=build_next_tokens(MASKS), **{**settings, **options})(packed)


def reference(module: CausalLM, packed: list[PackedRow]) -> Tensor:
    """Every token from the document cut before it, so that nothing after it can be seen."""
    total = torch.zeros((), dtype=torch.float64)
    for row in packed:
        for document in np.split(row.tokens, np.cumsum(row.lengths)[:-1]):
            for end in range(1, len(document) - 1):
                borders = torch.tensor([0, end], dtype=torch.int32)
                segments = Segments(
                    ids=torch.ones(1, end, dtype=torch.int32),
                    cu_seqlens=borders,
                    cu_seqlens_cpu=borders,
                    max_seqlen=end,
                    causal=True,
                )
                seen = torch.from_numpy(document[:end])[None]
                hidden = module.encoder(seen, torch.arange(end)[None], segments)
                total = total - module.logits(hidden[-1]).log_softmax(-1)[int(document[end])]
    return total


@pytest.mark.parametrize("variant", [{}, {"local_attention": 6, "global_attention_every": 2}], ids=["", "windows"])
@pytest.mark.parametrize("documents", [((9, 12), (7, 5, 8)), ((20,), (11,))], ids=["packed", "one a row"])
def test_loss_and_gradients_are_those_of_the_definition(
    documents: tuple[tuple[int, ...], ...], variant: dict[str, Any]
) -> None:
    module, packed = build(**variant), rows(*documents)
    batch = collate(packed)
    found, expected = module(batch).loss_sum, reference(module, packed)
    assert_is_definition(module, found, expected)


@pytest.mark.parametrize("draw", ["row", "document"])
def test_every_ordinary_token_is_the_target_of_the_slot_before_it(draw: str) -> None:
    packed = rows((9, 12), (7, 5, 8))
    batch = collate(packed, draw=draw)
    used = batch.targets != IGNORE_INDEX
    slots, flat = batch.masked_index[used], batch.input_ids.flatten()
    assert batch.targets[used].tolist() == flat[slots + 1].tolist()
    assert (slots + 1).tolist() == [n for n, token in enumerate(flat.tolist()) if token not in MASKS.special_ids]
    assert used.sum() == batch.num_targets == sum(len(row.tokens) - 2 * len(row.lengths) for row in packed)
    assert batch.segments.causal
    assert batch.segments.to(torch.device("cpu")).causal
    assert batch.attended_tokens == sum(n * (n + 1) // 2 for row in packed for n in row.lengths)
    for row, tokens in zip(packed, batch.input_ids.numpy()):
        assert tokens[: len(row.tokens)].tolist() == row.tokens.tolist(), "nothing is hidden"


def test_the_first_steps_of_a_run_are_causal_and_the_others_masked() -> None:
    packed = rows((20,), (22,))
    settings: dict[str, Any] = {"seed": 1, "draw": "row", "max_seq_length": 24, "max_segments": 8, "pad_id": 0}
    both = Collator(policy=MASKS, first_policy=build_next_tokens(MASKS), first_steps=3, **settings)
    for step, alone in ((0, build_next_tokens(MASKS)), (2, build_next_tokens(MASKS)), (3, MASKS), (4, MASKS)):
        found, expected = both(packed, step=step), Collator(policy=alone, **settings)(packed, step=step)
        assert found.segments.causal == expected.segments.causal == (step < 3)
        assert found.digest == expected.digest
        assert torch.equal(found.targets, expected.targets)


def test_a_model_that_is_asked_is_causal_as_its_entry_says() -> None:
    built = CLM.build_trained(build().encoder, None)
    assert built.is_causal
    assert CLM.is_causal


def test_keys_of_masks_have_no_effect() -> None:
    base = ["dataset.name=python_stdlib", "tokenizer.train=true", "trainer.max_steps=1", "trainer.objective=clm"]
    keys = ["mlm_probability=0.3", "mask_units=words", "mask_all=true", "clm_steps=4", "eval_mlm_probability=0.2"]
    config = load_config(None, base)
    assert not validate(config)
    for key in keys:
        with pytest.raises(Exception, match=rf"datacollator\.{key.split('=')[0]}: .* has no effect with"):
            load_config(None, [*base, f"datacollator.{key}"])
    spikes = ["datacollator.clm_steps=4", "trainer.skip_spikes=6"]
    with pytest.raises(Exception, match=r"trainer\.skip_spikes: 6.*of two kinds with datacollator\.clm_steps"):
        load_config(None, [*base[:3], *spikes])
