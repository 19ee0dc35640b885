"""What this machine can do at best: measured copy and read bandwidth and matrix product rate."""

from __future__ import annotations

import torch

from corematching.cost.hardware import Peaks
from corematching.efficiency.latency import timed


def measure_peaks(device: torch.device, dtype: torch.dtype, tries: int = 7) -> Peaks:
    """Measure the machine. Takes about a second on a GPU, a few on a small CPU."""
    on_gpu = device.type == "cuda"
    width = 8192 if on_gpu else 4096
    rows = 32768 if on_gpu else 16384
    with torch.inference_mode():
        large = torch.ones(rows, width, device=device, dtype=dtype)
        target = torch.empty_like(large)
        vector = torch.ones(width, device=device, dtype=dtype)
        moved = large.numel() * large.element_size()
        copy = min(timed(lambda: target.copy_(large), device, tries))
        read = min(timed(lambda: torch.mv(large, vector), device, tries))
        left = torch.ones(width if on_gpu else 1024, width, device=device, dtype=dtype)
        square = large[:width]
        product = min(timed(lambda: left @ square, device, tries))
    return Peaks(2 * moved / copy, moved / read, 2 * left.shape[0] * width * width / product)
