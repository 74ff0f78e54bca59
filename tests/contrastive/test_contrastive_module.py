"""The module: embeddings of packed texts, cached gradients, what takes part in the loss, and no wait for the device."""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neobert.config.schema import Config
from neobert.config.schema_contrastive import ContrastiveSection
from neobert.contrastive.batches import PairCollator
from neobert.contrastive.pair_order import TrainSet
from neobert.inference.packed import hidden_states
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.segments import Segments
from neobert.objectives.base import Teacher
from neobert.objectives.contrastive import CONTRASTIVE, TEMPERATURE, ContrastiveEncoder
from neobert.objectives.masking import MaskPolicy
from neobert.objectives.pair_batch import PairBatch
from neobert.train.step import train_step
from neobert.types import PackedRow

VOCABULARY = 50
SOME_MASK: dict[str, Any] = {"pretraining_prob": 0.5, "pretraining_objective": "mlm"}
MASKS = MaskPolicy(
    probability=0.3,
    mask_all=False,
    mask_token_id=4,
    special_ids=(0, 1, 2, 3, 4),
    random_ids=np.arange(5, 50, dtype=np.int32),
)

HEAD = {"pretraining_prob": 0.5, "pretraining_objective": "mlm"}
"""With which the vocabulary projection is trained too."""


def model(**changes: Any) -> ContrastiveEncoder:
    architecture = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "embedding_init_range": 0.5,
        "decoder_init_range": 0.2,
    }
    keys = {f.name for f in fields(ContrastiveSection)}
    section = ContrastiveSection(**{name: changes.pop(name) for name in list(changes) if name in keys})
    torch.manual_seed(changes.pop("seed_of_weights", 0))
    encoder = Encoder(ModelConfig(**{**architecture, **changes}), ATTENTION["sdpa"])
    return ContrastiveEncoder(encoder, section, kernel=KERNELS["torch"])


def make_rows(*counts: int, seed: int = 0) -> list[PackedRow]:
    """Rows of so many texts each, of 3 to 9 tokens."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, count in enumerate(counts):
        texts = [np.array([1, *rng.integers(5, VOCABULARY, rng.integers(1, 8)), 2]) for _ in range(count)]
        rows.append(
            PackedRow(
                tokens=np.concatenate(texts).astype(np.int32),
                lengths=tuple(map(len, texts)),
                documents=(number,) * count,
                offsets=(0,) * count,
                sources=(0,) * count,
                key=number,
            )
        )
    return rows


def collate(rows: list[PackedRow], *, chunk: int = 99, kind: Any = "infonce", num_negatives: int = 0) -> PairBatch:
    columns = {"score": [0.5, 3.0, 1.0, 4.0, 0.0], "label": [0, 1, 0, 1, 0]}
    store = SimpleNamespace(column=lambda name, numbers: [columns[name][n] for n in numbers])
    pairs = TrainSet(
        key="x",
        store=store,  # type: ignore[arg-type]
        kind=kind,
        first=0,
        anchor_prefix="",
        positive_prefix="",
        num_negatives=num_negatives,
    )
    return PairCollator(sets=[pairs], chunk_rows=chunk, max_seq_length=16, pad_id=0, seed=1, masks=MASKS)(rows)


def gradients(module: ContrastiveEncoder, batch: PairBatch) -> tuple[float, dict[str, Tensor]]:
    module.zero_grad()
    loss = module(batch).loss_sum
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_packed_texts_have_the_vectors_of_texts_alone() -> None:
    rows = make_rows(2, 3, 2)
    for pooling in ("mean", "cls", "max"):
        module = model(pooling=pooling)
        together = module.embed(collate(rows, num_negatives=1))
        texts = [t for row in rows for t in np.split(row.tokens, np.cumsum(row.lengths)[:-1])]
        alone = torch.cat([module.pool(hidden_states(module, [t]).float(), torch.tensor([len(t)])) for t in texts])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["infonce", "cosent", "supcon", "mlm"])
def test_cached_gradients_are_those_of_the_whole_batch(kind: str) -> None:
    rows = make_rows(*((3, 2, 4, 2, 3) if kind == "infonce" else (2,) * 5 if kind == "cosent" else (1,) * 5))
    module = model(learn_temperature=True, both_directions=True, matryoshka_dims=(4, 8)).double()
    if kind == "mlm":
        module = model(tie_word_embeddings=False, **SOME_MASK).double()
    direct = collate(rows, kind=kind, num_negatives=2)
    whole, expected = gradients(module, direct)
    assert len(direct.chunks) == 1
    for chunk in (1, 2, 4):
        batch = collate(rows, chunk=chunk, kind=kind, num_negatives=2)
        assert len(batch.chunks) == -(-5 // chunk)
        loss, found = gradients(module, batch)
        assert loss == pytest.approx(whole, rel=1e-12)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)


def test_a_chunk_that_holds_everything_is_bit_equal() -> None:
    rows = make_rows(2, 2, 2, 2)
    module = model()
    first, second = gradients(module, collate(rows)), gradients(module, collate(rows, chunk=4))
    assert first[0] == second[0]
    assert all(bool((first[1][name] == second[1][name]).all()) for name in first[1])


def test_cached_gradients_repeat_the_dropout_of_the_forward() -> None:
    """With dropout the loss and its gradient belong to one and the same masks: a tiny step lowers exactly that loss."""
    rows = make_rows(2, 2, 2, 2)
    module = model(dropout_prob=0.3).double()
    batch = collate(rows, chunk=2)

    def loss() -> Tensor:
        torch.manual_seed(5)
        return module(batch).loss_sum

    value = loss()
    value.backward()
    weight = module.encoder.get_parameter("layers.0.qkv.weight")
    assert weight.grad is not None
    expected = 1e-6 * float((weight.grad**2).sum())
    with torch.no_grad():
        weight -= 1e-6 * weight.grad
    assert (value - loss()).item() == pytest.approx(expected, rel=1e-2)


def test_the_loss_is_the_definition_with_negatives_that_are_missing() -> None:
    rows = make_rows(3, 2, 4)
    module = model(temperature=0.1, hard_negative_weight=0.7).double()
    batch = collate(rows, num_negatives=2)
    texts = F.normalize(module.embed(batch), dim=1)
    candidates = [1, 4, 6, 2, 7, 8]  # positives of rows 0 to 2; the negative of row 0; those of row 2
    own_negatives = {0: [2], 1: [], 2: [7, 8]}
    total = 0.0
    for row, (anchor, positive) in enumerate(((0, 1), (3, 4), (5, 6))):
        logits = [
            10 * float(texts[anchor].detach() @ texts[c].detach()) + 0.7 * (c in own_negatives[row]) for c in candidates
        ]
        total -= logits[candidates.index(positive)] - float(torch.logsumexp(torch.tensor(logits).double(), dim=0))
    assert module(batch).loss_sum.item() == pytest.approx(total, rel=1e-6)
    assert batch.num_targets == 3


def test_equal_texts_are_no_negatives_of_each_other() -> None:
    rows = make_rows(2, 2, 2)
    twin = PackedRow(**{**{f: getattr(rows[1], f) for f in PackedRow.__dataclass_fields__}, "key": 9})
    module = model().double()
    alone = module(collate(rows)).loss_sum.item()
    batch = collate([*rows, twin])
    assert batch.text_ids[2] == batch.text_ids[6]
    assert batch.text_ids.unique().numel() == 6
    vectors = F.normalize(module.embed(collate(rows)), dim=1)
    again = 20 * vectors[[0, 2, 4]] @ vectors[[1, 3, 5]].T
    expected = alone + F.cross_entropy(again[1:2], torch.tensor([1]), reduction="sum").item()
    # The twin counts again as an anchor, and twice as a negative of the two other rows.
    for i in (0, 2):
        logits = again[i]
        expected += (torch.logsumexp(torch.cat([logits, logits[1:2]]), 0) - torch.logsumexp(logits, 0)).item()
    assert module(batch).loss_sum.item() == pytest.approx(expected, rel=1e-6)


def test_simcse_compares_two_dropout_masks_of_one_text() -> None:
    rows = make_rows(1, 1, 1)
    doubled = [
        PackedRow(
            tokens=np.concatenate([row.tokens, row.tokens]),
            lengths=row.lengths * 2,
            documents=row.documents * 2,
            offsets=(0, 0),
            sources=(0, 0),
            key=row.key,
        )
        for row in rows
    ]
    module = model(dropout_prob=0.2)
    batch = collate(doubled, kind="simcse")
    vectors = module.embed(batch)
    assert not torch.equal(vectors[batch.anchors], vectors[batch.positives])
    assert module(batch).loss_sum.item() > 0
    module.eval()
    vectors = module.embed(batch)
    torch.testing.assert_close(vectors[batch.anchors], vectors[batch.positives])


def test_matryoshka_is_the_mean_over_widths() -> None:
    batch = collate(make_rows(2, 2, 2))
    module = model(matryoshka_dims=(4,)).double()
    vectors = module.embed(batch)
    losses = []
    for width in (4, 16):
        units = F.normalize(vectors[:, :width], dim=1)
        logits = 20 * units[[0, 2, 4]] @ units[[1, 3, 5]].T
        losses.append(F.cross_entropy(logits, torch.arange(3), reduction="sum").item())
    assert module(batch).loss_sum.item() == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_an_untied_projection_is_trained_only_where_some_steps_mask() -> None:
    batch = collate(make_rows(2, 2, 2))
    frozen, trained = model(tie_word_embeddings=False), model(tie_word_embeddings=False, **SOME_MASK)
    assert "decoder.weight" not in gradients(frozen, batch)[1]
    found = gradients(trained, batch)[1]
    assert found["decoder.weight"].abs().sum() == 0, "there for the reduction over processes"
    masked = collate(make_rows(1, 1, 1), kind="mlm")
    assert masked.num_targets == sum(int((c.targets >= 0).sum()) for c in masked.chunks)
    assert gradients(trained, masked)[1]["decoder.weight"].abs().sum() > 0


def test_a_learned_temperature_moves_and_has_a_floor() -> None:
    module = model(learn_temperature=True, temperature=0.2)
    assert torch.as_tensor(module.scale).item() == pytest.approx(5)
    assert gradients(module, collate(make_rows(2, 2, 2)))[1]["log_scale"].abs() > 0
    with torch.no_grad():
        assert module.log_scale is not None
        module.log_scale.fill_(9.0)
    assert torch.as_tensor(module.scale).item() == pytest.approx(100)
    assert set(module.state_dict()) - set(model().state_dict()) == {TEMPERATURE}
    assert TEMPERATURE.startswith(CONTRASTIVE.training_only), "so it starts fresh from a pretrained encoder"


class Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["infonce", "cosent", "supcon", "mlm"])
def test_a_step_waits_for_no_scalar(kind: str) -> None:
    rows = make_rows(*((3, 2, 4, 2) if kind == "infonce" else (2,) * 4 if kind == "cosent" else (1,) * 4))
    module = model(learn_temperature=True, false_negative_margin=0.1, hard_negative_weight=0.1, dropout_prob=0.1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    batch = collate(rows, chunk=2, kind=kind, num_negatives=2)
    with Counter() as counter:
        train_step(module, optimizer, [batch], lr=1e-3, scale=0.25, gradient_clipping=1.0)
    assert not {"_local_scalar_dense", "nonzero"} & set(counter.names)


def test_a_batch_moves_with_all_its_tensors(tmp_path: Path) -> None:
    batch = collate(make_rows(2, 3), num_negatives=1)
    moved = batch.to(torch.device("meta"))
    assert moved.row_keys.device.type == "cpu"
    assert {moved.anchors.device.type, moved.lengths[0].device.type, moved.chunks[0].input_ids.device.type} == {"meta"}
    assert (moved.num_rows, moved.num_tokens, moved.digest) == (2, batch.num_tokens, batch.digest)


def with_texts(*rows: tuple[str, ...]) -> list[PackedRow]:
    """Rows of texts that are given by name: equal names are equal texts."""
    names = sorted({name for row in rows for name in row})
    ids = {name: np.array([1, 10 + number, 20 + number, 2], dtype=np.int32) for number, name in enumerate(names)}
    made = make_rows(*(len(row) for row in rows))
    return [
        replace(item, tokens=np.concatenate([ids[name] for name in row]), lengths=(4,) * len(row))
        for item, row in zip(made, rows)
    ]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        [("a", "p"), ("b", "p"), ("c", "q")],  # The positive of a row is the positive of another,
        [("a", "p", "n"), ("b", "q", "p"), ("c", "r", "m")],  # a hard negative of another,
        [("a", "p"), ("a", "q"), ("b", "r")],  # an anchor has two positives,
        [("a", "b"), ("b", "c"), ("c", "a")],  # or an anchor is the positive of another.
        [("a", "p", "p"), ("b", "q", "n"), ("a", "p", "m")],
    ],
)
def test_the_texts_of_a_row_are_never_its_negatives(rows: list[tuple[str, ...]], both: bool) -> None:
    module = model(temperature=0.5, both_directions=both).double()
    batch = collate(with_texts(*rows), num_negatives=len(rows[0]) - 2)
    vectors = dict(zip([name for row in rows for name in row], F.normalize(module.embed(batch), dim=1)))

    def loss_of(query: str, answer: str, others: list[str]) -> Tensor:
        """Cross entropy of the answer among the texts that are neither it nor the query."""
        candidates = [answer, *(text for text in others if text not in (query, answer))]
        logits = torch.stack([vectors[query] @ vectors[text] / 0.5 for text in candidates])
        return -F.log_softmax(logits, dim=0)[0]

    def others(number: int, first: int) -> list[str]:
        """What is beside the answer of a row: of other rows from index `first` on, and its own negatives."""
        found = [row[index] for n, row in enumerate(rows) if n != number for index in ([1] if first else [0])]
        return found + ([text for row in rows for text in row[2:]] if first else [])

    expected = torch.stack([loss_of(row[0], row[1], others(n, 1)) for n, row in enumerate(rows)]).sum()
    if both:
        back = torch.stack([loss_of(row[1], row[0], others(n, 0)) for n, row in enumerate(rows)]).sum()
        expected = (expected + back) / 2
    torch.testing.assert_close(module(batch).loss_sum, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "words"), [(1, "up to 1 hard negative a pair"), (2, "up to 2 hard negatives a pair")]
)
def test_the_card_counts_hard_negatives(count: int, words: str) -> None:
    config = Config(task="contrastive", contrastive=ContrastiveSection(num_hard_negatives=count))
    assert words in "\n".join(CONTRASTIVE.card.recipe(config, ["pairs"]))


def teacher_of(width: int) -> Teacher:
    taught = model(hidden_size=width, pooling="cls", seed_of_weights=1).eval().requires_grad_(False)
    return Teacher(module=taught, digest="", num_tokens=VOCABULARY, dtype=torch.float32, pooling="cls")


@pytest.mark.parametrize(("width", "dims"), [(16, ()), (24, ()), (16, (8,))], ids=["vectors", "similarities", "both"])
def test_the_vectors_of_a_teacher_are_learned(width: int, dims: tuple[int, ...]) -> None:
    """Each text by itself through both encoders, one pair at a time through the loss."""
    module, teacher = model(loss_type="distill", matryoshka_dims=dims), teacher_of(width)
    module.learn_from(teacher)
    assert not any("teacher" in name for name in module.state_dict())
    rows = make_rows(2, 1, 2)
    batch = collate(rows, kind="distill", chunk=2)
    loss, found = gradients(module, batch)
    texts = [np.split(row.tokens, np.cumsum(row.lengths)[:-1]) for row in rows]

    def vectors(which: int) -> tuple[list[Tensor], list[Tensor]]:
        chosen = [row[min(which, len(row) - 1)] for row in texts]
        ours = [module.encoder(*alone(text)).mean(dim=0) for text in chosen]
        return ours, [teacher.module.encoder(*alone(text))[0] for text in chosen]

    total = torch.zeros(())
    for which in (0, 1):
        ours, theirs = vectors(which)
        for size in (*dims, 16):
            units = [F.normalize(x[:size], dim=0) for x in ours]
            taught = [F.normalize(x, dim=0) for x in theirs]
            for i in range(3):
                if size == width:
                    total = total + (1 - units[i] @ taught[i])
                else:
                    total = total + sum((units[i] @ units[j] - taught[i] @ taught[j]) ** 2 for j in range(3)) / 3
    total = total / (2 * (1 + len(dims)))
    assert loss == pytest.approx(total.item(), rel=1e-4)
    weights = {name: weight for name, weight in module.named_parameters() if name in found}
    for (name, _), gradient in zip(weights.items(), torch.autograd.grad(total, list(weights.values()))):
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: name + text)


def alone(text: Any) -> tuple[Tensor, Tensor, Segments]:
    length = len(text)
    borders = torch.tensor([0, length], dtype=torch.int32)
    ids = torch.ones(1, length, dtype=torch.int32)
    segments = Segments(ids=ids, cu_seqlens=borders, cu_seqlens_cpu=borders, max_seqlen=length)
    return torch.from_numpy(text)[None], torch.arange(length)[None], segments
