"""`trainer.bf16_residual`: bf16 computes, fp32 masters learn; checkpoints hold the masters, a resume repeats them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import run_in_two
from records import exact_steps, log_lines
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters

import neobert
from neobert.benchmark.settings import StepSettings
from neobert.benchmark.step_time import made_up_rows
from neobert.cli import EXIT_CODES
from neobert.config.load import ConfigError
from neobert.config.schema import Config
from neobert.config.schema_optimizer import MuonSection, OptimizerSection
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.encoder import Encoder
from neobert.objectives.mlm import MaskedLM
from neobert.optim.optimizers import OPTIMIZERS, build_optimizer
from neobert.optim.qk_clip import QKClip
from neobert.train.hardware import micro_batch
from neobert.train.loop import pretrain
from neobert.train.master_weights import MasterWeights
from neobert.train.step import train_step
from neobert.types import PackedBatch

Tiny = Callable[..., Config]
ON = ("trainer.mixed_precision=bf16", "trainer.bf16_residual=true")
ROWS = StepSettings(preset="tiny", length=32, rows=2, mean_document=12.0, vocab_size=60, steps=3)
SOURCE = made_up_rows(ROWS)
BATCHES = [next(SOURCE.batches) for _ in range(3)]


def build(**options: Any) -> MaskedLM:
    torch.manual_seed(0)
    return MaskedLM(Encoder(SOURCE.model, ATTENTION["sdpa"], **options), kernel=KERNELS["torch"])


class MeansOfSteps:
    """Master weights by hand: three steps of two micro-batches, in the words of the definition."""

    def __init__(self, name: str) -> None:
        self.masters, self.computing = build(), build()
        for part in self.computing.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                part.to(torch.bfloat16)
        self.optimizer = build_optimizer(self.masters, OptimizerSection(name=name))

    def step(self, batches: list[PackedBatch], lr: float) -> Tensor:
        masters, own = dict(self.masters.named_parameters()), dict(self.computing.named_parameters())
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(masters[name])
        sums = {name: torch.zeros_like(master) for name, master in masters.items()}
        total = torch.zeros(())
        for batch in batches:
            loss = self.computing(batch).loss_sum
            for name, gradient in zip(own, torch.autograd.grad(loss * 0.01, list(own.values()))):
                sums[name] += gradient.float()
            total += loss.detach()
        for name, master in masters.items():
            master.grad = sums[name]
        nn.utils.clip_grad_norm_(list(masters.values()), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return total


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["", "recomputed"])
def test_steps_are_those_of_a_loop_with_masters_by_hand(name: str, options: dict[str, bool]) -> None:
    hand, module = MeansOfSteps(name), build(**options)
    model, optimizer = MasterWeights(module).train(), build_optimizer(module, OptimizerSection(name=name))
    before = {name: weight.detach().clone() for name, weight in module.state_dict().items()}
    for number in range(3):
        batches, lr = [BATCHES[number], BATCHES[(number + 1) % 3]], 0.01 / (1 + number)
        result = train_step(model, optimizer, batches, lr=lr, scale=0.01, gradient_clipping=1.0)
        assert torch.equal(result.loss_sum, hand.step(batches, lr))
    for name, weight in module.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, hand.masters.state_dict()[name]), name
        assert not torch.equal(weight, before[name]), name


def test_the_stream_is_bf16_and_gains_of_norms_are_the_masters() -> None:
    module = build()
    model, seen = MasterWeights(module), []
    model.computing.encoder.observe = lambda layer, x, *_: seen.append(x.dtype)
    model(BATCHES[0]).loss_sum.backward()
    assert set(seen) == {torch.bfloat16}
    kinds = {name: weight.dtype for name, weight in model.computing.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == {n for n in kinds if "norm" in n}
    assert model.computing.encoder.norm.weight is module.encoder.norm.weight
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in module.parameters())
    assert {id(p) for p in model.parameters()} == {id(p) for p in module.parameters()}


def test_whatever_changes_the_masters_is_seen_by_the_next_pass() -> None:
    module = build()
    model = MasterWeights(module).eval()
    with torch.no_grad():
        first = model(BATCHES[0]).loss_sum
        for master in module.parameters():  # As a moving average does, which no counter of changes sees.
            master.data = master.data * 1.5
        second = model(BATCHES[0]).loss_sum
    fresh = MasterWeights(module).eval()(BATCHES[0]).loss_sum
    assert torch.equal(second, fresh)
    assert not torch.equal(first, second)
    assert not model.computing.training


def test_attention_logits_are_measured_in_bf16_and_clipped_in_the_masters() -> None:
    module = build()
    model = MasterWeights(module)
    section = MuonSection(clipping_interval=1, clipping_threshold=1e-4)
    clip = QKClip(module.encoder, section, computing=model.computing.encoder)
    optimizer = build_optimizer(module, OptimizerSection(name="muonclip"))
    clip.clip_after(optimizer)
    before = module.encoder.layers[0].qkv.weight.detach().clone()
    with clip.measuring(0, 1):
        train_step(model, optimizer, [BATCHES[0]], lr=0.0, scale=0.01)
    assert clip.read()["clipped_heads"] == 4
    after, rows = module.encoder.layers[0].qkv.weight, 2 * SOURCE.model.hidden_size
    assert (after[:rows].abs() < before[:rows].abs()).all()
    assert torch.equal(after[rows:], before[rows:])


RUNS = {
    "adamw, average, spikes, accumulation": [
        "model.dropout_prob=0.1",
        "trainer.ema_decay=0.8",
        "trainer.skip_spikes=6",
        "trainer.global_batch_size=8",
        "trainer.log_statistics=true",
        "model.decoder_bias=true",
    ],
    "muonclip, recomputed": [
        "optimizer.name=muonclip",
        "optimizer.muon_config.clipping_interval=2",
        "optimizer.muon_config.clipping_threshold=0.02",
        "trainer.gradient_checkpointing=true",
    ],
    "replaced tokens, stable_adamw": [
        "trainer.objective=replaced_token",
        "optimizer.name=stable_adamw",
        "model.tie_word_embeddings=false",
        "trainer.async_save=true",
    ],
    "normalised": [
        "model.ngpt=true",
        "optimizer.weight_decay=0",
        "optimizer.name=normuon",
        "optimizer.muon_config.enable_clipping=false",
    ],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_the_uninterrupted_one(tiny: Tiny, tmp_path: Path, name: str) -> None:
    whole, parts, keys = tmp_path / "whole", tmp_path / "parts", [*ON, *RUNS[name]]
    pretrain(tiny(whole, *keys, "trainer.max_steps=8"))
    pretrain(tiny(parts, *keys, "trainer.max_steps=8", f"trainer.resume_from_checkpoint={whole / 'checkpoints' / '4'}"))
    assert exact_steps(parts) == exact_steps(whole, after=4)
    for kind in ("eval", "eval_ema"):
        assert [x for x in log_lines(parts, kind) if x["step"] > 4] == [
            x for x in log_lines(whole, kind) if x["step"] > 4
        ]
    files = [path.name for path in (whole / "checkpoints/8").glob("*.safetensors")]
    for file in files:
        a, b = (load_file(x / "checkpoints/8" / file) for x in (whole, parts))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert {weight.dtype for weight in a.values()} == {torch.float32}
        matrix = a["encoder.layers.0.qkv.weight"]
        assert not torch.equal(matrix, matrix.bfloat16().float()), "what learns is not rounded"
    losses = [line["loss"] for line in log_lines(whole, "step")]
    assert losses[-1] < losses[0]


def test_the_checkpoint_is_one_of_any_run(tiny: Tiny, tmp_path: Path) -> None:
    """Used, started from, and continued under autocast, which is the same computation rounded elsewhere."""
    run, other = tmp_path / "run", tmp_path / "other"
    pretrain(tiny(run, *ON, "trainer.max_steps=4"))
    assert neobert.load(run).hidden_states(["a text"])[0].dtype == torch.float32
    pretrain(tiny(other, ON[0], "trainer.max_steps=6", f"trainer.resume_from_checkpoint={run}"))
    pretrain(tiny(tmp_path / "third", *ON, f"model.init_from={run}", "trainer.max_steps=1"))
    first = log_lines(tmp_path / "third", "step")[0]["loss"]
    assert first < log_lines(run, "step")[0]["loss"] - 0.1


def test_losses_stay_close_to_those_of_autocast(tiny: Tiny, tmp_path: Path) -> None:
    keys = ["trainer.max_steps=30", "trainer.eval_steps=0", "trainer.save_steps=0", "optimizer.lr=3e-3"]
    losses = []
    for name, more in (("autocast", ON[:1]), ("residual", ON)):
        pretrain(tiny(tmp_path / name, *keys, *more))
        losses.append(torch.tensor([line["loss"] for line in log_lines(tmp_path / name, "step")]))
    assert not torch.equal(*losses)
    assert ((losses[0] - losses[1]).abs() / losses[0]).max() < 0.005
    assert losses[1][-1] < losses[1][0] - 0.3


def test_two_processes_train_what_one_does(tiny: Tiny, tmp_path: Path) -> None:
    keys = [*ON, "trainer.global_batch_size=8", "trainer.max_steps=4", "trainer.eval_steps=0", "optimizer.lr=3e-3"]
    pretrain(tiny(tmp_path / "one", *keys, "trainer.per_device_train_batch_size=1"))
    config = tiny(tmp_path / "two", *keys, "trainer.per_device_train_batch_size=1")
    run_in_two(lambda: EXIT_CODES[pretrain(config).reason], tmp_path)
    one, two = (log_lines(tmp_path / name, "step") for name in ("one", "two"))
    # The same micro-batches, of one row, whose gradients are added in another order; a weight that differs by an error
    # of rounding in fp32 may differ by one of bf16 in the next step.
    for name, first, later in (("loss", 1e-6, 1e-3), ("grad_norm", 1e-5, 1e-2)):
        expected, found = ([line[name] for line in lines] for lines in (one, two))
        assert found[0] == pytest.approx(expected[0], rel=first)
        assert found == pytest.approx(expected, rel=later)


def test_compiled_blocks_have_the_gradients_of_eager_ones() -> None:
    """All blocks in one graph, recomputed in the backward pass."""
    grads = []
    torch.compiler.reset()
    counters.clear()
    for compiled in (False, True):
        module = build(gradient_checkpointing=True)
        model = MasterWeights(module)
        for block in model.computing.encoder.layers if compiled else ():
            block.compile(backend="aot_eager", dynamic=False)
        model(BATCHES[0]).loss_sum.backward()
        grads.append([p.grad for p in module.parameters()])
    torch.compiler.reset()
    assert counters["stats"]["unique_graphs"] == 1
    for eager, own in zip(*grads, strict=True):
        assert eager is not None
        torch.testing.assert_close(own, eager, rtol=2e-2, atol=1e-2 * eager.abs().max().item())


def test_without_bf16_it_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bf16_residual: true has no effect .*write trainer.mixed_precision: bf16"):
        tiny(tmp_path, ON[1])


def test_a_micro_batch_is_measured_with_master_weights(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[nn.Module] = []

    def step(model: nn.Module, *given: Any, **named: Any) -> Any:
        assert not torch.is_autocast_enabled("cpu")
        models.append(model)
        return train_step(model, *given, **named)

    monkeypatch.setattr(micro_batch, "train_step", step)
    keys = [*ON, "trainer.per_device_train_batch_size=auto", "trainer.global_batch_size=1", "trainer.max_steps=1"]
    assert pretrain(tiny(tmp_path / "run", *keys, "trainer.eval_steps=0", "trainer.save_model=false")).state.step == 1
    assert models
    assert all(isinstance(model, MasterWeights) for model in models)
