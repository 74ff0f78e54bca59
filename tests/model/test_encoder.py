"""The encoder: packed equals unpacked, whatever the architecture; checkpointing; compilation; size and cost."""

import dataclasses

import pytest
import torch
from packed import ROWS, pack, random_ids, real_slots, tiny_config
from torch import Tensor

from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.segments import Segments

NO_RANGES = {"embedding_init_range": 0.02, "decoder_init_range": 0.02}
VARIANTS = {
    "neobert": {},
    "learned positions": {"rope": False},
    "windows": {"num_hidden_layers": 3, "local_attention": 4, "global_attention_every": 2},
    "gelu and layer norm": {"hidden_act": "gelu", "rms_norm": False},
    "more norms": {"qk_norm": True, "embedding_norm": True},
    "like ModernBERT": {
        "num_hidden_layers": 3,
        "local_attention": 4,
        "global_attention_every": 2,
        "local_rope_theta": 100.0,
        "rms_norm": False,
        "hidden_act": "geglu",
        "embedding_norm": True,
        "first_attention_norm": False,
    },
    "normalised": {"ngpt": True, **NO_RANGES},
}


def build(config: ModelConfig, **options: bool) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(config, ATTENTION["sdpa"], **options)
    for weight in encoder.parameters():
        if weight.ndim == 1:  # all ones would hide a norm weight that is not used
            weight.detach().mul_(torch.empty_like(weight).uniform_(0.5, 1.5))
    return encoder


def hidden_and_gradients(
    encoder: Encoder, ids: Tensor, positions: Tensor, segments: Segments, target: Tensor, *, bf16: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of the real slots, and gradients of their product with `target`."""
    encoder.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = encoder(ids, positions, segments)[real_slots(segments)]
    (hidden * target).sum().backward()
    return hidden.detach(), {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


def alone(
    encoder: Encoder, ids: Tensor, segments: Segments, target: Tensor, row_length: int | None, *, bf16: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same for documents that never meet: a forward pass each, in a row of `row_length` or of their own length."""
    documents = [
        row[number == row_ids] for row, row_ids in zip(ids, segments.ids) for number in row_ids.unique() if number
    ]
    parts, gradients = [], {name: torch.zeros_like(p) for name, p in encoder.named_parameters()}
    start = 0
    for tokens in documents:
        positions, own = pack([(len(tokens),)], row_length or len(tokens))
        padded = torch.zeros(own.ids.shape, dtype=torch.int32)
        padded[0, : len(tokens)] = tokens
        part, grads = hidden_and_gradients(
            encoder, padded, positions, own, target[start : start + len(tokens)], bf16=bf16
        )
        parts.append(part)
        for name, grad in grads.items():
            gradients[name] += grad
        start += len(tokens)
    return torch.cat(parts), gradients


@pytest.mark.parametrize("row_length", [None, 16], ids=["own length", "padded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_unpacked(variant: str, row_length: int | None) -> None:
    encoder = build(tiny_config(**VARIANTS[variant]))
    positions, segments = pack(ROWS, 16)
    ids = random_ids(segments, 50)
    target = torch.randn(int(real_slots(segments).sum()), 32, generator=torch.Generator().manual_seed(2))
    hidden, gradients = hidden_and_gradients(encoder, ids, positions, segments, target)
    hidden_alone, gradients_alone = alone(encoder, ids, segments, target, row_length, bf16=False)
    torch.testing.assert_close(hidden, hidden_alone, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == gradients_alone.keys()
    for name in gradients:
        # Sums over documents of numbers of size one: the tolerance is relative to the largest of each gradient.
        scale = max(1.0, gradients_alone[name].abs().max().item())
        torch.testing.assert_close(gradients[name] / scale, gradients_alone[name] / scale, atol=1e-5, rtol=0)


def test_packed_equals_unpacked_in_bf16() -> None:
    encoder = build(tiny_config())
    positions, segments = pack(ROWS, 16)
    ids = random_ids(segments, 50)
    target = torch.randn(int(real_slots(segments).sum()), 32, generator=torch.Generator().manual_seed(2))
    hidden, gradients = hidden_and_gradients(encoder, ids, positions, segments, target, bf16=True)
    hidden_alone, gradients_alone = alone(encoder, ids, segments, target, None, bf16=True)
    assert hidden.dtype == torch.float32, "the residual stream stays in fp32"
    torch.testing.assert_close(hidden, hidden_alone, atol=2e-2, rtol=2e-2)
    for name in gradients:
        error = (gradients[name] - gradients_alone[name]).norm() / gradients_alone[name].norm()
        assert error < 2e-2, name


def test_a_document_does_not_depend_on_its_neighbours() -> None:
    encoder = build(tiny_config())
    positions, segments = pack(ROWS, 16)
    ids = random_ids(segments, 50)
    others = torch.where(segments.ids == 2, ids, random_ids(segments, 50, seed=9))
    second = (segments.ids == 2).flatten()
    before, after = (encoder(x, positions, segments).detach() for x in (ids, others))
    assert torch.equal(before[second], after[second])
    assert not torch.equal(before[~second], after[~second])


def test_learned_positions_start_at_zero_in_every_document() -> None:
    encoder = build(tiny_config(rope=False))
    positions, segments = pack([(4, 4)], 8)
    tokens = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8]], dtype=torch.int32)
    first, second = encoder(tokens, positions, segments).chunk(2)
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, encoder(tokens, positions.flip(1), segments)[:4])


def test_gradient_checkpointing_changes_nothing() -> None:
    config = tiny_config(dropout_prob=0.2)
    positions, segments = pack(ROWS, 16)
    ids = random_ids(segments, 50)
    runs = []
    for checkpointing in (False, True):
        encoder = build(config, gradient_checkpointing=checkpointing)
        torch.manual_seed(4)
        runs.append(hidden_and_gradients(encoder, ids, positions, segments, torch.ones(1)))
    assert torch.equal(runs[0][0], runs[1][0])
    for name, gradient in runs[0][1].items():
        assert torch.equal(gradient, runs[1][1][name]), name


@pytest.mark.parametrize("every", [1, 2, 3])
def test_gradient_checkpointing_of_every_kth_block(every: int) -> None:
    """Gradients are those of no checkpointing, and blocks 0, k, 2k, ... run a second time in the backward."""
    config = tiny_config(num_hidden_layers=4, dropout_prob=0.2)
    positions, segments = pack(ROWS, 16)
    ids = random_ids(segments, 50)
    runs, calls = [], []
    for options in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_every": every}):
        encoder = build(config, **options)
        calls.clear()
        for number, block in enumerate(encoder.layers):
            block.attention_norm.register_forward_hook(lambda *_, number=number: calls.append(number))
        torch.manual_seed(4)
        runs.append(hidden_and_gradients(encoder, ids, positions, segments, torch.ones(1)))
    assert [calls.count(number) for number in range(4)] == [2 if number % every == 0 else 1 for number in range(4)]
    for name, gradient in runs[0][1].items():
        assert torch.equal(gradient, runs[1][1][name]), name


def test_layers_see_what_their_window_shows() -> None:
    """Changing the last token reaches everywhere through a layer without a window, else two tokens a layer."""
    ids = torch.arange(1, 17, dtype=torch.int32)[None]
    other = ids.clone()
    other[0, 15] = 40
    positions, segments = pack([(16,)], 16)
    encoder = build(tiny_config(num_hidden_layers=3, local_attention=4, global_attention_every=3))
    assert encoder.windows == (None, 4, 4)
    for windows, num_same in (((None, 4, 4), 0), ((4, 4, 4), 9)):
        encoder.windows = windows
        before, after = (encoder(x, positions, segments) for x in (ids, other))
        assert [torch.equal(a, b) for a, b in zip(before, after)] == [True] * num_same + [False] * (16 - num_same)


def test_dropout_acts_in_training_only() -> None:
    encoder = build(tiny_config(dropout_prob=0.5))
    positions, segments = pack(ROWS, 16)
    ids = random_ids(segments, 50)
    assert not torch.equal(encoder(ids, positions, segments), encoder(ids, positions, segments))
    encoder.eval()
    assert torch.equal(encoder(ids, positions, segments), encoder(ids, positions, segments))


@pytest.mark.parametrize("variant", ["neobert", "more norms", "normalised"])
def test_blocks_compile_to_one_graph_that_content_does_not_change(variant: str) -> None:
    torch._dynamo.reset()
    encoder = build(tiny_config(**VARIANTS[variant]))
    positions, segments = pack(ROWS, 16)
    ids = random_ids(segments, 50)
    target = torch.ones(1)
    eager = hidden_and_gradients(encoder, ids, positions, segments, target)
    other = pack([(2, 2, 2), (5, 11), (16,)], 16)
    eager_other = hidden_and_gradients(encoder, random_ids(other[1], 50), *other, target)
    for block in encoder.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    compiled = hidden_and_gradients(encoder, ids, positions, segments, target)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled_other = hidden_and_gradients(encoder, random_ids(other[1], 50), *other, target)
    for a, b in ((eager, compiled), (eager_other, compiled_other)):
        torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a[1], b[1], atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("variant", ["neobert", "more norms", "like ModernBERT", "normalised"])
def test_compiled_blocks_on_a_gpu(name: str, variant: str) -> None:
    """Every backend inside blocks compiled by inductor in bf16, with and without a window, against fp32 on the CPU."""
    torch._dynamo.reset()
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "local_attention": 64, "global_attention_every": 2}
    config = tiny_config(**{**VARIANTS[variant], **sizes})
    config = dataclasses.replace(config, max_position_embeddings=512)
    positions, segments = pack([(300, 212), (1, 130, 7)], 512)
    ids = random_ids(segments, 50)
    target = torch.randn(int(real_slots(segments).sum()), 128, generator=torch.Generator().manual_seed(2))
    want = hidden_and_gradients(build(config), ids, positions, segments, target)
    torch.manual_seed(0)
    encoder = Encoder(config, ATTENTION[name])
    encoder.load_state_dict(build(config).state_dict())
    encoder.cuda()
    for block in encoder.layers:
        block.compile(fullgraph=True, dynamic=False)
    real = real_slots(segments).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        hidden = encoder(ids.cuda(), positions.cuda(), segments.to(torch.device("cuda")))[real]
    (hidden * target.cuda()).sum().backward()
    assert (hidden.cpu() - want[0]).norm() < 2e-2 * want[0].norm()
    for key, parameter in encoder.named_parameters():
        assert (parameter.grad.cpu() - want[1][key]).norm() < 3e-2 * want[1][key].norm(), key


def test_names_of_the_weights() -> None:
    encoder = build(tiny_config(num_hidden_layers=1))
    shapes = {name: tuple(p.shape) for name, p in encoder.state_dict().items()}
    assert shapes == {
        "embedding.weight": (50, 32),
        "layers.0.attention_norm.weight": (32,),
        "layers.0.qkv.weight": (96, 32),
        "layers.0.out.weight": (32, 32),
        "layers.0.ffn_norm.weight": (32,),
        "layers.0.gate_up.weight": (64, 32),
        "layers.0.down.weight": (32, 32),
        "norm.weight": (32,),
    }
    norms = build(tiny_config(num_hidden_layers=1, qk_norm=True, embedding_norm=True)).state_dict()
    assert {name: tuple(norms[name].shape) for name in norms.keys() - shapes.keys()} == {
        "embedding_norm.weight": (32,),
        "layers.0.q_norm.weight": (16,),
        "layers.0.k_norm.weight": (16,),
    }
    bare = build(tiny_config(num_hidden_layers=2, embedding_norm=True, first_attention_norm=False)).state_dict()
    assert ["layers.0.attention_norm.weight" in bare, "layers.1.attention_norm.weight" in bare] == [False, True]
    gelu = build(tiny_config(num_hidden_layers=1, hidden_act="gelu", rope=False)).state_dict()
    assert gelu["layers.0.up.weight"].shape == (48, 32)
    assert gelu["position_embedding.weight"].shape == (16, 32)
    assert encoder.num_parameters() == sum(p.numel() for p in encoder.state_dict().values())


def test_initialisation() -> None:
    encoder = Encoder(tiny_config(embedding_init_range=0.5, decoder_init_range=0.1), ATTENTION["sdpa"])
    for name, weight in encoder.named_parameters():
        if "norm" in name:
            assert weight.eq(1).all()
        else:
            limit = 0.5 if "embedding" in name else 0.1
            assert weight.abs().max() <= limit
            assert weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.1)


def test_norms_of_heads_and_of_the_embedding() -> None:
    """Queries and keys come to the attention with the length that their gains say, embeddings to the first block."""
    encoder = build(tiny_config(num_hidden_layers=1, qk_norm=True, embedding_norm=True, norm_eps=1e-12))
    block, seen = encoder.layers[0], []
    attend = block.attend
    block.attend = lambda q, k, v, *args, **named: (seen.append((q, k)), attend(q, k, v, *args, **named))[1]
    block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    positions, segments = pack(ROWS, 16)
    ids = random_ids(segments, 50)
    encoder(ids, positions, segments)
    torch.testing.assert_close(seen[0], encoder.embedding_norm(encoder.embedding(ids).flatten(0, 1)))
    x = block.attention_norm(seen[0])
    for number, (got, norm) in enumerate(zip(seen[1], (block.q_norm, block.k_norm))):
        heads = (x @ block.qkv.weight[32 * number : 32 * number + 32].T).view(-1, 2, 16)
        want = heads / heads.square().mean(-1, keepdim=True).sqrt() * norm.weight
        at_start = positions.flatten() == 0  # where nothing is rotated
        torch.testing.assert_close(got[at_start], want[at_start])
        torch.testing.assert_close(got.norm(dim=-1), want.norm(dim=-1))


def test_flops_per_token() -> None:
    """NeoBERT-250M, 28 x 768: blocks 1.189 GF, attention at 512 tokens 0.132 GF, a fifth of the head 0.028 GF."""
    config = tiny_config(
        hidden_size=768, num_attention_heads=12, intermediate_size=3072, num_hidden_layers=28, vocab_size=30522
    )
    with torch.device("meta"):
        encoder = Encoder(config, ATTENTION["sdpa"])
    flops = encoder.flops_per_token(attended_length=512, predicted_fraction=0.2)
    assert flops == pytest.approx(1.35e9, rel=0.005)
    with torch.device("meta"):
        local = Encoder(dataclasses.replace(config, local_attention=128), ATTENTION["sdpa"])
    saved = flops - local.flops_per_token(attended_length=512, predicted_fraction=0.2)
    assert saved == pytest.approx(12 * 768 * 18 * (512 - 129)), "18 of 28 layers see 64 tokens to either side"
    short = local.flops_per_token(attended_length=100, predicted_fraction=0.2)
    assert short == encoder.flops_per_token(attended_length=100, predicted_fraction=0.2)
    blocks = 28 * (4 * 768**2 + 3 * 768 * 2048)
    assert encoder.flops_per_token(attended_length=0, predicted_fraction=0) == 6 * blocks
    assert encoder.num_parameters() == blocks + 30522 * 768 + 57 * 768
    for changes in ({"qk_norm": True, "embedding_norm": True}, VARIANTS["normalised"]):
        with torch.device("meta"):
            variant = Encoder(dataclasses.replace(config, **{**NO_RANGES, **changes}), ATTENTION["sdpa"])
        assert variant.flops_per_token(attended_length=512, predicted_fraction=0.2) == flops, "vectors count nothing"
    with torch.device("meta"):
        gated = Encoder(dataclasses.replace(config, hidden_act="geglu", prediction_head=True), ATTENTION["sdpa"])
    head = 6 * 0.2 * 768**2
    assert gated.flops_per_token(attended_length=512, predicted_fraction=0.2) == pytest.approx(flops + head)
    with torch.device("meta"):
        gelu = Encoder(dataclasses.replace(config, hidden_act="gelu"), ATTENTION["sdpa"])
    assert gelu.flops_per_token(attended_length=0, predicted_fraction=0) == 6 * 28 * (4 * 768**2 + 2 * 768 * 3072)
