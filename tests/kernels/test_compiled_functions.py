"""Every autograd function and custom operator of the package: compiled gradients are the eager ones in all backends.

A compiler may compute other gradients than eager code without a word: torch 2.11 does for a function that returns what
an operation handed back, changed in place or cast to the dtype it had. So all of them are in one table, and one that
is not listed fails a test.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from torch import Tensor

from neobert.kernels.linear_cross_entropy import KERNELS
from neobert.kernels.linear_distillation import chunked_linear_kl
from neobert.model.fp8 import _Fp8Product, emulate
from neobert.model.layers import RMSNorm, _RMSNormCPU, _SwiGLUCPU, swiglu
from neobert.model.rotary import _Rotate, rotary_table
from neobert.model.segmented import segmented_attention
from neobert.objectives.losses import _Gather

PACKAGE = Path(__file__).parents[2] / "neobert"
BORDERS = torch.tensor([[0, 5, 7], [5, 7, 12]], dtype=torch.int32)
NO_BUCKETS = torch.empty(0, dtype=torch.int64)
ROTATION = rotary_table(torch.arange(12) % 5, 8, 1e4)
TARGETS = torch.tensor([3, 29, -100, 0, 7, -100, 11, 3, 3, 2, 1, 28])

Case = tuple[Callable[..., Tensor | tuple[Tensor, Tensor]], list[tuple[int, ...]]]


def attend(reach: int, *, causal: bool = False) -> Case:
    return lambda q, k, v: segmented_attention(q, k, v, BORDERS, NO_BUCKETS, 0.3, reach, causal), [(12, 2, 8)] * 3


def loss(name: str) -> Case:
    return lambda h, w: KERNELS[name](h, w, TARGETS, count_correct=True, z_loss=0.01), [(12, 8), (30, 8)]


FUNCTIONS: dict[str, Case] = {
    "neobert.objectives.losses._Gather": (_Gather.apply, [(12, 8)]),
    "neobert.kernels.linear_cross_entropy._ChunkedLinearCrossEntropy": loss("torch"),
    "neobert.kernels.linear_distillation._ChunkedLinearKL": (
        lambda h, w: chunked_linear_kl(h, w, w[18:], w, TARGETS != -100, temperature=2.0, count_agreed=True),
        [(12, 8), (30, 8)],
    ),
    "neobert.kernels.triton_linear_cross_entropy._TritonLinearCrossEntropy": loss("triton"),
    "neobert.model.fp8._Fp8Product": (
        lambda x, w: _Fp8Product.apply(x.bfloat16(), w.bfloat16(), emulate, torch.float8_e4m3fn).float(),
        [(12, 32), (16, 32)],
    ),
    "neobert.model.layers._RMSNormCPU": (lambda x, w: _RMSNormCPU.apply(x, w, 1e-6), [(12, 32), (32,)]),
    "neobert.model.layers._SwiGLUCPU": (_SwiGLUCPU.apply, [(12, 32)]),
    "neobert.model.rotary._Rotate": (lambda x: _Rotate.apply(x, *ROTATION), [(12, 4, 8)]),
    "neobert::segmented_attention": attend(reach=-1),
    "neobert::segmented_attention_backward": attend(reach=2, causal=True),
}
"""By class or name of the operator: what is called, and the shapes of its inputs, all of them with gradients."""

NOT_TRACEABLE = {"neobert.kernels.triton_linear_cross_entropy._TritonLinearCrossEntropy"}
"""Of the kernels in Triton's interpreter the compiler can make nothing; the loss is never compiled in a run."""


EAGER_ONLY = {"neobert.model.layers._RMSNormCPU", "neobert.model.layers._SwiGLUCPU"}
"""Those that no compiler sees: their callers give it the plain formula, which is in the test of gradients instead."""


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def inputs(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def outputs(case: Case, given: list[Tensor]) -> tuple[Tensor, ...]:
    # Inputs are results of an operation and outputs are read by one: what is at the edge of a graph is special.
    result = case[0](*(1.5 * x for x in given))
    return result if isinstance(result, tuple) else (result,)


def weighted_sum(case: Case, given: list[Tensor]) -> Tensor:
    (out, *_) = outputs(case, given)
    return (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()


def test_the_table_holds_every_function_and_custom_operator() -> None:
    found = {name for path in sorted(PACKAGE.rglob("*.py")) for name in functions_in(path)}
    assert found == set(FUNCTIONS), "give each a line in FUNCTIONS"


def functions_in(path: Path) -> Iterator[str]:
    """Classes that derive from `autograd.Function`, and operators that are passed to `torch.library`."""
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and "Function" in map(last_word, node.bases):
            yield f"{module}.{node.name}"
        elif isinstance(node, ast.Call) and last_word(node.func) in ("custom_op", "triton_op", "define"):
            yield ast.literal_eval(node.args[0]).split("(")[0]


def last_word(node: ast.expr) -> str:
    return ast.unparse(node).split(".")[-1]


def test_the_search_sees_what_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "neobert"
    package.mkdir()
    monkeypatch.setattr(f"{__name__}.PACKAGE", package)
    (package / "new.py").write_text(
        "class A(torch.autograd.Function): pass\n\nclass B(Function): pass\n\nclass C(nn.Module): pass\n\n"
        "@torch.library.custom_op('neobert::d', mutates_args=())\ndef d(x): pass\n\n"
        "@triton_op('neobert::e', mutates_args={})\ndef e(x): pass\n\n"
        "torch.library.define('neobert::f', '(Tensor x)')\n"
    )
    assert set(functions_in(package / "new.py")) == {
        "neobert.new.A",
        "neobert.new.B",
        "neobert::d",
        "neobert::e",
        "neobert::f",
    }


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "::" not in name and name not in EAGER_ONLY])
def test_nothing_that_was_changed_in_place_leaves_a_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts the changes of a tensor and of all views of it. An operator's body no compiler looks into."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # Without a compiler a copy may be saved.
    case = FUNCTIONS[name]
    assert {out._version for out in outputs(case, inputs(case[1]))} == {0}


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_gradients_are_the_eager_ones(backend: str) -> None:
    """All functions in one graph, each with inputs of its own: a compilation costs more than what it compiles.

    inductor leaves out casts to bf16 within a kernel, and torch 2.11 does on a CPU whatever it is told. Values then
    round to another of two neighbours in fp8: there the norm of the difference counts.
    """
    torch._dynamo.reset()
    cases = {name: case for name, case in FUNCTIONS.items() if name not in NOT_TRACEABLE | EAGER_ONLY}
    cases["the plain loss"] = loss("reference")
    cases["norm"], cases["swiglu"] = (RMSNorm(32, 1e-6), [(12, 32)]), (swiglu, [(12, 32)])
    given = {name: inputs(case[1]) for name, case in cases.items()}

    def total() -> Tensor:
        return torch.stack([weighted_sum(case, given[name]) for name, case in cases.items()]).sum()

    flat = [x for own in given.values() for x in own]
    want = torch.autograd.grad(total(), flat)
    with torch._inductor.config.patch(emulate_precision_casts=True):
        got = torch.autograd.grad(torch.compile(total, backend=backend, fullgraph=True)(), flat)
    names = [name for name, own in given.items() for _ in own]
    differences = dict.fromkeys(names, 0.0)
    for name, a, b in zip(names, want, got):
        if backend == "inductor" and name == "neobert.model.fp8._Fp8Product":
            assert (a - b).norm() < 0.05 * a.norm(), name
        else:
            differences[name] = max(differences[name], (a - b).abs().max().item())
    assert {name: value for name, value in differences.items() if not value < 1e-5} == {}
