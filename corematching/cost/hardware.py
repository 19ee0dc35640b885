"""Hardware profiles: ``conf/hardware/<name>.yaml``, or the machine at hand as measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf

from corematching import registry
from corematching.cost.roofline import Hardware
from corematching.errors import UserError
from corematching.registry import group_names

THIS = "this"


@dataclass(frozen=True)
class Peaks:
    """Best of several tries, at the dtype that is going to be benched."""

    copy_bandwidth: float
    """Bytes per second of a large copy, read and written bytes together."""
    read_bandwidth: float
    """Bytes per second of a matrix-vector product, which reads only, as decode does."""
    flops: float
    """FLOP/s of a large matrix product."""

    @property
    def bandwidth(self) -> float:
        """The better of the two: what decode is held against."""
        return max(self.copy_bandwidth, self.read_bandwidth)


def load_hardware(name: str) -> Hardware:
    """A public profile by its file name.

    Raises
    ------
    UserError
        For an unknown name; ``this`` has no public figures, see :func:`this_machine`.
    """
    valid = [known for known in group_names("hardware") if known != THIS]
    if name not in valid:
        raise UserError(f"unknown hardware {name!r}: choose from {', '.join(valid)}")
    values: Any = OmegaConf.to_container(OmegaConf.load(registry.CONF / "hardware" / f"{name}.yaml"))
    return Hardware(**values)


def this_machine(peaks: Peaks, dtype: torch.dtype, device: torch.device) -> Hardware:
    """The machine at hand, from its measured peaks; its memory is taken as sufficient."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    rate = {dtype_name(dtype): peaks.flops}
    return Hardware(name, rate, peaks.bandwidth, float("inf"), peaks.copy_bandwidth, dtype_name(dtype))


def dtype_name(dtype: torch.dtype) -> str:
    """As hardware profiles and records spell it: "float32", "bfloat16", ..."""
    return str(dtype).removeprefix("torch.")
