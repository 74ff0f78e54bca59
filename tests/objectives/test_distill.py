"""Distillation: the loss against a plain reference, forward and backward, and what is not part of the student."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from definition import MASKS, VOCABULARY, assert_is_definition, rows
from torch import Tensor

from neobert.config.load import ConfigError, load_config
from neobert.config.schema_distill import DistillSection
from neobert.data.rows.collate import Collator
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.segments import Segments
from neobert.objectives.base import EvalSums, Teacher
from neobert.objectives.distill import DistilledMaskedLM, build_metrics
from neobert.objectives.mlm import MaskedLM
from neobert.objectives.table import recognise_objective
from neobert.types import PackedBatch, PackedRow

ROWS_OF_STUDENT, ROWS_OF_TEACHER = 56, 64
RATE = MASKS.probability


def build_encoder(**options: Any) -> Encoder:
    torch.manual_seed(options.pop("seed", 0))
    values: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "vocab_size": ROWS_OF_STUDENT,
        "pad_token_id": 0,
        "embedding_init_range": 0.5,
        "decoder_init_range": 0.3,
    }
    return Encoder(ModelConfig(**{**values, **options}), ATTENTION["sdpa"])


def build_teacher(**options: Any) -> Teacher:
    encoder = build_encoder(seed=1, **{"vocab_size": ROWS_OF_TEACHER, "hidden_size": 24, **options})
    module = MaskedLM(encoder, kernel=KERNELS["torch"]).double().eval().requires_grad_(False)
    return Teacher(module=module, digest="", num_tokens=VOCABULARY, dtype=torch.float32, pooling="mean")


def build_student(teacher: Teacher, section: DistillSection, **options: Any) -> DistilledMaskedLM:
    module = DistilledMaskedLM(build_encoder(**options), section, kernel=KERNELS["torch"], token_weight=RATE)
    module.learn_from(teacher)
    return module.double()


def collate(packed: list[PackedRow]) -> PackedBatch:
    return Collator(policy=MASKS, seed=1, draw="row", max_seq_length=24, max_segments=8, pad_id=0)(packed)


def states_of(encoder: Encoder, fed: Tensor, start: int, end: int) -> Tensor:
    """The hidden states of one document by itself."""
    length = end - start
    borders = torch.tensor([0, length], dtype=torch.int32)
    ids = torch.ones(1, length, dtype=torch.int32)
    segments = Segments(ids=ids, cu_seqlens=borders, cu_seqlens_cpu=borders, max_seqlen=length)
    return encoder(fed[None, start:end], torch.arange(length)[None], segments)


def reference(module: DistilledMaskedLM, packed: list[PackedRow], batch: PackedBatch) -> Tensor:
    """One document at a time through both encoders, one token at a time through the loss."""
    section, teacher = module.section, module.teacher
    targets = dict(zip(batch.masked_index.tolist(), batch.targets.tolist()))
    total, T = torch.zeros((), dtype=torch.float64), section.temperature
    for number, (row, fed) in enumerate(zip(packed, batch.input_ids)):
        end = 0
        for length in row.lengths:
            start, end = end, end + length
            ours, theirs = (states_of(x.encoder, fed, start, end) for x in (module, teacher.module))
            seen = ours if module.teacher_projection is None else ours @ module.teacher_projection.weight.T
            for slot in range(length):
                cosine: Tensor | float = 1.0
                if section.hidden_weight:
                    cosine = (seen[slot] @ theirs[slot]) / (seen[slot].norm() * theirs[slot].norm())
                total = total + section.hidden_weight * RATE * (1 - cosine)
                target = targets.get(number * 24 + start + slot, -100)
                if target < 0:
                    continue
                logits, taught = module.logits(ours[slot]), teacher.module.logits(theirs[slot])[:VOCABULARY]
                total = total - section.mlm_weight * F.log_softmax(logits, 0)[target]
                p, q = F.softmax(taught / T, 0), F.softmax(logits[:VOCABULARY] / T, 0)
                total = total + section.logits_weight * T**2 * (p * (p.log() - q.log())).sum()
    return total


@pytest.mark.parametrize(
    ("section", "student", "teacher"),
    [
        ({"mlm_weight": 0.5, "logits_weight": 2.0, "hidden_weight": 0.7}, {}, {}),
        ({"temperature": 1.0}, {"tie_word_embeddings": False}, {"decoder_bias": True, "prediction_head": True}),
        ({"hidden_weight": 0.0, "temperature": 3.0}, {"decoder_bias": True}, {"tie_word_embeddings": False}),
        ({"logits_weight": 0.0}, {}, {"hidden_size": 16}),
    ],
    ids=["all three", "projections of both kinds", "predictions alone", "states of one width alone"],
)
def test_loss_and_gradients_are_those_of_the_definition(
    section: dict[str, float], student: dict[str, Any], teacher: dict[str, Any]
) -> None:
    module = build_student(build_teacher(**teacher), DistillSection(**section), **student)
    packed = rows((9, 12), (7, 5, 8))
    batch = collate(packed)
    found, expected = module(batch), reference(module, packed, batch)
    assert_is_definition(module, found.loss_sum, expected)
    plain = MaskedLM(module.encoder, kernel=KERNELS["reference"])
    plain.decoder, plain.decoder_bias = module.decoder, module.decoder_bias
    cross_entropy = plain(batch).loss_sum
    assert (found.loss_sum - found.z_sum).item() == pytest.approx(cross_entropy.item(), rel=1e-5)


def test_an_evaluation_is_of_the_cross_entropy_and_counts_the_agreement() -> None:
    teacher = build_teacher(hidden_size=16, vocab_size=ROWS_OF_STUDENT)
    module, batch = build_student(teacher, DistillSection()), collate(rows((20,), (22,)))
    expected = MaskedLM(module.encoder, kernel=KERNELS["torch"]).double().eval()(batch)
    with torch.no_grad():
        found = module.eval()(batch)
    assert found.loss_sum.item() == pytest.approx(expected.loss_sum.item())
    assert found.num_correct == expected.num_correct

    def measure() -> Any:
        with torch.no_grad():
            found = module(batch)
        return build_metrics(
            EvalSums(
                loss_sum=float(found.loss_sum),
                num_correct=float(found.num_correct),
                counts=tuple(found.counts.tolist()),
                num_targets=batch.num_targets,
                num_tokens=batch.num_tokens,
                num_documents=2,
            )
        )

    before = measure()
    assert before.agreement < 1
    assert before.hidden_cosine < 0.9
    assert before.divergence > 0.1
    module.load_state_dict(teacher.module.state_dict())
    after = measure()
    assert (after.agreement, after.hidden_cosine) == (1.0, pytest.approx(1.0, abs=1e-5))
    assert after.divergence == pytest.approx(0.0, abs=1e-4)
    assert "same guess 100.00%" in after.describe()
    assert after.as_values()["eval/agreement"] == 1.0


def test_the_teacher_is_no_part_of_the_student() -> None:
    teacher = build_teacher()
    module = build_student(teacher, DistillSection())
    names = set(module.state_dict())
    assert {name for name in names if "teacher" in name} == {"teacher_projection.weight"}
    assert recognise_objective(names).name == "distill"
    assert recognise_objective(names - {"teacher_projection.weight"}).name == "mlm"
    assert not any(p is q for p in module.parameters() for q in teacher.module.parameters())
    module.train()
    assert not teacher.module.training
    module(collate(rows((20,)))).loss_sum.backward()
    assert all(p.grad is None for p in teacher.module.parameters())
    assert copy.deepcopy(module).teacher is teacher


@pytest.mark.parametrize(
    ("keys", "sentences"),
    [
        ([], ["distill.teacher: null"]),
        (["distill.logits_weight=0", "distill.hidden_weight=0"], ["distill.logits_weight: 0", "distill.teacher"]),
        (["distill.temperature=0"], ["distill.temperature: 0"]),
        (["distill.mlm_weight=-1"], ["distill.mlm_weight: -1"]),
        (["distill.teacher=x", "distill.logits_weight=0", "distill.temperature=3"], ["distill.temperature: 3"]),
        (["distill.teacher=x", "trainer.z_loss=1e-4"], ["trainer.z_loss: 0.0001"]),
        (["distill.teacher=x", "trainer.masked_logits_only_loss=false"], ["trainer.masked_logits_only_loss: false"]),
        (["distill.teacher=x", "tokenizer.path=null", "tokenizer.train=true"], ["tokenizer.train: true"]),
        (["distill.teacher=x", "trainer.objective=mlm"], ["distill.teacher: x has no effect with trainer.objective"]),
    ],
)
def test_what_cannot_be_learned_is_named(keys: list[str], sentences: list[str]) -> None:
    base = ["dataset.name=python_stdlib", "tokenizer.path=somewhere", "trainer.max_steps=1"]
    with pytest.raises(ConfigError) as error:
        load_config(None, [*base, "trainer.objective=distill", *keys])
    assert all(sentence in str(error.value) for sentence in sentences)


def test_a_config_needs_no_tokenizer_beside_a_teacher() -> None:
    keys = ["dataset.name=python_stdlib", "trainer.max_steps=1", "trainer.objective=distill", "distill.teacher=x"]
    assert load_config(None, keys).tokenizer.path is None
