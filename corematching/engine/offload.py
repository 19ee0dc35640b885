"""The memory-limited regime: FFN weights that do not fit into device memory stay on the host and are streamed.

As many whole FFNs as fit stay on the device. Each other one is copied into one of two staging buffers when its layer
needs it, the next one while the current one computes. A dense model pays that for every decoded token. A method that
chooses neurons takes its slices from the staging buffer during prefill, keeps them, and streams nothing in decode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from corematching.errors import UserError
from corematching.models.families import family_of

STAGES = 2
"""Staging buffers: one being computed with, one being filled."""


def resident_layers(room: float, ffn: float, depth: int, sliced_share: float = 0.0) -> int:
    """FFNs that can stay whole in device memory.

    Parameters
    ----------
    room
        Bytes left for FFN weights.
    ffn
        Bytes of one whole FFN; the staging buffers are set aside when not all fit.
    sliced_share
        Share of every other FFN that must fit as well (chosen neurons); 0 if they are streamed in decode.

    Raises
    ------
    UserError
        If not even the slices and the staging buffers fit.
    """
    if room >= depth * ffn:
        return depth
    free = room - (STAGES + depth * sliced_share) * ffn
    if free < 0:
        needed = (STAGES + depth * sliced_share) * ffn
        raise UserError(
            f"memory budget too small: {needed / 1e9:.3f} GB of FFN buffers needed, {max(room, 0) / 1e9:.3f} GB left"
        )
    return depth if sliced_share >= 1 else min(depth - 1, int(free / ((1 - sliced_share) * ffn)))


@dataclass
class Traffic:
    """What was streamed from the host so far."""

    bytes: int = 0
    copies: int = 0
    placed: int = 0
    """Bytes of weights and staging buffers that were put on the device before the first prompt."""


@dataclass
class _Stage:
    """One staging buffer: room for one FFN, neuron by neuron."""

    parts: list[Tensor]
    layer: int | None = None
    filled: Any = None
    """CUDA event: the copy into it is done."""


@dataclass
class _Streamer:
    """Serves the host-resident FFNs of one model through the staging buffers."""

    layers: list[int]
    mlps: dict[int, Any]
    host: dict[int, list[Tensor]]
    device: torch.device
    traffic: Traffic
    stages: list[_Stage] = field(default_factory=list)
    stream: Any = None

    def __post_init__(self) -> None:
        if not self.layers:
            return
        like = self.host[self.layers[0]]
        with torch.inference_mode(False):
            self.stages = [_Stage([torch.empty_like(p, device=self.device) for p in like]) for _ in range(STAGES)]
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)

    def need(self, layer: int, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of a gate projection: its FFN's weights are about to be read."""
        stage = self._staged(layer) or self._fill(layer)
        if stage.filled is not None:
            torch.cuda.current_stream().wait_event(stage.filled)
        gate, up, down = stage.parts
        mlp = self.mlps[layer]
        mlp.gate_proj.weight.data, mlp.up_proj.weight.data, mlp.down_proj.weight.data = gate, up, down.t()
        position = self.layers.index(layer) + 1
        decoding = args[0].shape[1] == 1
        if position < len(self.layers) or decoding:  # after a prefill's last layer nobody may need the first one
            following = self.layers[position % len(self.layers)]
            if self._staged(following) is None:
                self._fill(following, busy=stage)

    def _staged(self, layer: int) -> _Stage | None:
        return next((stage for stage in self.stages if stage.layer == layer), None)

    def _fill(self, layer: int, busy: _Stage | None = None) -> _Stage:
        stage = next(stage for stage in self.stages if stage is not busy)
        if stage.layer is not None:
            _forget(self.mlps[stage.layer])
        stage.layer = layer
        source = self.host[layer]
        if self.stream is None:
            for target, part in zip(stage.parts, source, strict=True):
                target.copy_(part)
        else:
            # Computing with the old content, and slicing neurons out of it, was queued before now.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for target, part in zip(stage.parts, source, strict=True):
                    target.copy_(part, non_blocking=True)
                stage.filled = self.stream.record_event()
        self.traffic.bytes += sum(part.numel() * part.element_size() for part in source)
        self.traffic.copies += 1
        return stage


def _forget(mlp: Any, device: torch.device | None = None) -> None:
    """Point the weights at nothing: whoever reads them unannounced gets NaN, not another layer's weights."""
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        weight = linear.weight
        nothing = weight.data.new_full((1, 1), torch.nan, device=device or weight.device)
        weight.data = nothing.expand(weight.shape)


@contextmanager
def offload(
    model: Any, resident: int, device: str | torch.device | None = None, budget: float | None = None
) -> Iterator[Traffic]:
    """Keep the FFNs of the first ``resident`` decoder layers on the device, the others on the host.

    On exit all weights are back where they were.

    Parameters
    ----------
    device
        Where to compute; None: where the model is. A model that was loaded on the host (``load_model(device="cpu")``)
        is moved there but for the FFNs to be streamed, so that a device may be smaller than the model from the first
        byte on.
    budget
        Bytes of weights and staging buffers that the device may hold; None: whatever it takes.

    Yields
    ------
    Traffic
        Bytes streamed from the host, counted as they are.

    Raises
    ------
    UserError
        Inside a method's context: methods plan by where weights are. If weights and staging buffers exceed the budget;
        then nothing was moved.
    """
    if getattr(model, "_corematching", None) is not None:
        raise UserError("weights move to the host before a method is installed: enter offload() outside its context")
    layers: Any = family_of(model.config).decoder(model).layers
    streamed = list(range(resident, len(layers)))
    mlps = {layer: layers[layer].mlp for layer in streamed}
    home, device = model.device, torch.device(model.device if device is None else device)
    stays = _others(model, mlps.values())
    placed = sum(_size(tensor) for tensor in stays) + (STAGES * _ffn_size(mlps[streamed[0]]) if streamed else 0)
    if budget is not None and placed > budget:
        raise UserError(f"memory budget too small: {placed / 1e9:.3f} GB to place, {budget / 1e9:.3f} GB allowed")
    host = {layer: _to_host(mlp, device) for layer, mlp in mlps.items()}
    undo: list[Callable[[], None]] = []
    streamer = _Streamer([], mlps, host, device, Traffic(placed=placed))
    try:
        for mlp in mlps.values():
            _forget(mlp, device)
        _move(stays, device)
        streamer = _Streamer(streamed, mlps, host, device, streamer.traffic)
        for layer, mlp in mlps.items():
            mlp.streamed = True
            undo.append(mlp.gate_proj.register_forward_pre_hook(functools.partial(streamer.need, layer)).remove)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield streamer.traffic
    finally:
        for remove in undo:
            remove()
        if streamer.stream is not None:
            streamer.stream.synchronize()  # a copy ahead may still be under way
        streamer.stages.clear()
        for layer, mlp in mlps.items():
            vars(mlp).pop("streamed", None)
            gate, up, down = host[layer]
            mlp.gate_proj.weight.data, mlp.up_proj.weight.data = gate.to(home), up.to(home)
            mlp.down_proj.weight.data = down.to(home).t().contiguous()
        _move(stays, home)


def _others(model: Any, streamed: Iterable[Any]) -> list[Tensor]:
    """Every parameter and buffer, but for the weights of streamed FFNs."""
    apart = {id(part.weight) for mlp in streamed for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)}
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in apart]


def _move(tensors: Iterable[Tensor], device: torch.device) -> None:
    with torch.inference_mode(False):
        for tensor in tensors:
            if tensor.device != device:
                tensor.data = tensor.data.to(device)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _ffn_size(mlp: Any) -> int:
    return sum(_size(linear.weight) for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))


def _to_host(mlp: Any, device: torch.device) -> list[Tensor]:
    """Host copies of an FFN's weights, neuron by neuron; page-locked where a GPU is to read them."""
    parts = [mlp.gate_proj.weight.data, mlp.up_proj.weight.data, mlp.down_proj.weight.data.t()]
    with torch.inference_mode(False):
        parts = [part.to("cpu").contiguous() for part in parts]
        return [part.pin_memory() for part in parts] if device.type == "cuda" else [part.clone() for part in parts]


@contextmanager
def memory_budget(device: torch.device, budget: float) -> Iterator[None]:
    """Let this process allocate no more than ``budget`` bytes on a GPU; nothing to enforce on a CPU."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
