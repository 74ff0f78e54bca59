"""Nothing in a step reads a value back from the device: not the model, the loss, the clipping, the optimizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neobert.config.schema import Config
from neobert.config.schema_optimizer import MuonSection, OptimizerSection
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.config import ModelConfig
from neobert.model.encoder import Encoder
from neobert.model.segments import Segments
from neobert.objectives.mlm import MaskedLM
from neobert.optim.optimizers import OPTIMIZERS, build_optimizer, keep_unit_length, step_unless
from neobert.optim.qk_clip import QKClip
from neobert.train.loop import training_steps
from neobert.train.numerics import LateFlag
from neobert.train.run import build_run
from neobert.types import IGNORE_INDEX, PackedBatch, TrainState

WAITING = ("_local_scalar_dense", "nonzero", "item", "equal", "masked_select", "unique")
"""Operators whose result, or the shape of it, has to be known on the host before anything can continue."""


class WaitsForTheDevice(TorchDispatchMode):
    """Records every operator that makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.num_operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.num_operators += 1
        if name in WAITING or name.startswith("unique"):
            self.found.append(name)
        if name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.found.append("index by a mask")
        return func(*args, **(kwargs or {}))


def model_and_batch(**options: Any) -> tuple[MaskedLM, PackedBatch]:
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        vocab_size=40,
        pad_token_id=0,
        local_attention=4,
        **options.pop("variant", {}),
    )
    attention = options.pop("attention", ATTENTION["sdpa"])
    checkpointing = options.pop("gradient_checkpointing", False)
    encoder = Encoder(config, attention, gradient_checkpointing=checkpointing)
    module = MaskedLM(encoder, **{"kernel": KERNELS["torch"], "z_loss": 1e-4, "count_correct": True, **options})
    borders = torch.tensor([0, 9, 16, 21, 32, 32, 32], dtype=torch.int32)
    ids = torch.tensor([[1] * 9 + [2] * 7, [1] * 5 + [0] * 11], dtype=torch.int32)
    return module, PackedBatch(
        input_ids=torch.randint(1, 40, (2, 16), dtype=torch.int32),
        positions=torch.cat([torch.arange(9), torch.arange(7), torch.arange(5), torch.zeros(11)]).view(2, 16).int(),
        segments=Segments(ids=ids, cu_seqlens=borders, cu_seqlens_cpu=borders, max_seqlen=16),
        masked_index=torch.tensor([1, 4, 11, 18, 0]),
        targets=torch.tensor([5, 6, 7, 8, IGNORE_INDEX]),
        row_keys=torch.arange(2),
        source_tokens=(21,),
        num_tokens=21,
        num_targets=4,
        num_documents=3,
        attended_tokens=155,
        digest=0,
    )


def waits(module: MaskedLM, batch: PackedBatch, *, autocast: bool, name: str = "adamw") -> WaitsForTheDevice:
    """One step as the trainer makes it, after one that builds the optimizer's state."""
    optimizer = build_optimizer(module, OptimizerSection(name=name, lr=1e-3))
    keep_unit_length(optimizer, module.unit_matrices())

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = module(batch)
        (loss.loss_sum * (1 / batch.num_targets)).backward()
        torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], 1.0)
        step_unless(optimizer, torch.tensor(False))
        optimizer.zero_grad(set_to_none=True)

    step()
    with WaitsForTheDevice() as mode:
        step()
    return mode


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"all_positions": True},
        {"gradient_checkpointing": True},
        {"variant": {"ngpt": True}},
        {"variant": {"qk_norm": True, "embedding_norm": True, "decoder_bias": True}},
    ],
    ids=["masked", "all positions", "checkpointing", "normalised", "norms and bias"],
)
def test_a_step_never_waits_for_the_device(options: dict[str, Any], autocast: bool) -> None:
    mode = waits(*model_and_batch(**options), autocast=autocast)
    assert mode.num_operators > 100
    assert mode.found == []


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon does not read a flag early, as it may on a CPU."""
    monkeypatch.setattr("neobert.optim.muon.is_free_to_read", lambda tensor: False)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_waits_for_the_device(name: str) -> None:
    assert waits(*model_and_batch(), autocast=True, name=name).found == []


@pytest.mark.usefixtures("as_on_a_gpu")
def test_measuring_and_clipping_attention_logits_never_wait() -> None:
    module, batch = model_and_batch()
    optimizer = build_optimizer(module, OptimizerSection(name="muonclip", lr=1e-3))
    clip = QKClip(module.encoder, MuonSection(clipping_interval=1, clipping_threshold=1e-6))
    clip.clip_after(optimizer)

    def step() -> None:
        with clip.measuring(0, 1):
            module(batch).loss_sum.backward()
            step_unless(optimizer, torch.tensor(False))

    step()
    with WaitsForTheDevice() as mode:
        step()
    assert mode.found == []
    assert clip.read()["clipped_heads"] == 6


def test_the_check_sees_a_wait() -> None:
    def reading_kernel(*args: Any, **named: Any) -> Any:
        loss, *rest = KERNELS["reference"](*args, **named)
        return loss * float(loss.detach() > -1), *rest

    assert waits(*model_and_batch(kernel=reading_kernel), autocast=False).found
    batch = model_and_batch()[1]
    with WaitsForTheDevice() as mode:
        batch.targets[batch.targets > 0]
    assert mode.found == ["index by a mask"]


@pytest.mark.parametrize("name", ["flash_attn_varlen", "flex", "sdpa"])
def test_preparing_attention_reads_the_device_never(name: str) -> None:
    """Borders on the device stay there; the host has its own copy."""
    batch = model_and_batch()[1]
    with WaitsForTheDevice() as mode:
        ATTENTION[name].prepare(batch.segments, 4)
    assert mode.found == []


@pytest.mark.parametrize("autocast", ["no", "bf16"])
def test_between_two_logging_points_nothing_waits(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autocast: str
) -> None:
    """The real loop: batches, copies, steps, the watch over bad numbers, the record.

    The flag of a skipped step is read a step late from a copy on the host; that read is left out here.
    """
    monkeypatch.setattr(LateFlag, "read", lambda flag: False)
    keys = ("trainer.max_steps=8", "trainer.logging_steps=8", "trainer.eval_steps=0", "trainer.save_steps=0")
    run = build_run(tiny(tmp_path / "run", *keys, f"trainer.mixed_precision={autocast}"))
    steps = training_steps(run, TrainState())
    run.tracker.add(*next(steps))
    with WaitsForTheDevice() as mode:
        for _ in range(6):
            run.tracker.add(*next(steps))
    steps.close()
    run.runtime.close()
    assert mode.num_operators > 1000
    assert mode.found == []
