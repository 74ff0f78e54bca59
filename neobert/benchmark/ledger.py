"""What a training step asks of a GPU, counted without one: `python -m neobert.benchmark.ledger [--rows 64 ...]`.

    launches            operators of forward and backward that start a kernel, eager
    elementwise bytes   what all but products and attention read and write, eager: time is this over the bandwidth
    fused bytes         the same a slot of a compiled block, if what is between products and attention reads and writes
                        each tensor once
    saved bytes         what the forward keeps for the backward beside the weights, a slot; eager, and a compiled block
    graphs              that a block compiles to over batches of different documents
    attention blocks    ceil(longest / 128) x heads x segments of a forward of a layer, by what its kernel gets; useful
                        are those in which a document has queries. The backward launches three times as many

The step runs on fake tensors, which have a shape and no content, so 64 rows of 1,024 take no memory. A build of torch
without CUDA cannot make fake tensors of a GPU with gradients. So they are the CPU's, and only the code of this package
sees a GPU in them: it takes the branches that it takes there.

Operators stand for kernels: a fused norm is one, whatever torch does on a CPU. The optimizer is not in it; copies of
master weights and what becomes of their gradients are (`--bf16-residual`), as are the casts of autocast.
"""

import itertools
import math
import operator
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neobert.benchmark.settings import StepSettings
from neobert.benchmark.step_time import RowSource, made_up_rows
from neobert.config.schema import Config
from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.model.attention import ATTENTION
from neobert.model.encoder import Encoder
from neobert.model.fp8 import FP8_PRODUCTS, use_fp8
from neobert.objectives.base import ObjectiveModule
from neobert.train.master_weights import MasterWeights
from neobert.types import PackedBatch

QUERIES = 128
"""Of one block of a flash kernel."""

_CPU, _CUDA = torch.device("cpu"), torch.device("cuda", 0)
_PRODUCTS = ("aten::mm", "aten::_scaled_mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
_LAUNCH_NOTHING = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::lift_fresh")
_NUM_BATCHES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """Of one micro-batch."""

    slots: int
    launches: int
    elementwise_bytes: int
    saved_bytes_per_slot: float
    fused_bytes_per_slot: float
    """Of one block, forward and backward."""

    compiled_saved_bytes_per_slot: float
    """Of one block."""

    graphs_per_block: int
    attention_blocks: int
    useful_attention_blocks: int

    def describe(self) -> str:
        """The ledger as a table."""
        lines = [f"| {name.replace('_', ' ')} | {value:,.0f} |" for name, value in asdict(self).items()]
        wasted = self.attention_blocks / self.useful_attention_blocks
        return "\n".join(["| | |", "|---|---|", *lines, f"| attention blocks / useful | {wasted:,.2f} |"])


def measure_ledger(settings: StepSettings, source: RowSource | None = None) -> Ledger:
    """The ledger of a step of bf16 with flash attention over made-up rows, or those of `source`."""
    settings = replace(settings, steps=_NUM_BATCHES)
    source = made_up_rows(settings) if source is None else source
    batches = list(itertools.islice(source.batches, _NUM_BATCHES))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        module = build_fake_module(source, settings)
        model = MasterWeights(module) if settings.bf16_residual else module
        computing = model.computing if isinstance(model, MasterWeights) else module
        autocast = not settings.bf16_residual
        count, saved = _count_eager(model, computing, _fake_batch(fake, batches[0]), autocast)
        compiled = _count_compiled(computing.encoder, [_fake_batch(fake, batch) for batch in batches], autocast)
    lengths = batches[0].segments.cu_seqlens_cpu.diff().tolist()
    heads, slots = source.model.num_attention_heads, batches[0].input_ids.numel()
    return Ledger(
        slots=slots,
        launches=count.launches,
        elementwise_bytes=count.elementwise_bytes,
        saved_bytes_per_slot=saved / slots,
        fused_bytes_per_slot=compiled.fused_bytes / slots,
        compiled_saved_bytes_per_slot=compiled.saved_bytes / slots,
        graphs_per_block=compiled.graphs,
        attention_blocks=heads * max(count.attention_grids),
        useful_attention_blocks=heads * sum(math.ceil(length / QUERIES) for length in lengths),
    )


def build_fake_module(source: RowSource, settings: StepSettings) -> ObjectiveModule:
    """The module of a step, with weights that are fake where fake tensors are made."""
    with torch.device("meta"):
        encoder = Encoder(
            source.model,
            ATTENTION["flash_attn_varlen"],
            gradient_checkpointing=settings.gradient_checkpointing,
            gradient_checkpointing_every=settings.checkpointing_every,
        )
        # The kernel of a GPU is written in Triton, which fake tensors cannot launch.
        module = source.objective.build_module(encoder, Config(), KERNELS["torch"])
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            part.register_parameter(name, nn.Parameter(torch.empty(weight.shape)))
    if settings.fp8 != "no":
        use_fp8(encoder, FP8_PRODUCTS[settings.fp8])
    return module


def _fake_batch(fake: FakeTensorMode, batch: PackedBatch) -> PackedBatch:
    """What is on the device; the borders of the host stay as they are."""
    make, segments = fake.from_tensor, batch.segments
    return replace(
        batch,
        input_ids=make(batch.input_ids),
        positions=make(batch.positions),
        segments=replace(segments, ids=make(segments.ids), cu_seqlens=make(segments.cu_seqlens)),
        masked_index=make(batch.masked_index),
        targets=make(batch.targets),
    )


# --- eager -----------------------------------------------------------------------------------------------------------


class _Count(TorchDispatchMode):
    """Operators as they reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.elementwise_bytes = 0, 0
        self.attention_grids: list[int] = []
        """Blocks of queries times segments, a head, of each forward."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, made = func.name().split(".")[0], _tensors(out)
        if func.is_view or not made or name.startswith(_LAUNCH_NOTHING):
            return out
        self.launches += 1
        if "varlen_attn" in name:
            if not name.endswith("backward"):
                borders, longest = args[3], args[5]
                self.attention_grids.append(math.ceil(longest / QUERIES) * (len(borders) - 1))
        elif name not in _PRODUCTS:
            self.elementwise_bytes += sum(map(_num_bytes, [*_tensors((args, kwargs)), *made]))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _num_bytes(x: Tensor) -> int:
    """In memory: a number that is expanded along a dimension is read once."""
    return x.element_size() * math.prod(size for size, stride in zip(x.shape, x.stride()) if stride)


def _count_eager(
    model: nn.Module, computing: ObjectiveModule, batch: PackedBatch, autocast: bool
) -> tuple[_Count, int]:
    """The operators of forward and backward, and the bytes that wait for the backward."""
    weights = {StorageWeakRef(p.untyped_storage()) for p in computing.parameters()}
    kept: dict[StorageWeakRef, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if (reference := StorageWeakRef(storage)) not in weights:
            kept[reference] = storage.nbytes()
        return x

    with _Count() as count, _seen_as_gpu(autocast), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(batch).loss_sum.backward()
    model.zero_grad()
    return count, sum(kept.values())


class _OnGpu(TorchFunctionMode):
    """Tensors say that they are on a GPU, and what is made there is made where they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func is F.rms_norm:  # One kernel on a GPU, several on a CPU; this one is one on both.
            return F.layer_norm(*args, **kwargs)
        if kwargs.get("device") == _CUDA:
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **kwargs)


@contextmanager
def _seen_as_gpu(autocast: bool) -> Iterator[None]:
    """Inside, code of this package finds tensors on a GPU; `autocast` to bf16."""
    own: Any = FakeTensor.device

    def find_device(tensor: FakeTensor) -> torch.device:
        asks = str(sys._getframe(1).f_globals.get("__name__"))
        real: torch.device = own.fget(tensor)
        return _CUDA if asks.startswith("neobert.") else real

    FakeTensor.device = property(find_device)  # type: ignore[assignment,method-assign]
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        torch.set_autocast_enabled("cuda", autocast)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, autocast), _OnGpu():
            warnings.simplefilter("ignore")  # Autocast of a GPU says that there is none.
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        FakeTensor.device = own  # type: ignore[method-assign]


# --- compiled --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class _Compiled:
    """Of one block; bytes are those of its first graph."""

    graphs: int = 0
    fused_bytes: int = 0
    saved_bytes: int = 0


def _count_compiled(encoder: Encoder, batches: list[PackedBatch], autocast: bool) -> _Compiled:
    """A block over the batches."""
    block, config, found = encoder.layers[0], encoder.config, _Compiled()

    def compile_forward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.graphs += 1
        if found.graphs == 1:
            found.saved_bytes = _bytes_made_for(graph)
            found.fused_bytes += _fused_bytes(graph)
        return _boxed(graph)

    def compile_backward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        if found.graphs == 1:
            found.fused_bytes += _fused_bytes(graph)
        return _boxed(graph)

    compiler = aot_autograd(
        fw_compiler=compile_forward, bw_compiler=compile_backward, partition_fn=min_cut_rematerialization_partition
    )
    torch.compiler.reset()
    block.compile(backend=compiler, dynamic=False)
    try:
        for batch in batches:
            slots = batch.input_ids.numel()
            hidden = torch.empty(slots, config.hidden_size, dtype=encoder.embedding.weight.dtype, requires_grad=True)
            table = torch.empty(slots, 1, config.head_dim // 2)
            prepared = encoder.attention.prepare(batch.segments, encoder.windows[0])
            with torch.autocast("cpu", torch.bfloat16, autocast):
                block(hidden, (table, table.clone()), prepared).sum().backward()
    finally:
        block._compiled_call_impl = None
        torch.compiler.reset()
    return found


def _boxed(graph: torch.fx.GraphModule) -> Any:
    def call(inputs: list[Any]) -> Any:
        return graph(*inputs)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def _bytes_made_for(forward: torch.fx.GraphModule) -> int:
    """What the forward of a partitioned graph hands on and did not get, its result included."""
    (output,) = (node for node in forward.graph.nodes if node.op == "output")
    return sum(_node_bytes(node) for node in output.all_input_nodes if node.op != "placeholder")


def _fused_bytes(graph: torch.fx.GraphModule) -> int:
    """What elementwise operators read of others and write for others."""
    own = {node for node in graph.graph.nodes if node.op == "call_function" and not _is_view(node) and _fuses(node)}
    read = {_origin(source) for node in own for source in node.all_input_nodes} - own
    others = (node for node in graph.graph.nodes if node not in own and not _is_view(node))
    written = own & {_origin(source) for node in others for source in node.all_input_nodes}
    return sum(map(_node_bytes, read | written))


def _fuses(node: torch.fx.Node) -> bool:
    name = "" if node.target is operator.getitem else node.target.name().split(".")[0]  # type: ignore[union-attr]
    return bool(name) and name not in _PRODUCTS and "varlen_attn" not in name and not name.startswith(_LAUNCH_NOTHING)


def _is_view(node: torch.fx.Node) -> bool:
    """Also an element of a list of views."""
    if node.target is operator.getitem:
        return _is_view(node.args[0])  # type: ignore[arg-type]
    return bool(getattr(node.target, "is_view", False))


def _origin(node: torch.fx.Node) -> torch.fx.Node:
    """Whose memory a view shows."""
    while _is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _node_bytes(node: torch.fx.Node) -> int:
    value = node.meta.get("val")
    return _num_bytes(value) if isinstance(value, Tensor) else 0


def main() -> None:
    """Prints the ledger of a shape."""
    import argparse

    parser = argparse.ArgumentParser(description=measure_ledger.__doc__)
    parser.add_argument("--preset", default="neobert")
    for flag, default in (("--rows", 64), ("--length", 1024)):
        parser.add_argument(flag, type=int, default=default)
    for flag in ("--gradient-checkpointing", "--bf16-residual"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--fp8", choices=("no", *FP8_PRODUCTS), default="no")
    print(measure_ledger(StepSettings(**vars(parser.parse_args()))).describe())


if __name__ == "__main__":
    main()
