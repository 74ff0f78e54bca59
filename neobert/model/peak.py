"""What a GPU could do at best, for model FLOP utilisation (MFU) and for runs on GPUs that are not here.

Dense rates with sums in fp32, in TFLOP/s, by the name that the driver gives. Sources: NVIDIA's data sheets of H100,
H200, A100, L4, L40S, A10, RTX A6000 (rates with sparsity are halved), V100 and T4; its architecture papers of GA102
(3090), Ada (4090, 6000 Ada) and RTX Blackwell (5090, RTX PRO 6000); one GPU's part of the data sheets of HGX B200 and
GB200 NVL72; of H20 the numbers that vendors publish.
"""

from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """TFLOP/s; None where the device has no such products."""

    bf16: float | None
    fp32: float
    """Without TF32."""

    fp8: float | None = None

    @property
    def tf32(self) -> float | None:
        """Half of bf16 on all of them."""
        return None if self.bf16 is None else self.bf16 / 2


_H100, _NVL, _A100, _V100 = Peak(989, 67, 1979), Peak(835, 60, 1671), Peak(312, 19.5), Peak(None, 15.7)

PEAKS: dict[str, Peak] = {
    "NVIDIA H100 80GB HBM3": _H100,  # SXM
    "NVIDIA H100 PCIe": Peak(756, 51, 1513),
    "NVIDIA H100 NVL": _NVL,
    "NVIDIA H200": _H100,
    "NVIDIA H200 NVL": _NVL,
    "NVIDIA GH200 480GB": _H100,
    "NVIDIA H20": Peak(148, 44, 296),
    "NVIDIA B200": Peak(2250, 75, 4500),
    "NVIDIA GB200": Peak(2500, 80, 5000),
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA L4": Peak(121, 30.3, 242),
    "NVIDIA L40S": Peak(362, 91.6, 733),
    "NVIDIA A10": Peak(125, 31.2),
    "NVIDIA RTX A6000": Peak(154.8, 38.7),
    "NVIDIA RTX 6000 Ada Generation": Peak(364.2, 91.1, 728.5),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": Peak(503.8, 126, 1007.6),
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": Peak(500, 120, 1000),
    "NVIDIA GeForce RTX 3090": Peak(71, 35.6),
    "NVIDIA GeForce RTX 4090": Peak(165.2, 82.6, 330.3),
    "NVIDIA GeForce RTX 5090": Peak(209.5, 104.8, 419),
    "Tesla V100-SXM2-16GB": _V100,
    "Tesla V100-SXM2-32GB": _V100,
    "Tesla V100-PCIE-16GB": Peak(None, 14),
    "Tesla V100-PCIE-32GB": Peak(None, 14),
    "Tesla T4": Peak(None, 8.1),
}
"""By exact name: a card of another form (PCIe, NVL, mobile) with a similar one has other rates."""


class Gpu(NamedTuple):
    """A GPU as its data sheet has it; bytes and bytes a second."""

    name: str
    """In `PEAKS`."""

    memory: float
    bandwidth: float
    link: float
    """To the others of its node, one direction."""


GPUS: dict[str, Gpu] = {
    "A100-40GB": Gpu("NVIDIA A100-SXM4-40GB", 40e9, 1.555e12, 300e9),
    "A100": Gpu("NVIDIA A100-SXM4-80GB", 80e9, 2.039e12, 300e9),
    "H100": Gpu("NVIDIA H100 80GB HBM3", 80e9, 3.35e12, 450e9),
    "H200": Gpu("NVIDIA H200", 141e9, 4.8e12, 450e9),
    "B200": Gpu("NVIDIA B200", 180e9, 7.7e12, 900e9),
    "L40S": Gpu("NVIDIA L40S", 48e9, 0.864e12, 32e9),
    "L4": Gpu("NVIDIA L4", 24e9, 0.3e12, 32e9),
    "RTX-4090": Gpu("NVIDIA GeForce RTX 4090", 24e9, 1.008e12, 32e9),
}
"""By the name on the command line; NVLink where there is one, else PCIe 4.0 with 16 lanes."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak in FLOP/s of products in bf16 or fp32, the latter in TF32 where torch may use it; None where it is not
    known, as of a CPU: then no utilisation is printed."""
    peak = PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None:
        return None
    fp32 = peak.fp32 if torch.get_float32_matmul_precision() == "highest" else peak.tf32 or peak.fp32
    rate = {torch.bfloat16: peak.bf16, torch.float32: fp32}[dtype]
    return None if rate is None else rate * 1e12


def name_without_peak(device: torch.device) -> str | None:
    """The name of a GPU whose peak is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return None if name in PEAKS else name
