"""``model(...)`` and ``model.generate(...)`` under a method: which tokens are a prompt, what cannot be asked for."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import Cache

from corematching.engine.cache import Before
from corematching.engine.checks import unwrapped
from corematching.errors import UserError

if TYPE_CHECKING:
    from corematching.engine.layout import Layout
    from corematching.engine.session import Session
    from corematching.engine.state import PromptState

IGNORED_LABEL = -100


@dataclass
class Call:
    """One running ``generate``."""

    prompt: int | None
    """Tokens it was given, padding included; None if they are not known."""
    passes: int = 0
    record: PromptState | None = None
    """Without a KV cache: the prompt that every step runs again."""

    def prompt_tokens(self, length: int, continued: bool, cached: bool) -> int:
        """How many tokens of the coming pass are a prompt.

        The first pass may hold the first candidates of speculative decoding behind the prompt; without a cache every
        pass holds the prompt and what was generated since.
        """
        if self.passes and cached:
            return 0
        if continued:
            return length if length > 1 else 0
        return length if self.prompt is None else min(self.prompt, length)

    @property
    def runs_again(self) -> bool:
        """Whether the prompt that runs now has run before in this call."""
        return self.record is not None

    def finish_pass(self, state: PromptState | None, recomputes: bool) -> PromptState | None:
        """Count a pass; returns the state on whose account the rest of it goes."""
        self.passes += 1
        if not recomputes or state is None:
            return state
        if self.record is None:
            self.record = state
        else:
            self.record.absorb(state)
        return self.record


@contextmanager
def decoding_after(model: Any, prompt: int) -> Iterator[None]:
    """Within, of every forward pass without a KV cache's past, the tokens after the first ``prompt`` ones are decoded.

    They run together, as candidates of speculative decoding do: through the FFNs that the method chose from the prompt.
    The model must have a method installed.
    """
    session = unwrapped(model)._corematching
    outer, session.call = session.call, Call(prompt)
    try:
        yield
    finally:
        session.call = outer


def forward(session: Session, stock: Callable) -> Callable:
    """The model's ``forward``: labels follow the tokens that stay, and a pass that fails leaves nothing behind."""
    names = [name for name in inspect.signature(stock).parameters if name != "kwargs"]

    @functools.wraps(stock)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(names, args, strict=False))
        labels = kwargs.pop("labels", None)
        session.logits_to_keep = kwargs.get("logits_to_keep", 0)
        session.final = None
        mark, before = session.trace.mark, Before.of(_cache_of(kwargs))
        try:
            if labels is None:
                return stock(**kwargs)
            return _with_loss(session, stock, labels, kwargs, names)
        except BaseException:
            session.trace.rollback(mark)
            session.forget_pass()
            before.restore()
            raise

    return wrapper


def _cache_of(kwargs: dict[str, Any]) -> Any:
    cache = kwargs.get("past_key_values")
    return cache if isinstance(cache, Cache) and hasattr(cache, "layers") else None


def _with_loss(session: Session, stock: Callable, labels: Tensor, kwargs: dict[str, Any], names: list[str]) -> Any:
    """As stock code does, with labels of the tokens whose logits there are."""
    if not isinstance(session.logits_to_keep, int) or session.logits_to_keep:
        raise UserError("labels need the logits of all tokens: leave logits_to_keep out")
    as_dict = kwargs.pop("return_dict", None)
    out = stock(**kwargs, return_dict=True)
    own = labels if session.final is None else labels_of(session.final, labels)
    further = {name: value for name, value in kwargs.items() if name not in names}
    model = session.model
    loss = model.loss_function(logits=out.logits, labels=own, vocab_size=model.config.text_config.vocab_size, **further)
    out = type(out)(loss=loss, **{name: value for name, value in out.items() if name != "loss"})
    return out if (model.config.return_dict if as_dict is None else as_dict) else out.to_tuple()


def labels_of(final: Layout, labels: Tensor) -> Tensor:
    """Labels [B, N] of a prompt's tokens -> [B, n] of the tokens that reached the last layer (-100: no single one)."""
    return labels.gather(1, final.source.clamp(min=0)).masked_fill(final.source < 0, IGNORED_LABEL)


def generate(session: Session, stock: Callable) -> Callable:
    """The model's ``generate``: knows where the prompt ends, refuses what would change what a method decides."""

    @functools.wraps(stock)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("inputs")
        ids = kwargs.get("input_ids") if given is None else given
        _check_options(session, ids, args[1] if len(args) > 1 else kwargs.get("generation_config"), kwargs)
        outer, session.call = session.call, Call(ids.shape[1] if isinstance(ids, Tensor) else None)
        mark, before = session.trace.mark, Before.of(_cache_of(kwargs))
        try:
            return stock(*args, **kwargs)
        except BaseException:
            session.trace.rollback(mark)
            before.restore()
            raise
        finally:
            session.call, session.tower_run = outer, None

    return wrapper


def _check_options(session: Session, ids: Any, config: Any, kwargs: dict[str, Any]) -> None:
    """Refuse generation settings under which a method would silently do something else.

    Raises
    ------
    UserError
        Names the setting and what to do instead.
    """

    def setting(name: str) -> Any:
        value = kwargs.get(name)
        return value if value is not None else getattr(config or session.model.generation_config, name, None)

    if setting("prefill_chunk_size") is not None:
        raise UserError(
            "prefill_chunk_size is not supported under a method, which looks at the whole prompt: leave it out"
        )
    if setting("cache_implementation") not in (None, "dynamic", "dynamic_full"):
        raise UserError(
            f"cache_implementation={setting('cache_implementation')!r} is not supported under a method: use the "
            "default (dynamic) cache"
        )
    if setting("assistant_early_exit") is not None:
        raise UserError("assistant_early_exit is not supported under a method: give an assistant_model of its own")
    speculative = kwargs.get("assistant_model") is not None or setting("prompt_lookup_num_tokens") is not None
    if speculative and (setting("output_hidden_states") or setting("output_attentions")):
        raise UserError(
            "speculative decoding under a method cannot give hidden states or attentions: leave output_hidden_states "
            "and output_attentions out"
        )
    if session.chooses_rows and (speculative or setting("use_cache") is False):
        what = "speculative decoding" if speculative else "use_cache=False"
        raise UserError(f"{what} is not supported by method {session.name!r}, which chooses KV rows token by token")
    past = _cache_of(kwargs)
    seen = past.get_seq_length() if past is not None else 0
    if past is not None and setting("use_cache") is False:
        raise UserError("use_cache=False contradicts past_key_values: leave one of them out")
    if seen and speculative:
        raise UserError(
            "speculative decoding runs the whole conversation again in later turns: leave it or past_key_values out"
        )
    mask = kwargs.get("attention_mask")
    told = mask.shape[-1] if isinstance(mask, Tensor) else ids.shape[1] if isinstance(ids, Tensor) else None
    if seen and told is not None and told <= seen:
        raise UserError(
            f"input_ids hold no token beyond the {seen} in past_key_values: give the whole conversation, or the new "
            "tokens with an attention_mask over all"
        )


def check_context(config: Any, lengths: list[int], earlier: list[int]) -> None:
    """Refuse prompts that reach beyond the positions the language model was made for.

    Parameters
    ----------
    lengths
        Tokens of each sample's turn.
    earlier
        Tokens of the turns before; empty if there are none.
    """
    most = getattr(config.text_config, "max_position_embeddings", None)
    longest = max(map(sum, zip(lengths, earlier, strict=True))) if earlier else max(lengths)
    if most is not None and longest > most:
        raise UserError(f"a prompt of {longest} tokens is longer than the model's context of {most}: shorten it")
