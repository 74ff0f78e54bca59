"""The table of loss kernels."""

import pytest

from neobert.benchmark import loss_kernels


def test_a_table_of_two_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The full logits of 2,048 rows and 2,048 words are 16 MB several times over; a kernel that needs less says so."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(loss_kernels.SHAPES, "small", (2048, 16, 2048))
    lines = loss_kernels.table(["torch", "reference", "triton"], ["small"], "fp32", "cpu", 1).splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["torch", "reference", "triton"]
    assert lines[4].endswith("| - | cannot run here |")
    megabytes = [float(line.split("|")[4].split()[0]) for line in lines[2:4]]
    assert 0 < megabytes[0] < megabytes[1]


def test_a_kernel_that_fails_leaves_its_reason() -> None:
    line = loss_kernels.table(["torch"], ["13k,768,30592"], "fp32", "no-such-device", 1)
    assert "| - | RuntimeError" in line
