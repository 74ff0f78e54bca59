"""Muon and NorMuon whose work several gloo processes share, over copies of the weights and over rows, against one."""

import copy
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from block_weights import Block, F, H, Model
from children import run_on
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from neobert.config.schema_optimizer import MuonSection, OptimizerSection
from neobert.optim import muon
from neobert.optim.muon import Muon
from neobert.optim.optimizers import build_optimizer, step_unless
from neobert.optim.orthogonal import orthogonalize
from neobert.optim.owners import assign_owners, count_products, find_ranks, row_range
from neobert.optim.sharded_weights import local

HEADS = "normuon, heads and cautious decay"
KINDS = [*itertools.product(("muonclip", "normuon"), (torch.float32, torch.bfloat16)), (HEADS, torch.bfloat16)]
"""Optimizers and types of their products."""

NUM_HEADS = 3
NUM_MATRICES = {"muonclip": 2 * 7, "normuon": 2 * 7, HEADS: 2 * (2 * NUM_HEADS + 5)}
SKIPPED = 2
"""Of the steps of a comparison, one that must not count."""


def build_module() -> Model:
    torch.manual_seed(0)
    return Model()


def build(module: nn.Module, name: str, dtype: torch.dtype) -> Muon:
    section = OptimizerSection(
        name=name.partition(",")[0],  # type: ignore[arg-type]
        lr=0.1,
        cautious_weight_decay=name == HEADS,
        muon_config=MuonSection(muon_decay=0.3, nesterov=True, split_heads=name == HEADS),
    )
    optimizer = build_optimizer(module, section, dtype=dtype, num_heads=NUM_HEADS)
    assert isinstance(optimizer, Muon)
    return optimizer


def make_steps(module: nn.Module, optimizer: Muon, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in module.parameters():
            grad = torch.randn(p.shape, generator=generator) * (torch.nan if step == SKIPPED else 1)
            p.grad = grad
            if isinstance(p, DTensor):
                # Every process has made the same: nothing is sent.
                p.grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
        step_unless(optimizer, torch.tensor(step == SKIPPED))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(module: nn.Module, optimizer: Muon) -> dict[str, torch.Tensor]:
    """Weights and optimizer state by name; collective."""
    found = {name: whole(p.detach()).clone() for name, p in module.named_parameters()}
    for name, p in module.named_parameters():
        found |= {f"{key} of {name}": whole(value).clone() for key, value in optimizer.state[p].items()}
    return found


@pytest.fixture(scope="module")
def alone() -> dict[Any, dict[str, torch.Tensor]]:
    """What one process has after four steps, of which one is skipped, by the optimizer and the type of its products."""
    found = {}
    for name, dtype in KINDS:
        module = build_module()
        optimizer = build(module, name, dtype)
        make_steps(module, optimizer, range(4))
        found[name, dtype] = whole_state(module, optimizer)
    return found


def copies(module: Model, optimizer: Callable[[], Muon]) -> Muon:
    """Every rank has every weight."""
    built = optimizer()
    built.share(dist.group.WORLD)
    return built


def rows(module: Model, optimizer: Callable[[], Muon]) -> Muon:
    """Rows on the ranks, block by block, as a run under FSDP2 has them."""
    for block in module.layers:
        fully_shard(block)
    fully_shard(module)
    return optimizer()


def rows_of_copies(module: Model, optimizer: Callable[[], Muon]) -> Muon:
    """Two replicas of two shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for block in module.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return optimizer()


LAYOUTS = {"copies": copies, "rows": rows, "rows_of_copies": rows_of_copies}


def compare_with(alone: dict[Any, dict[str, torch.Tensor]], layout: str) -> int:
    """What one rank does: every optimizer gives what it gives in one process."""
    dist.init_process_group("gloo")
    computed: list[int] = []

    def counting(stack: torch.Tensor, **settings: Any) -> torch.Tensor:
        computed.append(len(stack))
        return orthogonalize(stack, **settings)

    setattr(muon, "orthogonalize", counting)  # noqa: B010
    for name, dtype in KINDS:
        # As on a GPU: whether a step counts is not known when it is made.
        waits = dtype == torch.float32
        setattr(muon, "is_free_to_read", lambda tensor: waits)  # noqa: B010, B023
        module = build_module()
        optimizer = LAYOUTS[layout](module, lambda: build(module, name, dtype))  # noqa: B023
        computed.clear()
        make_steps(module, optimizer, range(4))
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, sum(computed))
        # No matrix is computed twice, and where the flag can be read a step that is skipped computes nothing.
        assert sum(counts) == (3 if waits else 4) * NUM_MATRICES[name]
        assert name == HEADS or max(counts) - min(counts) <= 2 * 4, counts
        found = whole_state(module, optimizer)
        assert found.keys() == alone[name, dtype].keys()
        for key, wanted in alone[name, dtype].items():
            bound = 1e-6 if dtype == torch.float32 else 1e-4
            torch.testing.assert_close(found[key], wanted, rtol=bound, atol=bound, msg=lambda m: f"{key}: {m}")  # noqa: B023
        if layout == "copies":
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, found)
            assert all(torch.equal(tensor, every[0][key]) for key, tensor in found.items()), (
                "ranks are equal to the bit"
            )
    dist.destroy_process_group()
    return 0


@pytest.mark.parametrize(
    ("layout", "world"), [("copies", 2), ("copies", 3), ("rows", 2), ("rows", 3), ("rows_of_copies", 4)]
)
def test_ranks_that_share_the_work_have_the_weights_and_state_of_one(
    alone: dict[Any, dict[str, torch.Tensor]], layout: str, world: int, tmp_path: Path
) -> None:
    """Rows of 12, 36 and 40 on three ranks: borders of shards cut the matrices of fused weights."""
    run_on(world, lambda: compare_with(alone, layout), tmp_path)


def note_call(calls: list[tuple[str, int]], real: Callable[..., Any], output: Any, *args: Any, **named: Any) -> Any:
    """A collective that notes its name and the bytes of its result."""
    calls.append((real.__name__, sum(t.nbytes for t in output) if isinstance(output, list) else output.nbytes))
    return real(output, *args, **named)


def count_exchanges(folder: Path) -> int:
    """What one rank does: notes its collectives in a step, and the bytes of its state."""
    dist.init_process_group("gloo")
    calls: list[tuple[str, int]] = []
    for name in ("all_gather", "all_to_all_single", "all_reduce"):
        setattr(dist, name, partial(note_call, calls, getattr(dist, name)))
    found = {}
    for layout, (name, dtype) in itertools.product(("copies", "rows"), KINDS):
        module = build_module()
        optimizer = LAYOUTS[layout](module, lambda: build(module, name, dtype))  # noqa: B023
        make_steps(module, optimizer, range(1))
        calls.clear()
        make_steps(module, optimizer, range(1, 2))
        state = sum(
            local(optimizer.state[p]["momentum"]).nbytes
            for p in module.parameters()
            if "momentum" in optimizer.state[p]
        )
        found[layout, name, dtype] = (list(calls), state)
    torch.save(found, folder / f"calls-{dist.get_rank()}.pt")
    dist.destroy_process_group()
    return 0


def test_a_step_exchanges_in_one_call_and_the_momentum_of_rows_is_shared(tmp_path: Path) -> None:
    run_on(2, lambda: count_exchanges(tmp_path), tmp_path)
    every = [torch.load(tmp_path / f"calls-{rank}.pt", weights_only=False) for rank in range(2)]
    elements = 2 * (4 * H * H + 3 * H * F)
    for name, dtype in KINDS:
        calls, state = every[0]["copies", name, dtype]
        assert [call for call, _ in calls] == ["all_gather"]
        # All factors and what fills the smaller part up to the larger one, a matrix at most.
        assert 0 <= calls[0][1] - elements * dtype.itemsize <= H * F * dtype.itemsize
        assert state == 4 * elements
        assert sum(of_rank["rows", name, dtype][1] for of_rank in every) == 4 * elements
        to_owner, to_rows, *sums = every[0]["rows", name, dtype][0]
        assert (to_owner[0], to_rows[0]) == ("all_to_all_single", "all_to_all_single")
        # Directions in fp32 to the owners; of the factors the rows of this rank, in the type of the products.
        assert sum(of_rank["rows", name, dtype][0][0][1] for of_rank in every) == 4 * elements
        assert sum(of_rank["rows", name, dtype][0][1][1] for of_rank in every) == dtype.itemsize * elements
        equal_rows = name != "muonclip"
        assert {call for call, _ in sums} == ({"all_reduce"} if equal_rows else set())
        assert sum(size for _, size in sums) == (4 * 2 * NUM_MATRICES[name] if equal_rows else 0)


def resume_chain(folder: Path, start: int, stop: int) -> int:
    """What one rank does: resumes the state of `folder`, makes steps, and saves what rank 0 has."""
    dist.init_process_group("gloo")
    module = build_module()
    optimizer = build(module, "normuon", torch.float32)
    if dist.get_world_size() > 1:
        optimizer.share(dist.group.WORLD)
    if start:
        saved = torch.load(folder / "saved.pt")
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
    make_steps(module, optimizer, range(start, stop))
    dist.barrier()  # All have read the file.
    if dist.get_rank() == 0:
        torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, folder / "saved.pt")
    dist.destroy_process_group()
    return 0


def test_state_that_rank_0_saves_continues_on_any_number_of_ranks(
    alone: dict[Any, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    for start, world in enumerate((2, 3, 2)):
        run_on(world, lambda: resume_chain(tmp_path, start, start + 1), tmp_path)  # noqa: B023
    saved = torch.load(tmp_path / "saved.pt")
    module = build_module()
    optimizer = build(module, "normuon", torch.float32)
    module.load_state_dict(saved["module"])
    optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    make_steps(module, optimizer, range(3, 4))
    for key, wanted in alone["normuon", torch.float32].items():
        torch.testing.assert_close(whole_state(module, optimizer)[key], wanted, rtol=1e-6, atol=1e-6)


def lay_out_wrongly() -> int:
    """What one rank does: finds that columns cannot be shared."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.ones(4, 6)
    columns = distribute_tensor(weight, mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"Muon takes rows .*Shard\(0\)"):
        find_ranks(columns)  # type: ignore[arg-type]
    assert [r.size for r in find_ranks(distribute_tensor(weight, mesh, [Replicate()]))] == [2, 1]  # type: ignore[arg-type]
    module = Block()
    optimizer = Muon(
        [{"params": [module.out.weight], "names": ["layers.0.out.weight"], "roles": ["matrices"], "weight_decay": 0}],
        MuonSection(),
        dtype=torch.float32,
        equal_rows=False,
        lr=0.1,
        betas=(0.9, 0.9),
        eps=1e-8,
    )
    with pytest.raises(ValueError, match="shard all of them alike"):
        optimizer.find_owners([("a.weight", weight), ("b.weight", columns)])
    dist.destroy_process_group()
    return 0


def test_other_layouts_are_refused(tmp_path: Path) -> None:
    run_on(2, lay_out_wrongly, tmp_path)


# ---- who owns what ----


def test_work_is_balanced_by_its_cost_and_not_by_its_count() -> None:
    small, large = count_products(8, 8), count_products(8, 64)
    owners = assign_owners([large, small, small, small, small, small], 2)
    assert owners[0] == 0
    assert owners[1:].count(1) == 5, "five small ones are less than a large one"


@pytest.mark.parametrize("world", [1, 2, 3, 7, 64])
def test_every_matrix_of_a_base_model_has_one_owner_and_no_rank_has_much_more(world: int) -> None:
    hidden, ffn, layers = 768, 2048, 28
    shapes = [(hidden, hidden)] * 4 * layers + [(ffn, hidden)] * 2 * layers + [(hidden, ffn)] * layers
    costs = [count_products(*shape) for shape in shapes]
    owners = assign_owners(costs, world)
    loads = [sum(cost for cost, owner in zip(costs, owners) if owner == rank) for rank in range(world)]
    assert len(owners) == len(shapes)
    assert max(loads) <= sum(costs) / world + max(costs)
    assert owners == assign_owners(costs, world)


@pytest.mark.parametrize(("rows", "world"), [(12, 2), (36, 3), (5, 4), (2, 4), (40, 3)])
def test_rows_are_laid_out_as_shard_0_lays_them_out(rows: int, world: int) -> None:
    """`torch.chunk` cuts as DTensor does."""
    sizes = [len(chunk) for chunk in torch.arange(rows).chunk(world)]
    found = [last - first for first, last in (row_range(rows, shard, world) for shard in range(world))]
    assert found == sizes + [0] * (world - len(sizes))
