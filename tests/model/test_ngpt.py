"""The normalised model: its definition written out, everything of length 1, and what its stored scales mean."""

from itertools import pairwise

import pytest
import torch
from packed import ROWS, pack, random_ids, real_slots, tiny_config
from torch import Tensor

from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.encoder import Encoder
from neobert.model.ngpt import normalise_
from neobert.objectives.mlm import MaskedLM


def build(*, tied: bool = True, base_scale: float | None = None, spread: bool = True) -> MaskedLM:
    torch.manual_seed(0)
    config = tiny_config(
        ngpt=True,
        embedding_init_range=0.02,
        decoder_init_range=0.02,
        tie_word_embeddings=tied,
        base_scale=base_scale,
    )
    model = MaskedLM(Encoder(config, ATTENTION["sdpa"]), kernel=KERNELS["torch"])
    for weight in model.parameters() if spread else ():
        if weight.ndim == 1:  # equal numbers would hide one at the wrong index
            torch.nn.init.uniform_(weight, 0.5 * weight[0].item(), 1.5 * weight[0].item())
    return model


def definition(model: MaskedLM, tokens: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """Hidden states and logits of one document in double precision."""
    weights = {name: x.detach().double() for name, x in model.state_dict().items()}
    count, heads, width = len(tokens), 2, 16

    def unit(x: Tensor) -> Tensor:
        return x / x.square().sum(-1, keepdim=True).sqrt()

    angles = torch.arange(count)[:, None, None] * 10000.0 ** (-torch.arange(8).double() / 8)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.view(count, heads, width).chunk(2, -1)
        return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1)

    x = weights["encoder.embedding.weight"][tokens.long()]
    for number in range(2):
        w = {k.removeprefix(f"encoder.layers.{number}."): v for k, v in weights.items()}
        q, k, v = (x @ w["qkv.weight"].T).chunk(3, -1)
        s_qk = (w["qk_scale"] / base).view(heads, width)
        q, k = unit(rotate(q)) * s_qk, unit(rotate(k)) * s_qk
        scores = torch.einsum("qnd,knd->nqk", q, k) * 4.0
        mixed = torch.einsum("nqk,knd->qnd", scores.softmax(-1), v.view(count, heads, width)).reshape(count, -1)
        target = unit(mixed @ w["out.weight"].T)
        x = unit(x + 0.05 * w["attention_rate"].abs() / base * (target - x))
        gate, up = (x @ w["gate_up.weight"].T).chunk(2, -1)
        s_gate, s_up = w["gate_up_scale"].chunk(2)
        gate = gate * s_gate * 32**0.5
        target = unit((gate * gate.sigmoid() * up * s_up) @ w["down.weight"].T)
        x = unit(x + 0.05 * w["ffn_rate"].abs() / base * (target - x))
    return x, x @ model.head_weight.detach().double().T * weights["logit_scale"] / base


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("base_scale", [None, 0.05])
def test_the_definition(tied: bool, base_scale: float | None) -> None:
    model = build(tied=tied, base_scale=base_scale)
    with torch.no_grad():
        model.encoder.layers[1].ffn_rate.neg_()  # the absolute value counts
    positions, segments = pack(ROWS, 16)
    ids = random_ids(segments, 50)
    hidden = model.encoder(ids, positions, segments)
    logits = model.logits(hidden)
    for start, end in pairwise(segments.cu_seqlens_cpu.unique().tolist()):
        if segments.ids.flatten()[start] == 0:
            continue
        want = definition(model, ids.flatten()[start:end], base_scale or 32**-0.5)
        torch.testing.assert_close(hidden[start:end].double(), want[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(logits[start:end].double(), want[1], atol=1e-5, rtol=0)


def test_hidden_states_have_length_one_in_every_layer() -> None:
    model = build()
    positions, segments = pack(ROWS, 16)
    states: list[Tensor] = []
    for block in model.encoder.layers:
        block.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
    states.append(model.encoder(random_ids(segments, 50), positions, segments))
    assert len(states) == 3
    for x in states:
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(48))


def test_logits_are_the_scale_times_the_cosine() -> None:
    model = build(tied=False)
    positions, segments = pack(ROWS, 16)
    hidden = model.encoder(random_ids(segments, 50), positions, segments)
    cosine = torch.nn.functional.cosine_similarity(hidden[:, None], model.head_weight[None], dim=-1)
    torch.testing.assert_close(model.logits(hidden), cosine * model.logit_scale * 32**0.5)
    at_start = build(spread=False)
    torch.testing.assert_close(at_start.logit_scale, torch.full((50,), 32**-0.5))


@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_and_only_a_matrix_has_vectors_of_length_one_along_the_hidden_size(tied: bool) -> None:
    model = build(tied=tied)
    along = {"embedding": 1, "decoder": 1, "qkv": 1, "gate_up": 1, "out": 0, "down": 0}
    matrices = {name: weight for name, weight in model.named_parameters() if weight.ndim == 2}
    assert len(matrices) == 2 * 4 + (1 if tied else 2)
    listed = {id(matrix): dim for matrix, dim in model.unit_matrices()}
    for name, weight in matrices.items():
        dim = along[name.split(".")[-2]]
        assert listed.pop(id(weight)) == dim
        assert weight.shape[dim] == 32
        torch.testing.assert_close(weight.norm(dim=dim), torch.ones(weight.shape[1 - dim]))
        assert not torch.allclose(weight.norm(dim=1 - dim), torch.ones(weight.shape[dim]))
    assert listed == {}


def test_normalising_leaves_every_bit_where_it_should() -> None:
    matrices = [(torch.randn(5, 7), 0), (torch.randn(5, 7), 1)]
    before = [matrix.clone() for matrix, _ in matrices]
    normalise_(matrices, unless=torch.tensor(1.0))
    assert all(torch.equal(matrix, old) for (matrix, _), old in zip(matrices, before))
    normalise_(matrices, unless=torch.tensor(0.0))
    for (matrix, dim), old in zip(matrices, before):
        torch.testing.assert_close(matrix, old / old.norm(dim=dim, keepdim=True))


def test_another_base_is_the_same_model_that_learns_at_another_pace() -> None:
    """The function at the start does not depend on the base; the step of a value does, by 1 / base."""
    positions, segments = pack(ROWS, 16)
    ids = random_ids(segments, 50)
    gradients = []
    for base in (0.1, 0.4):
        model = build(base_scale=base, spread=False)
        hidden = model.encoder(ids, positions, segments)
        (model.logits(hidden)[:, :7] ** 3).sum().backward()
        gradients.append((hidden, [model.logit_scale.grad, *(b.qk_scale.grad for b in model.encoder.layers)]))
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    for quick, slow in zip(gradients[0][1], gradients[1][1]):
        torch.testing.assert_close(quick, 4 * slow, atol=1e-5, rtol=1e-3)


def test_in_bf16_the_stream_keeps_its_length() -> None:
    model = build()
    positions, segments = pack(ROWS, 16)
    ids = random_ids(segments, 50)
    exact = model.encoder(ids, positions, segments)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.encoder(ids, positions, segments)
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(hidden.norm(dim=-1), torch.ones(48))
    real = real_slots(segments)
    assert (hidden - exact)[real].norm() < 1e-2 * exact[real].norm()
