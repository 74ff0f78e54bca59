"""The Triton kernels compiled for every kind of GPU without one: matrix instructions, shared memory, registers."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="this build of torch brings no triton; `pip install triton`")

COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from neobert.kernels import triton_linear_cross_entropy as kernels

TYPES = {"z_loss": "fp32", "targets_ptr": "*i32", "best_ptr": "*i32"}
TYPES |= dict.fromkeys(("lse_ptr", "scale_ptr", "target_logit_ptr", "max_ptr"), "*fp32")
DUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
for capability in json.loads(sys.argv[1]):
    for size, own in ((2, "*bf16"), (4, "*fp32")):
        for kernel in (kernels._reduce_kernel, kernels._gradient_kernel):
            tile, names = kernels.TILES[size], kernel.arg_names
            constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "PART": tile.part}
            constants |= {"EVEN": True, "COUNT": False, "PRECISION": "tf32", "WIDEN": False}
            types = {name: TYPES.get(name, own if "ptr" in name else "i32") for name in names}
            types |= {name: "constexpr" for name in names if name in constants}
            # As in a launch with the sizes of the paper: everything is a multiple of 16, so copies are asynchronous.
            whole = [n for n, name in enumerate(names) if types[name] not in ("constexpr", "fp32")]
            source = ASTSource(
                fn=kernel,
                signature=types,
                constexprs={(n,): constants[name] for n, name in enumerate(names) if name in constants},
                attrs={(n,): [["tt.divisibility", 16]] for n in whole},
            )
            options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
            done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(done.asm["cubin"])
                file.flush()
                command = [str(DUMP), "--dump-resource-usage", file.name]
                usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            used = {name: int(re.search(name + r":(\\d+)", usage)[1]) for name in ("REG", "STACK")}
            ptx = done.asm["ptx"]
            found = {"instruction": next((x for x in ("wgmma", "tcgen05", "mma.sync") if x in ptx), None)}
            found |= {"capability": capability, "bytes": size, "kernel": kernel.__name__, "stack": used["STACK"]}
            found |= {"threads": 32 * tile.num_warps, "shared": done.metadata.shared, "registers": used["REG"]}
            print(json.dumps(found))
"""

INSTRUCTIONS = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
"""Compute capability: what its matrix units are asked with."""

SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""That a block may have, from the CUDA C++ programming guide."""

REGISTERS = 65_536
"""Of a multiprocessor, on all of them."""


@pytest.mark.parametrize(
    "capabilities",
    [
        pytest.param((80, 90, 100), id="A100, H100, B200"),
        pytest.param((86, 89, 120), id="A10, L4, RTX", marks=pytest.mark.full),
    ],
)
def test_kernels_compile_for_every_gpu(capabilities: tuple[int, ...]) -> None:
    """Within shared memory and registers, at least one block a multiprocessor, and nothing to speak of is spilled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps(capabilities)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 4 * len(capabilities)
    for found in kernels:
        assert found["instruction"] == INSTRUCTIONS[found["capability"]], found
        assert found["shared"] <= 1024 * min(SHARED_KB[found["capability"]], 100), found
        assert found["registers"] * found["threads"] <= REGISTERS, found
        assert found["registers"] <= (210 if found["bytes"] == 2 else 168), found
        assert found["stack"] <= 8, found
