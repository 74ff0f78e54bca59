"""The table of loss kernels."""

import re
from types import SimpleNamespace

import pytest
import torch
from children import run_forked

from neobert.benchmark import loss_kernels
from neobert.train.hardware import device


def test_a_table_of_two_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits of 4,096 rows and 12,288 words are 200 MB several times over, a chunk of them is 64 MB."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(loss_kernels.SHAPES, "small", (4096, 16, 12288))
    monkeypatch.setattr(loss_kernels, "subprocess", SimpleNamespace(run=run_forked))
    rates = {torch.float32: 2e9, torch.bfloat16: 1e9}
    monkeypatch.setattr(device, "measure_product", lambda rows, inner, outer, dtype: rates[dtype])
    said, _, *lines = loss_kernels.table(["torch", "reference", "triton"], ["small"], "auto", "cpu", 1).splitlines()
    assert said.startswith("small: products in fp32, auto: products of up to 2048 x 16 x 4096 make 1.0 GFLOP/s in bf16")
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["torch", "reference", "triton"]
    assert lines[4].endswith("| - | cannot run here |")
    megabytes = [float(line.split("|")[4].split()[0].replace(",", "")) for line in lines[2:4]]
    assert 0 < megabytes[0] < megabytes[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_kernel_that_fails_leaves_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_kernels, "subprocess", SimpleNamespace(run=run_forked))
    table = loss_kernels.table(["torch"], ["13k,768,30592"], "fp32", "cuda", 1)
    # What torch says depends on whether it was built for CUDA: "not compiled with CUDA", or "no NVIDIA driver".
    assert re.search(r"\| torch \| - \| \w+Error: .*(CUDA|NVIDIA)", table.splitlines()[-1])
