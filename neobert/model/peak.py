"""What a GPU could do at best, for model FLOP utilisation (MFU)."""

import torch

PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bf16 peak of the vendors' data sheets in FLOP/s, by a part of the device's name."""


def peak_flops(device: torch.device) -> float | None:
    """Data-sheet peak of the device, None where we have no number: then no utilisation is printed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_BF16_FLOPS.items() if part in name), None)
