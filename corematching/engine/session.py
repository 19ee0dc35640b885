"""Installing a method on a stock transformers model, and taking it off again without a trace."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.output_capturing import capture_outputs

from corematching.engine import calls, llm, packed
from corematching.engine.cache import Conversation, check_cache, conversation_of
from corematching.engine.captured import Capture, CapturedPrefill, cuda_graph
from corematching.engine.checks import check_model, unwrapped
from corematching.engine.ffn import FFNBuilder, is_streamed, neuron_major
from corematching.engine.guide import Guidance
from corematching.engine.layout import Layout, Stream
from corematching.engine.predictors import TokenwiseFFN, load_predictors
from corematching.engine.rows import install_readers
from corematching.engine.sharing import Sharing, tower_of
from corematching.engine.state import PromptState
from corematching.engine.tower_attention import TowerAttention
from corematching.engine.trace import Trace
from corematching.engine.views import FFNSignals, Prompt
from corematching.engine.vision import TowerRun, image_decision, per_sample, stages_of
from corematching.engine.visual import images_by_row
from corematching.errors import UserError
from corematching.methods.base import (
    AfterPrefill,
    BeforeLayer,
    ChooseNeurons,
    ChooseRows,
    Guide,
    MeasureMass,
    Method,
    PredictNeurons,
    Replace,
)
from corematching.models.families import family_of, head_width
from corematching.models.support import stages_on

MOST_HELD = 2**30
"""Bytes of FFN activations that may wait for the first decode step of a prompt or batch."""


@contextmanager
def attach(method: Method, model: Any) -> Iterator[Trace]:
    """Install ``method`` on ``model`` for the duration of the context.

    Works under plain ``model(...)`` and ``model.generate(...)``: greedy, sampling, beam search, speculative decoding,
    left-padded batches, several images per prompt, several turns on one KV cache. On exit every replaced attribute and
    hook is removed. Not re-entrant: one method per model at a time (use :func:`corematching.compose` to join two).
    A PEFT model is unwrapped: its adapters act inside the layers.

    Raises
    ------
    UserError
        If the method's parameters do not fit the model, a method is installed already, or the model is wrapped or
        sharded in a way that methods cannot see through.
    """
    model = unwrapped(model)
    if getattr(model, "_corematching", None) is not None:
        raise UserError(f"method {model._corematching.method.name!r} is installed already: join methods with compose()")
    session = Session(method, model)
    model._corematching = session
    try:
        session.install()
        yield session.trace
    finally:
        session.remove()
        del model._corematching


class Session:
    """One installed method: its stages by layer, the hooks that carry them out, and the trace."""

    def __init__(self, method: Method, model: Any) -> None:
        self.method = method
        self.model = model
        self.family = family_of(model.config)
        self.geometry = self.family.geometry(model.config)
        self.decoder: Any = self.family.decoder(model)
        layers: Any = self.decoder.layers
        self.streams = any(is_streamed(layer.mlp) for layer in layers)
        """Whether FFN weights are on the device only while they are used (decided outside the method's context)."""
        stages = stages_on(model.config, method)
        check_model(model, self.decoder, stages)
        self.acts = bool(stages)
        self.blocks, self.output = stages_of(stages)
        self.tower_attention: TowerAttention | None = None
        """Where the method chooses among packed tokens: what it may ask of the stock tower."""
        if self.output is not None and self.geometry.image_tokens is None:
            self.tower_attention = TowerAttention(self, self.output.layers)
        self.before = _by_layer(stages, BeforeLayer)
        self.after = _by_layer(stages, AfterPrefill)
        self.choose = _by_layer(stages, ChooseNeurons)
        self.choose_rows = {stage.layer: stage for stage in stages if isinstance(stage, ChooseRows)}
        self.ragged = {stage.layer for stages in self.after.values() for stage in stages if stage.ragged}
        """Layers whose KV heads keep different numbers of rows."""
        self.measured = {stage.layer for stage in stages if isinstance(stage, MeasureMass)}
        """Layers of which the trace says how much of dense attention falls on the rows read."""
        self.decoding_cache: Any = None
        """The KV cache of the decode step that runs now."""
        self.build_ffn = FFNBuilder()
        self.tokenwise = self._tokenwise([stage for stage in stages if isinstance(stage, PredictNeurons)])
        self.guide = next((Guidance(stage, self) for stage in stages if isinstance(stage, Guide)), None)
        if self.guide is not None:
            self.before[self.guide.stage.layer].append(BeforeLayer(self.guide.stage.layer, self.guide.select))
        self.trace = Trace()
        self.name = method.name or type(method).__name__
        self.talks: WeakSet[Conversation] = WeakSet()
        """One per KV cache that is still there."""
        self.undecided: WeakKeyDictionary[Conversation, list[tuple[ChooseNeurons, FFNSignals]]] = WeakKeyDictionary()
        """Choices of neurons that wait for the first decode step."""
        self.call: calls.Call | None = None
        """The ``generate`` call that runs now."""
        self.decoders: OrderedDict[Any, Any] = OrderedDict()
        """Static decoders by the signature of the prompts they serve (see :mod:`corematching.engine.compiled`)."""
        self.capture: Capture | None = (
            functools.partial(cuda_graph, model.device) if model.device.type == "cuda" else None
        )
        """How work is captured; None where there is nothing to gain."""
        self.capturing = False
        """Whether the prefill that runs now is to be captured."""
        self.captured: CapturedPrefill | None = None
        self.active: PromptState | None = None
        """The prompt being decoded right now; None during prefill."""
        self.current: PromptState | None = None
        """The prompt of the latest forward pass."""
        self.activations: dict[int, Tensor] = {}
        """Per layer: what its FFN's down projection was given in this prefill."""
        self.attended: dict[int, Tensor] = {}
        """Per layer: what its FFN was given in this prefill."""
        self.noted: dict[str, set[int]] = {"activations": set(), "attended": set()}
        """The layers whose signals of either name some stage asks for."""
        self.sharing: Sharing | None = None
        """How the rows of the prompts that come next begin alike, if they do."""
        self.input_ids: Tensor | None = None
        self.visual_inputs: dict[str, Any] = {}
        """What the latest images came with, pixels left out: sizes, grids."""
        self.final: Layout | None = None
        """The last layer's sequence, if the latest forward pass ran a prompt that was shortened."""
        self.logits_to_keep: int | Tensor = 0
        self.tower_run: TowerRun | None = None
        self.image_hidden: Tensor | None = None
        """What vision-side methods gave the decoder in the latest forward pass, [visual tokens, d]."""
        self._undo: list[Callable[[], None]] = []

    # ------------------------------------------------------------------------------------------------ installation
    def install(self) -> None:
        base: Any = self.family.base(self.model)
        self.hook(base.register_forward_pre_hook(self._note_inputs, with_kwargs=True))
        self.hook(self.family.head(self.model).register_forward_pre_hook(self._note_head))
        # Stock code collects hidden states and attentions around the decoder's forward, so ours is wrapped likewise.
        captured = capture_outputs(lambda decoder, *args, **kwargs: self._decoder_forward(*args, **kwargs))
        self._replace(self.decoder, "forward", functools.partial(captured, self.decoder))
        self._replace(self.model, "forward", calls.forward(self, self.model.forward), stacked=True)
        self._replace(self.model, "generate", calls.generate(self, self.model.generate), stacked=True)
        if self.guide is not None:
            self.hook(base.register_forward_pre_hook(self.guide.note_inputs, with_kwargs=True))
            self._replace(self.model, "generate", self.guide.generate(self.model.generate), stacked=True)
        if self.acts_on_tower:
            self._replace(base, "get_image_features", self._image_features(base.get_image_features))
            self.hook(base.register_forward_hook(self._put_image_hidden))
        elif self.geometry.image_tokens is None:
            self._replace(base, "get_image_features", self._noting_images(base.get_image_features))
        if self.tower_attention is not None:
            self.tower_attention.install()
        wanted = {stage.layer - 1 for stages in self.before.values() for stage in stages if stage.activations}
        wanted |= {stage.layer for stages in self.after.values() for stage in stages if stage.activations}
        wanted |= set(self.choose)
        self.noted["activations"] = wanted
        for index in sorted(wanted):
            down = self.decoder.layers[index].mlp.down_proj
            self.hook(down.register_forward_pre_hook(functools.partial(self._note_activations, index)))
        self.noted["attended"] = {s.layer - 1 for stages in self.before.values() for s in stages if s.attended}
        for index in sorted(self.noted["attended"]):
            norm = self.decoder.layers[index].post_attention_layernorm
            self.hook(norm.register_forward_hook(functools.partial(self._note_attended, index)))
        for index in sorted({*self.choose, *self.tokenwise}):
            mlp = self.decoder.layers[index].mlp
            self._undo.append(neuron_major(mlp))
            self._replace(mlp, "forward", functools.partial(self._mlp_forward, index, mlp.forward))
        install_readers(self)

    def _tokenwise(self, stages: list[PredictNeurons]) -> dict[int, TokenwiseFFN]:
        """Per layer: the FFN that lets a predictor choose each token's neurons."""
        files = {file: load_predictors(file, self.model, self.decoder) for file in {stage.file for stage in stages}}
        mlps = {stage.layer: self.decoder.layers[stage.layer].mlp for stage in stages}
        return {s.layer: TokenwiseFFN(mlps[s.layer], s, files[s.file][s.layer], self.build_ffn) for s in stages}

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()
        for talk in self.talks:
            talk.open = False
        self.talks.clear()
        self.undecided.clear()
        self.decoders.clear()
        self.activations.clear()
        self.attended.clear()
        self.visual_inputs = {}
        self.tower_run = self.current = self.input_ids = self.captured = self.final = self.image_hidden = None

    def forget_pass(self) -> None:
        """Let go of what a forward pass that failed has left."""
        self.activations.clear()
        self.attended.clear()
        self.tower_run = self.current = self.final = self.image_hidden = None

    def hook(self, handle: Any) -> None:
        """Keep a hook's handle until the method is removed."""
        self._undo.append(handle.remove)

    def _replace(self, module: nn.Module, name: str, function: Callable, stacked: bool = False) -> None:
        """Shadow a method on one instance; undoing takes the shadow off again.

        Unless ``stacked`` (the new function calls what it shadows), nothing else may have shadowed it before.
        """
        if vars(module).get(name) is not None and not stacked:
            raise UserError(f"{type(module).__name__}.{name} is already replaced by something else on this model")
        self.shadow(module, name, function)

    def shadow(self, module: nn.Module, name: str, value: Any) -> None:
        """Put an attribute over what an instance has by that name, until the method is removed."""
        before = vars(module).get(name, module)
        object.__setattr__(module, name, value)
        if before is module:
            self._undo.append(lambda: object.__delattr__(module, name))
        else:
            self._undo.append(lambda: object.__setattr__(module, name, before))

    @property
    def acts_on_tower(self) -> bool:
        """Whether the vision tower is run here, for a method that decides inside it or at its output."""
        return self.tower_attention is None and (self.blocks is not None or self.output is not None)

    # ------------------------------------------------------------------------------------------------------- hooks
    def _note_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.input_ids = kwargs.get("input_ids", args[0] if args else None)
        # generate() encodes images before this pass, and then takes what describes them out of its arguments.
        self.visual_inputs |= self._descriptions(kwargs)
        if self.acts and "video" in (kwargs.get("mm_encoder_outputs") or {}) | _videos(kwargs):
            raise UserError(f"method {self.name!r} reads images, not videos: give its frames as images")

    def _descriptions(self, kwargs: dict) -> dict[str, Any]:
        names = (name for name in self.family.visual_inputs if name != "pixel_values")
        return {name: kwargs[name] for name in names if kwargs.get(name) is not None}

    def _noting_images(self, stock: Callable) -> Callable:
        """The stock model's image features; notes what describes the images."""
        names = list(inspect.signature(stock).parameters)

        @functools.wraps(stock)
        def features(*args: Any, **kwargs: Any) -> Any:
            self.visual_inputs = self._descriptions(dict(zip(names, args, strict=False)) | kwargs)
            return stock(*args, **kwargs)

        return features

    def _note_head(self, module: nn.Module, args: tuple) -> None:
        if self.current is not None:
            self.current.count_head(args[0].shape[1])

    def _note_activations(self, index: int, module: nn.Module, args: tuple) -> None:
        if self.active is None:
            self.activations[index] = args[0]

    def _note_attended(self, index: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.active is None:
            self.attended[index] = output

    def notes_at(self, index: int) -> set[str]:
        """Which signals of a layer some stage asks for: "activations", "attended"."""
        return {name for name, layers in self.noted.items() if index in layers}

    def take_notes(self, index: int) -> dict[str, Tensor]:
        """Hand out what hooks noted of a layer, and forget it."""
        return {name: getattr(self, name).pop(index) for name in self.notes_at(index)}

    @property
    def chooses_rows(self) -> bool:
        """Whether decode steps of some layer read other rows than all that are held, or what they read is measured."""
        return bool(self.choose_rows or self.ragged or self.measured)

    def looks_at(self, index: int) -> bool:
        """Whether some stage is asked once a layer has run, about it or at the input of the next."""
        return bool(self.before[index + 1] or self.after[index] or self.choose[index] or index in self.choose_rows)

    def _mlp_forward(self, index: int, dense: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.active is None:
            return dense(x)
        if index in self.tokenwise:
            return self.tokenwise[index](x, self.active)
        ffn = self.active.ffn.get(index)
        return dense(x) if ffn is None else ffn(x)

    def _decoder_forward(self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        if args or inputs_embeds is None:
            raise UserError("the text decoder alone cannot run while a method is installed: call the whole model")
        kwargs.pop("input_ids", None)
        return llm.forward(self, inputs_embeds, **kwargs)

    def _image_features(self, stock: Callable) -> Callable:
        """Run the tower ourselves; the stock model gets blank features to scatter, which never enter a layer."""

        @functools.wraps(stock)
        def features(pixel_values: Tensor, **kwargs: Any) -> Any:
            self.tower_run = tower_of(self.model, self.family, pixel_values, self.blocks, self.sharing)
            rows, columns = self.tower_run.grid
            width = self.model.config.text_config.hidden_size
            blank = pixel_values.new_zeros(rows * columns, width, dtype=self.model.dtype)
            shown = len(self.sharing.shown) if self.sharing else pixel_values.shape[0]
            return BaseModelOutputWithPooling(pooler_output=[blank] * shown)  # type: ignore[arg-type]

        return features

    def _put_image_hidden(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Give out the features that went into the decoder instead of the blank ones."""
        features, self.image_hidden = self.image_hidden, None
        if features is None:
            return output
        if isinstance(output, tuple):
            return (*output[:-1], features)
        output.image_hidden_states = features
        return output

    def kv_row_bytes(self, element_size: int) -> int:
        """Bytes of one token's keys and values in one layer."""
        text = self.model.config.text_config
        head_dim = head_width(text)
        return 2 * text.num_key_value_heads * head_dim * element_size

    # ----------------------------------------------------------------------------------------------------- prefill
    def conversation(self, cache: Any) -> Conversation | None:
        """What a KV cache belongs to, None for an empty one.

        Raises
        ------
        UserError
            For caches that cannot be shortened, and for those filled elsewhere.
        """
        if cache is None:
            return None
        check_cache(cache)
        talk = conversation_of(cache)
        if cache.get_seq_length() > 0 and (talk is None or talk.session is not self):
            raise UserError("a KV cache filled outside the method's context cannot be continued inside it")
        return talk

    def follow(self, talk: Conversation, like: Conversation | None = None) -> Conversation:
        """Keep track of a conversation; a copy waits for the same choices as what it was copied from."""
        self.talks.add(talk)
        if like is not None and like in self.undecided:
            self.undecided[talk] = list(self.undecided[like])
        return talk

    def prompt_tokens(self, length: int, talk: Conversation | None, cache: Any) -> int:
        """How many of a forward pass's tokens are a prompt; decoded ones follow."""
        if self.call is not None:
            return self.call.prompt_tokens(length, talk is not None, cache is not None)
        return length if talk is None or length > 1 else 0

    def finish_prefill(self, state: PromptState, final: Layout) -> None:
        """Everything went well: the prompt enters the trace (a prefill that failed does not)."""
        self.final = None if final is state.prompt else final
        if isinstance(self.logits_to_keep, Tensor) and final is not state.prompt:
            raise UserError(
                "logits_to_keep as positions is not supported where tokens left the sequence: give a count of last ones"
            )
        if self.call is None or not self.call.runs_again:
            self.trace.defer(state.samples)

    def trace_continuation(self, state: PromptState) -> None:
        """A copied KV cache's first decoded token opens an entry of its own."""
        if state.prefills == 0 and state.decode_steps == 0:
            self.trace.defer(state.samples)

    def finish_pass(self, talk: Conversation | None, cache: Any) -> None:
        """A forward pass of the decoder is done; without a cache, passes of one ``generate`` are one prompt's."""
        if self.call is not None:
            self.current = self.call.finish_pass(self.current, recomputes=cache is None)

    def captured_prefill(self, length: int) -> CapturedPrefill | None:
        """Captured runs of layers for a prefill of ``length`` tokens, if it is to be captured and can be."""
        if not self.capturing or self.capture is None or not CapturedPrefill.covers(self):
            return None
        if self.captured is None:
            self.captured = CapturedPrefill(self, self.capture)
        self.captured.begin(length)
        return self.captured

    def vision_tokens(
        self, state: PromptState, prompt: Prompt, stream: Stream, layout: Layout, cached: bool
    ) -> tuple[Stream, Layout]:
        """Put the reduced (or, if nothing was reduced, all) vision features into the sequence."""
        if self.tower_attention is not None and any(layout.visual_counts):
            return packed.choose(self, state, stream, layout)
        if not self.acts_on_tower or not any(layout.visual_counts):
            return stream, layout
        # Taken once: a later prompt must bring its own images, and the tower's states need not outlive prefill. Within
        # one generate call without a cache, the same prompt comes again.
        run = self.tower_run
        if self.call is None or (cached and not self.call.runs_again):
            self.tower_run = None
        if run is None:
            raise UserError("vision-side methods need pixel_values to pass through the installed model")
        if run.prompt is None:
            shared = self.sharing
            if shared and self.output is not None and self.output.question:
                run, shared = run.of_images(shared.shown), None
            sizes = [self.geometry.image_tokens or 1] * len(run.origin)
            images = shared.images if shared else images_by_row(sizes, layout.visual_counts)
            run.book(prompt, images, state.ledger)
            run.replaced = self._replaced(run)
        state.vision_tokens = [[[tokens[i] for i in own] for own in run.images] for tokens in run.attention_tokens]
        state.vision_mlp_tokens = [[sum(tokens[i] for i in own) for own in run.images] for tokens in run.mlp_tokens]
        if run.replaced is None:
            hidden = stream.hidden
            rows = torch.tensor([i for own in run.images for i in own], device=hidden.device)
            features = run.projected[rows]
            self.image_hidden = run.projected.flatten(0, 1)
            return Stream(hidden.masked_scatter(prompt.visual_mask[..., None], features.to(hidden.dtype))), layout
        decision, replaced = run.replaced
        counts = decision.counts or [decision.origin.shape[1]] * len(decision.origin)
        self.image_hidden = torch.cat([own[:count] for own, count in zip(decision.hidden, counts, strict=True)])
        renumber = self.output.renumber if self.output is not None else self.blocks.renumber  # type: ignore[union-attr]
        if not run.projects_all:
            state.projected_tokens = list(replaced.counts or [])
        layout, stream = layout.replace(replaced, stream, renumber)
        return stream, layout

    def _replaced(self, run: TowerRun) -> tuple[Replace, Replace] | None:
        """What the tower's output becomes per image and per sample; None when nothing was reduced."""
        decision = image_decision(run, self.output)
        if decision is None:
            return None
        return decision, per_sample(decision, run.images, self.geometry.image_tokens or 1)

    # --------------------------------------------------------------------------------------------- decode-time neurons
    def defer_choice(self, talk: Conversation, stage: ChooseNeurons, signals: FFNSignals) -> None:
        """Note what a layer's neurons are to be chosen from: an answer of one token need not pay for the choice.

        Decided now where memory is short: if weights are streamed, and for batches whose activations would fill it.
        """
        waiting = self.undecided.setdefault(talk, [])
        held = sum(other.activations.nbytes for _, other in waiting) + signals.activations.nbytes
        if self.streams or held > MOST_HELD:
            self._choose(talk.state, stage, signals)
        else:
            waiting.append((stage, signals))

    def choose_neurons(self, talk: Conversation) -> None:
        """Choose the neurons that decoding computes; called before a prompt's first decode step."""
        for stage, signals in self.undecided.pop(talk, ()):
            self._choose(talk.state, stage, signals)

    def _choose(self, state: PromptState | None, stage: ChooseNeurons, signals: FFNSignals) -> None:
        assert state is not None
        outer, self.active = self.active, state  # what a method asks its FFN now is no prefill's activation
        try:
            chosen = stage.select(signals)
        finally:
            self.active = outer
        if chosen is not None and chosen.index.shape[1] < self.geometry.ffn_width:
            state.neurons[stage.layer] = chosen.index
            index = chosen.index if state.order is None else chosen.index[state.order]
            state.ffn[stage.layer] = self.build_ffn(self.decoder.layers[stage.layer].mlp, index)


def _videos(kwargs: dict) -> dict[str, Any]:
    given = kwargs.get("pixel_values_videos")
    return {} if given is None else {"video": given}


def _by_layer(stages: list[Any], kind: Any) -> defaultdict[int, list[Any]]:
    grouped: defaultdict[int, list[Any]] = defaultdict(list)
    for stage in stages:
        if isinstance(stage, kind):
            grouped[stage.layer].append(stage)
    return grouped
