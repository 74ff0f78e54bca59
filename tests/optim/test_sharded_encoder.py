"""Clipping of attention logits and unit length where rows of the weights are on several gloo processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from children import run_on
from test_qk_clip import POSITIONS, SEGMENTS, H, S, build, tokens
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from neobert.config.schema_optimizer import MuonSection, OptimizerSection
from neobert.objectives.mlm import MaskedLM
from neobert.optim.optimizers import build_optimizer, keep_unit_length, step_unless
from neobert.optim.qk_clip import QKClip

SECTION = OptimizerSection(
    name="muonclip", lr=0.02, muon_config=MuonSection(clipping_interval=2, clipping_threshold=0.02)
)

TARGET = torch.randn(2 * S, H, generator=torch.Generator().manual_seed(0))


def train(module: MaskedLM) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Four steps, of which the second and the fourth clip and the third must not count: what was measured, and the
    whole weights."""
    optimizer = build_optimizer(module, SECTION)
    clip = QKClip(module.encoder, SECTION.muon_config)
    clip.clip_after(optimizer)
    keep_unit_length(optimizer, module.unit_matrices())
    for step in range(4):
        with clip.measuring(step, 1):
            (module.encoder(tokens(step), POSITIONS, SEGMENTS) * TARGET).sum().backward()
            step_unless(optimizer, torch.tensor(step == 2))
        optimizer.zero_grad()
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in module.named_parameters()}
    return clip.read(), whole


def shard(module: MaskedLM) -> None:
    for block in module.encoder.layers:
        fully_shard(block)
    fully_shard(module.encoder)


def train_sharded(folder: Path) -> int:
    """What one rank does; all have the same rows, so the mean gradient is that of one."""
    dist.init_process_group("gloo")
    module = build()
    shard(module)
    torch.save(train(module), folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
    return 0


@pytest.mark.parametrize("world", [2, 3])
def test_heads_are_clipped_by_the_owners_of_their_rows(world: int, tmp_path: Path) -> None:
    """48 rows of queries, keys and values on three ranks: the borders cut no head, on two they cut the keys."""
    run_on(world, lambda: train_sharded(tmp_path), tmp_path)
    wanted, weights = train(build())
    assert wanted["clipped_heads"] > 0
    for rank in range(world):
        found, own = torch.load(tmp_path / f"{rank}.pt")
        assert found == pytest.approx(wanted, rel=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(own[name], weight, rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")  # noqa: B023


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.columns = nn.Linear(5, 4, bias=False), nn.Linear(4, 5, bias=False)


def normalise_sharded() -> int:
    """What one rank does: scales shards as one process scales the whole."""
    dist.init_process_group("gloo")
    module = Pair()
    fully_shard(module)
    for skipped in (False, True):
        optimizer = build_optimizer(module, OptimizerSection(name="adamw", lr=0.1, weight_decay=0.0))
        keep_unit_length(optimizer, [(module.rows.weight, 1), (module.columns.weight, 0)])
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        step_unless(optimizer, torch.tensor(skipped))
        lengths = [p.full_tensor().norm(dim=dim) for p, dim in ((module.rows.weight, 1), (module.columns.weight, 0))]  # type: ignore[operator]
        torch.testing.assert_close(lengths, [torch.ones(4), torch.ones(4)])
    dist.destroy_process_group()
    return 0


def test_columns_whose_rows_are_on_several_ranks_have_length_one(tmp_path: Path) -> None:
    run_on(3, normalise_sharded, tmp_path)
