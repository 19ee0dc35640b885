"""Work captured as CUDA graphs: a decode step, and prefill from one decision of the method to the next.

Launching the few dozen kernels of a decoder layer from Python takes longer than a modern GPU needs to run them over a
pruned prompt, so without capturing, dropping tokens would save nothing there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from corematching.engine.llm import run_layers

if TYPE_CHECKING:
    from corematching.engine.session import Session

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], Any], Any]]
"""Takes work on fixed tensors, returns what repeats it and the (fixed) tensors its results lie in."""
MOST_LENGTHS = 4
"""Prompt lengths whose prefill stays captured, with activations, keys and values; the least recently used go."""
WARM_UPS = 2
"""Times that work runs before it is captured."""


def cuda_graph(device: torch.device, work: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """Capture work on a GPU as a CUDA graph."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):  # lets libraries and Triton set up outside the capture
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = work()
    return graph.replay, results


class CapturedPrefill:
    """Prefill of one installed method, by runs of decoder layers between which it decides nothing.

    A run is captured the second time a prompt of its length meets it: a method that adapts its budget seldom leaves the
    same number of tokens twice, and capturing takes longer than running. Covers single prompts without padding, of
    methods that leave KV caches alone after prefill.
    """

    def __init__(self, session: Session, capture: Capture) -> None:
        self.session = session
        self.capture = capture
        self._lengths: OrderedDict[int, _Length] = OrderedDict()
        self._now = _Length()
        depth = session.decoder.config.num_hidden_layers
        added = session.family.added_levels(session.model.config)
        starts = [0, *(index for index in range(1, depth) if session.before[index] or index <= added), depth]
        self.runs = [range(*ends) for ends in pairwise(starts)]

    @staticmethod
    def covers(session: Session) -> bool:
        """Whether an installed method's prefill can be captured."""
        return not session.streams and not any(session.after.values())

    def begin(self, length: int) -> None:
        """A prompt of ``length`` tokens comes; it may overwrite what others still have to choose neurons from."""
        for talk in list(self.session.undecided):
            self.session.choose_neurons(talk)
        self._now = self._lengths.setdefault(length, _Length())
        self._lengths.move_to_end(length)
        if len(self._lengths) > MOST_LENGTHS:
            self._lengths.popitem(last=False)

    def __call__(self, layers: range, hidden: Tensor, rope: tuple[Tensor, Tensor], cache: Any) -> tuple[Tensor, Tensor]:
        """Run layers over hidden states [1, n, d]: what entered the last one, and what left it."""
        met, runs, length = self._now.met, self._now.runs, hidden.shape[1]
        if (layers.start, length) not in met:
            met.add((layers.start, length))
            return run_layers(self.session.decoder, layers, hidden, None, rope, None, cache, use_cache=True)
        run = runs.get(layers.start)
        if run is None or run.length != length:
            run = runs[layers.start] = _Run(self.session, layers, hidden, rope, self.capture)
        return run(hidden, rope, cache)


@dataclass
class _Length:
    """What is captured for prompts of one length."""

    runs: dict[int, _Run] = field(default_factory=dict)
    """By first layer: the run at the number of tokens that came there last."""
    met: set[tuple[int, int]] = field(default_factory=set)
    """(first layer, tokens entering it) so far."""


class _Run:
    """Some layers on fixed tensors for one prompt length."""

    def __init__(
        self,
        session: Session,
        layers: range,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        capture: Capture,
    ) -> None:
        self.session, self.layers = session, layers
        self.length = hidden.shape[1]
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [part.clone() for part in (hidden, *rope)]
        self.replay, self.results = capture(self._compute)

    def _compute(self) -> tuple[Tensor, Tensor, Tensor, dict[int, Tensor], dict[int, Tensor]]:
        session, recorder = self.session, _Recorder()
        hidden, cos, sin = self.inputs
        entered, hidden = run_layers(
            session.decoder, self.layers, hidden, None, (cos, sin), None, recorder, use_cache=True
        )
        noted = [{i: own[i] for i in self.layers if i in own} for own in (session.activations, session.attended)]
        return entered, hidden, torch.stack([*recorder.keys, *recorder.values]), noted[0], noted[1]

    def __call__(self, hidden: Tensor, rope: tuple[Tensor, Tensor], cache: Any) -> tuple[Tensor, Tensor]:
        for target, part in zip(self.inputs, (hidden, *rope), strict=True):
            target.copy_(part)
        self.replay()
        entered, hidden, rows, activations, attended = self.results
        self.session.activations |= activations
        self.session.attended |= attended
        keys, values = rows.clone().chunk(2)  # the cache outlives the next prompt
        for index, key, value in zip(self.layers, keys, values, strict=True):
            layer = cache.layers[index]
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
        return entered, hidden


class _Recorder:
    """Stands in for an empty KV cache: notes the keys and values of each layer."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[1, H_kv, n, hd] keys and values, handed back as they are."""
        self.keys.append(key)
        self.values.append(value)
        return key, value
