"""Work captured as CUDA graphs: a decode step, and prefill from one decision of the method to the next.

Launching the few dozen kernels of a decoder layer from Python takes longer than a modern GPU needs to run them over a
pruned prompt, so without capturing, dropping tokens would save nothing there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from corematching.engine.ffn import is_streamed

if TYPE_CHECKING:
    from corematching.engine.session import Session

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], Any], Any]]
"""Takes work on fixed tensors, returns what repeats it and the (fixed) tensors its results lie in."""
MOST_RUNS = 16
"""Captured runs kept; of more prompt lengths, the least recently used go."""
_WARM_UPS = 2


def cuda_graph(work: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """Capture work as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):  # lets libraries and Triton set up outside the capture
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph.replay, results


class CapturedPrefill:
    """Prefill of one installed method, by runs of decoder layers between which it decides nothing.

    A run is captured the first time a prompt of its length meets it. Covers single prompts without padding, of methods
    that leave KV caches alone after prefill.

    """

    def __init__(self, session: Session, capture: Capture) -> None:
        self.session = session
        self.capture = capture
        self._runs: OrderedDict[tuple[int, int], _Run] = OrderedDict()
        depth = session.decoder.config.num_hidden_layers
        starts = [0, *(index for index in range(1, depth) if session.before[index]), depth]
        self.runs = [range(*ends) for ends in pairwise(starts)]

    @staticmethod
    def covers(session: Session) -> bool:
        """Whether an installed method's prefill can be captured."""
        layers = session.decoder.layers
        return not any(session.after.values()) and not any(is_streamed(layer.mlp) for layer in layers)

    def begin(self) -> None:
        """A prompt is about to overwrite the activations that others may still have to choose neurons from."""
        for cache in list(self.session.undecided):
            self.session.choose_neurons(cache)

    def __call__(
        self, layers: range, hidden: Tensor, rope: tuple[Tensor, Tensor], positions: Tensor, cache: Any
    ) -> tuple[Tensor, Tensor]:
        """Run layers over hidden states [1, n, d]: what entered the last one, and what left it."""
        key = (layers.start, hidden.shape[1])
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = _Run(self.session, layers, hidden, rope, positions, self.capture)
            if len(self._runs) > MOST_RUNS:
                self._runs.popitem(last=False)
        self._runs.move_to_end(key)
        return run(hidden, rope, positions, cache)


class _Run:
    """Some layers on fixed tensors for one prompt length."""

    def __init__(
        self,
        session: Session,
        layers: range,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        positions: Tensor,
        capture: Capture,
    ) -> None:
        self.session, self.layers = session, layers
        self.inputs = [part.clone() for part in (hidden, *rope, positions)]
        self.replay, self.results = capture(self._compute)

    def _compute(self) -> tuple[Tensor, Tensor, Tensor, dict[int, Tensor], dict[int, Tensor]]:
        session, recorder = self.session, _Recorder()
        hidden, cos, sin, positions = self.inputs
        entered = hidden
        for index in self.layers:
            entered = hidden
            hidden = session.decoder.layers[index](
                hidden,
                attention_mask=None,
                position_embeddings=(cos, sin),
                position_ids=positions,
                past_key_values=recorder,
                use_cache=True,
            )
        noted = [{i: own[i] for i in self.layers if i in own} for own in (session.activations, session.attended)]
        return entered, hidden, torch.stack([*recorder.keys, *recorder.values]), noted[0], noted[1]

    def __call__(
        self, hidden: Tensor, rope: tuple[Tensor, Tensor], positions: Tensor, cache: Any
    ) -> tuple[Tensor, Tensor]:
        for target, part in zip(self.inputs, (hidden, *rope, positions), strict=True):
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
