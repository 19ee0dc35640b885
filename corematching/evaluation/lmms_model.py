"""The lmms-eval model: answers generation requests with any model and method of this package.

Registered as ``corematching`` (see `corematching.evaluation.plugin`), so lmms-eval's own command line runs it::

    lmms-eval --model corematching --model_args pretrained=llava_1_5_7b,method=fastv,keep=192 --tasks gqa --batch_size 8
"""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms

import corematching as cm
from corematching.answering.conversation import check_choices
from corematching.answering.generator import Answer, Generator
from corematching.answering.prompts import Question
from corematching.answering.recipes import recipe_of
from corematching.errors import UserError
from corematching.evaluation.sheet import Ask, Shared, Sheet
from corematching.models.loading import load_config
from corematching.registry import PER_IMAGE, method_defaults


class CoreMatchingLMM(lmms):
    """A simple-style lmms-eval model.

    The constructor serves lmms-eval's command line; the runner uses `wrap` with a model it has loaded.

    Parameters
    ----------
    pretrained
        A name in ``conf/model``, a local folder or a Hub id.
    method
        A name in ``conf/method``; all further arguments are its parameters (``keep=192``, ``layer=2`` ...).
    batch_size
        Questions per forward pass (lmms-eval passes a string).
    device, dtype, weights, num_layers
        As in `corematching.load_model`.
    prompt
        ``llava15`` or ``lmms_eval``: the conversation around the task's text; by default the one of the model's family.
    image
        ``pad`` (to a square, as LLaVA-1.5 was trained) or ``processor``; by default likewise.
    max_new_tokens
        Limit for tasks that state none.
    max_batch_size
        Accepted because lmms-eval passes it; unused.

    Raises
    ------
    UserError
        For an unknown method or argument, or one that does not fit the model; before the model is loaded where it can.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "tiny",
        method: str = "dense",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        weights: str = "pretrained",
        num_layers: int | None = None,
        prompt: str | None = None,
        image: str | None = None,
        max_new_tokens: int = 128,
        max_batch_size: int | None = None,
        **parameters: Any,
    ):
        _check_names(method, parameters)
        size, most = _count("batch_size", batch_size), _count("max_new_tokens", max_new_tokens)
        check_choices(prompt, image)
        chosen = cm.build_method(method, **parameters)
        config = load_config(pretrained, weights, num_layers)
        recipe_of(config).choose(config.model_type, prompt, image)
        model, processor = cm.load_model(pretrained, weights=weights, dtype=dtype, device=device, num_layers=num_layers)
        generator = Generator(model, processor, prompt, image, size, most)
        self._set_up(generator, chosen, f"{pretrained}, {weights}, {num_layers}")

    @classmethod
    def create_from_arg_string(cls, *arguments: Any, **more: Any) -> "CoreMatchingLMM":
        """As lmms-eval's own; on its command line, what a user can fix is one line without a traceback."""
        try:
            return super().create_from_arg_string(*arguments, **more)
        except UserError as error:
            program = Path(sys.argv[0])
            if "lmms" not in program.name and program.parent.name != "lmms_eval":
                raise
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    @classmethod
    def wrap(cls, generator: Generator, method: Any, identity: str, ask: Ask | None = None) -> "CoreMatchingLMM":
        """A model around a generator that exists already.

        `identity` says which model that is (name, revision); `ask` where answers come from if not from it alone.
        """
        model = cls.__new__(cls)
        model._set_up(generator, method, identity, ask)
        return model

    def _set_up(self, generator: Generator, method: Any, identity: str, ask: Ask | None = None) -> None:
        super().__init__()
        self.generator, self.method, self.identity = generator, method, identity
        self.ask = ask or Sheet(generator, [method]).column(0)
        self.answers: dict[tuple[str, int], Answer] = {}
        self.on_progress: Callable[[int, int], None] = lambda done, total: None
        self.shared = Shared(1, 0.0)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One text per request, in order.

        What really ran is kept in `answers` by (task, doc id), the time it took in `shared`.
        """
        keys, questions = [], []
        for request in requests:
            text, settings, doc_to_visual, doc_id, task, split = request.args
            keys.append((task, doc_id))
            images = self._images(doc_to_visual, task, split, doc_id)
            questions.append(Question(text, images, dict(settings), f"{task}, document {doc_id}"))
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            self.on_progress(done, len(questions))

        answers, shared = self.ask(questions, count)
        self.shared = Shared(shared.cells, self.shared.seconds + shared.seconds)
        self.answers.update(zip(keys, answers))
        return [answer.text for answer in answers]

    def _images(self, doc_to_visual: Callable, task: str, split: str, doc_id: int) -> Callable[[], list]:
        return lambda: [
            picture for picture in doc_to_visual(self.task_dict[task][split][doc_id]) or () if picture is not None
        ]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: the ten benchmarks generate."""
        raise NotImplementedError("corematching answers generation tasks only, not log-likelihood tasks")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: the ten benchmarks ask once."""
        raise NotImplementedError("corematching answers single-round tasks only")

    def clean(self) -> None:
        """Keep the model: lmms-eval calls this after every evaluation, and its default deletes all modules."""

    @property
    def device(self) -> Any:
        """Device of the model (lmms-eval asks in distributed runs)."""
        return self.generator.model.device

    def __repr__(self) -> str:
        """A fingerprint: lmms-eval's response cache keys on it, so it names everything that changes answers."""
        own = self.generator
        return (
            f"CoreMatchingLMM({self.identity}, {own.model.dtype}, {self.method!r}, prompt={own.prompt}, "
            f"image={own.image}, max_new_tokens={own.max_new_tokens})"
        )


def _check_names(method: str, parameters: dict[str, Any]) -> None:
    """Refuse arguments that are neither this model's nor the method's parameters."""
    own = [
        name for name in inspect.signature(CoreMatchingLMM).parameters if name not in ("parameters", "max_batch_size")
    ]
    known = list(method_defaults(method))
    unknown = ", ".join(repr(name) for name in parameters if name not in (*known, PER_IMAGE))
    if unknown:
        raise UserError(
            f"unknown parameter {unknown}: model arguments are {', '.join(own)}; parameters of {method} are "
            f"{', '.join(known) or '(it has none)'}"
        )


def _count(name: str, value: int | str) -> int:
    """A count that lmms-eval may hand over as a string."""
    try:
        count = int(value)
    except ValueError:
        count = 0
    if count < 1:
        hint = " (a batch that does not fit into memory is halved by itself)" if name == "batch_size" else ""
        raise UserError(f"{name}={value!r} is not valid: give a count >= 1{hint}")
    return count
