"""Whatever runs beside a question, its answer and its trace are those of the question alone, for every method."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_llava import save_small_llava

import corematching as cm
from corematching import groups
from corematching.answering.budget import bytes_per_token, token_budget
from corematching.answering.generator import Generator
from corematching.answering.prompts import Question
from corematching.cost import memory
from corematching.engine.preflight import check_methods
from corematching.registry import method_defaults

FIT = {
    "pyramiddrop": {"layers": [1, 3, 5]},
    "sparsevlm": {"schedule": [30, 20, 8], "layers": [0, 2, 4], "priority_heads": 2},
    "visionzip": {"dominant": 12, "contextual": 4},
    "dart": {"keep": 16, "image_pivots": 2, "text_pivots": 2},
    "vtc_cls": {"keep": 16, "layer": 2},
    "topv": {"layer": 1, "keep": 12},
    "tome": {"r": 8},
    "divprune": {"keep": 0.3},
    "pooling": {"keep": 16},
    "corematching_release": {"first_layer": 2, "last_layer": 4},
}
"""Parameters that fit a model of 64 visual tokens and 6 layers, where 16 kept tokens or the defaults do not."""
WORDS = ("What", "color", "is", "the", "circle", "square", "left", "of", "it")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return cm.load_model(str(save_small_llava(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def fitting(loaded):
    """Every method that needs nothing besides the model."""
    found = {}
    for name in groups.choices("method"):
        defaults = method_defaults(name)
        usual = {"keep": 16} if isinstance(defaults.get("keep"), int) else {}
        try:
            method = cm.build_method(name, **FIT.get(name, usual))
            check_methods([method], loaded[0].config, loaded[0].config._name_or_path)
        except cm.UserError:
            continue
        found[name] = method
    assert len(found) >= 25, sorted(found)
    return found


@functools.cache
def picture(number):
    return (
        Image.linear_gradient("L").rotate(90 * number).convert("RGB").point(lambda value: (value * (number + 2)) % 256)
    )


def question(about, words):
    text = " ".join(WORDS[(about + place) % len(WORDS)] for place in range(words))
    return Question(text, lambda: [picture(number) for number in about_pictures(about)], {"max_new_tokens": 3})


def about_pictures(about):
    return () if about == 3 else (about,)


@pytest.fixture(scope="module")
def alone(loaded):
    """One question, one method, nothing shared."""
    return functools.cache(lambda method, about, words: Generator(*loaded).answer([question(about, words)], method)[0])


def told(answer):
    trace = answer.trace
    return (
        (answer.text, answer.tokens, answer.ended, trace.kv_lengths, trace.llm_tokens, trace.vision_tokens),
        [layer.tolist() for layer in trace.visual_tokens],
        [None if layer is None else layer.tolist() for layer in trace.neurons],
        trace.overhead_flops,
    )


def check(loaded, alone, methods, asked, batch_size, batch_tokens):
    generator = Generator(*loaded, batch_size=batch_size, batch_tokens=batch_tokens)
    found = generator.answer_together([question(*one) for one in asked], methods)
    for method, answers in zip(methods, found, strict=True):
        if isinstance(answers, Exception):
            raise answers
        for one, answer in zip(asked, answers, strict=True):
            assert told(answer) == told(alone(method, *one)), (method, one)


def test_every_method_answers_in_company_as_alone(loaded, alone, fitting):
    asked = [(0, 3), (1, 5), (0, 6), (3, 4), (0, 3), (1, 2)]
    check(loaded, alone, list(fitting.values()), asked, 4, None)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.data(),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=6),
    st.integers(1, 6),
    st.integers(64, 700),
)
def test_groupings_and_budgets_change_nothing(loaded, alone, fitting, data, asked, batch_size, batch_tokens):
    names = data.draw(st.lists(st.sampled_from(sorted(fitting)), min_size=1, max_size=3, unique=True))
    check(loaded, alone, [fitting[name] for name in names], asked, batch_size, batch_tokens)


def test_the_token_budget_follows_the_memory_that_is_free(loaded):
    model = loaded[0]
    each = bytes_per_token(model, 6)
    assert each > bytes_per_token(model) > 0
    budgets = [token_budget(model, 6, free) for free in (0, 8000 * each, 16000 * each, 10**15)]
    assert budgets == [2**11, 4000, 8000, 2**15]


def test_free_memory_is_bounded_by_the_control_group(tmp_path, monkeypatch):
    for name, text in {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 1\nfile 200\n"}.items():
        (tmp_path / name).write_text(text)
    assert memory._group_room(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._group_room(tmp_path) is None
    monkeypatch.setattr(memory, "_group_room", lambda: 500)
    assert memory.free_memory(torch.device("cpu")) == 500
    gpu = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    assert memory.free_memory(gpu) == 120
