"""Filling masks: probabilities, several masks and texts at once, errors."""

import dataclasses

import numpy as np
import pytest
import torch

from neobert.data.tokenizer import Tokenizer, train_tokenizer
from neobert.inference.fill_mask import _encode, fill_beginnings, fill_mask
from neobert.inference.packed import hidden_states, vocabulary_logits
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.segments import Segments
from neobert.objectives.mlm import MaskedLM

TEXTS = ["the cat sees the dog", "the dog sees a cat", "a cat likes the old dog"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(TEXTS), algorithm="byte_bpe", vocab_size=280)


@pytest.fixture
def model(tokenizer: Tokenizer) -> MaskedLM:
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=24,
        vocab_size=384,
        pad_token_id=tokenizer.pad_id,
        dropout_prob=0.5,
        embedding_init_range=0.3,
    )
    model = MaskedLM(Encoder(config, ATTENTION["sdpa"]), kernel=KERNELS["torch"])
    with torch.no_grad():  # rows of padding, one of which would win every comparison
        model.encoder.embedding.weight[tokenizer.size :: 2] = 50.0
        model.encoder.embedding.weight[tokenizer.size + 1 :: 2] = -50.0
    return model


def test_probabilities_are_over_the_whole_vocabulary(model: MaskedLM, tokenizer: Tokenizer) -> None:
    (result,) = fill_mask(model, tokenizer, ["the [MASK] sees a [MASK]."], top_k=tokenizer.size)
    assert len(result.masks) == 2
    for guesses in result.masks:
        probabilities = [g.probability for g in guesses]
        assert sum(probabilities) == pytest.approx(1.0, abs=1e-5)
        assert probabilities == sorted(probabilities, reverse=True)
        assert {g.token_id for g in guesses} == set(range(tokenizer.size))
    (best,) = fill_mask(model, tokenizer, ["the [MASK] sees a [MASK]."], top_k=2)
    assert best.masks == tuple(guesses[:2] for guesses in result.masks)
    assert best.masks[0][0].token == tokenizer.decode_token(best.masks[0][0].token_id)


def test_probabilities_are_those_of_the_model(model: MaskedLM, tokenizer: Tokenizer) -> None:
    """Against a plain forward pass of the same weights without dropout."""
    ids = _encode(tokenizer, "the [MASK] sees")
    (result,) = fill_mask(model, tokenizer, ["the [MASK] sees"], top_k=1)
    still = MaskedLM(
        Encoder(dataclasses.replace(model.encoder.config, dropout_prob=0.0), ATTENTION["sdpa"]), kernel=model.kernel
    )
    still.load_state_dict(model.state_dict())
    borders = torch.tensor([0, len(ids)], dtype=torch.int32)
    segments = Segments(ids=torch.ones(1, len(ids)), cu_seqlens=borders, cu_seqlens_cpu=borders, max_seqlen=len(ids))
    hidden = still.encoder(torch.from_numpy(ids)[None], torch.arange(len(ids))[None], segments)
    logits = still.logits(hidden[int(np.flatnonzero(ids == tokenizer.mask_id)[0])])[: tokenizer.size]
    assert result.masks[0][0].probability == pytest.approx(logits.softmax(-1).max().item(), rel=1e-4)
    assert result.masks[0][0].token_id == logits.argmax()


def test_texts_do_not_see_each_other(model: MaskedLM, tokenizer: Tokenizer) -> None:
    texts = ["the [MASK] sees", "a [MASK] likes the [MASK] dog", "[MASK]"]
    together = fill_mask(model, tokenizer, texts)
    assert [r.text for r in together] == texts
    for one, text in zip(together, texts):
        (alone,) = fill_mask(model, tokenizer, [text])
        for a, b in zip(one.masks, alone.masks, strict=True):
            assert [g.token_id for g in a] == [g.token_id for g in b]
            assert [g.probability for g in a] == pytest.approx([g.probability for g in b], rel=1e-4)
    assert fill_mask(model, tokenizer, []) == []


def test_a_mask_replaces_a_word_and_its_space(tokenizer: Tokenizer) -> None:
    (whole,) = tokenizer.encode_batch(["the cat sees"])
    (cat,) = tokenizer.encode_batch([" cat"])
    assert len(cat) == 1, "the corpus makes it one token"
    hidden = [tokenizer.mask_id if token == cat[0] else token for token in whole.tolist()]
    assert _encode(tokenizer, "the [MASK] sees").tolist() == [tokenizer.cls_id, *hidden, tokenizer.sep_id]
    assert _encode(tokenizer, "x=[MASK]").tolist()[1:-2] == tokenizer.encode_batch(["x="])[0].tolist()
    assert (_encode(tokenizer, "[MASK] [SEP][PAD]") == tokenizer.sep_id).sum() == 1, "spelled out, [SEP] stays text"


def test_the_mode_of_the_model_is_left_as_it_was(model: MaskedLM, tokenizer: Tokenizer) -> None:
    for training in (True, False):
        model.train(training)
        first, second = (fill_mask(model, tokenizer, ["the [MASK]"]) for _ in range(2))
        assert first == second, "no dropout"
        assert model.training is model.encoder.training is training


def test_describe(model: MaskedLM, tokenizer: Tokenizer) -> None:
    (result,) = fill_mask(model, tokenizer, ["the [MASK] sees a [MASK]"], top_k=3)
    first, *lines = result.describe().splitlines()
    assert first == "the [MASK] sees a [MASK]"
    assert len(lines) == 2
    assert all(line.count("%") == 3 for line in lines)
    assert dataclasses.asdict(result)["masks"][1][2]["probability"] == result.masks[1][2].probability


def test_errors(model: MaskedLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"text: 'the cat' has no mask; write \[MASK\]"):
        fill_mask(model, tokenizer, ["[MASK]", "the cat"])
    long_text = "[MASK]" * 30
    with pytest.raises(ValueError, match=r"has 32 tokens, and the model takes 24 \(model\.max_position_embeddings\)"):
        fill_mask(model, tokenizer, ["[MASK]", long_text])
    for top_k in (0, tokenizer.size + 1):
        with pytest.raises(ValueError, match=rf"top_k: {top_k} is outside the vocabulary"):
            fill_mask(model, tokenizer, ["[MASK]"], top_k=top_k)


def test_jointly_the_masks_are_filled_from_left_to_right(model: MaskedLM, tokenizer: Tokenizer) -> None:
    texts = ["the [MASK] sees a [MASK] dog", "a [MASK]"]
    results = fill_mask(model, tokenizer, texts, top_k=3, joint=True)
    separate = fill_mask(model, tokenizer, texts, top_k=3)
    assert [len(result.masks) for result in results] == [2, 1]
    for joint, alone in zip(results, separate):
        assert [g.token_id for g in joint.masks[0]] == [g.token_id for g in alone.masks[0]]
    first, second = results[0].masks
    ids = _encode(tokenizer, texts[0])
    ids[np.flatnonzero(ids == tokenizer.mask_id)[0]] = first[0].token_id
    probabilities = vocabulary_logits(model, hidden_states(model, [ids]), tokenizer.size).softmax(-1)
    expected = probabilities[np.flatnonzero(ids == tokenizer.mask_id)[-1]]
    assert second[0].probability == pytest.approx(expected.max().item(), rel=1e-4)
    assert second[0].token_id == expected.argmax()
    ids[np.flatnonzero(ids == tokenizer.mask_id)[-1]] = second[0].token_id
    assert results[0].completed == tokenizer.decode(ids[1:-1]).strip()
    assert results[0].describe().splitlines()[-1] == f"  = {results[0].completed}"
    assert separate[0].completed is None


def test_a_mask_may_be_filled_with_a_mask(model: MaskedLM, tokenizer: Tokenizer) -> None:
    with torch.no_grad():  # every guess is [MASK]
        model.encoder.embedding.weight[: tokenizer.size] *= 0.01
        hidden = hidden_states(model, [_encode(tokenizer, "[MASK] a [MASK]")])[1]
        model.encoder.embedding.weight[tokenizer.mask_id] = 5 * hidden / hidden.norm()
    (result,) = fill_mask(model, tokenizer, ["[MASK] a [MASK]"], joint=True)
    (separate,) = fill_mask(model, tokenizer, ["[MASK] a [MASK]"])
    assert result.masks[0][0].token_id == tokenizer.mask_id
    assert result.masks == separate.masks
    assert result.masks[0] != result.masks[1]


def test_a_shown_beginning_can_be_typed_to_predict(model: MaskedLM, tokenizer: Tokenizer) -> None:
    """Its mask is after the space that is hidden with the token, and reads back to the same guesses."""
    documents = [np.array(tokens, dtype=np.int32) for tokens in tokenizer.encode_batch([*TEXTS, "dogcatdogcat"])]
    shown = fill_beginnings(model, tokenizer, documents, num_texts=4, top_k=2)
    assert shown[0].text == "the cat [MASK] the dog"
    again = fill_mask(model, tokenizer, [text.text for text in shown], top_k=2)
    for first, second in zip(shown, again, strict=True):
        assert [g.token_id for g in first.masks[0]] == [g.token_id for g in second.masks[0]]
