"""Questions answered by several processes: every one once, the same answers in the same order, whoever dies."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from corematching.answering.generator import Answer
from corematching.answering.prompts import Question
from corematching.engine.trace import SampleTrace
from corematching.evaluation import shards
from corematching.evaluation.board import Board
from corematching.evaluation.shards import Shards, split

METHODS = ["dense", "fastv"]


def questions(count=12, images=4):
    pictures = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in range(images)]
    return [
        Question(f"What is {number}?", lambda number=number: [pictures[number % images]], {}, f"document {number}")
        for number in range(count)
    ]


def answered(question, method):
    tokens = torch.arange(len(question.text), dtype=torch.int32)
    trace = SampleTrace(9, 4, 1, [tokens], [9], [9], 1, 1, [None, tokens], "dense", 0, [5], [5], [25], 4)
    return Answer(f"{method}: {question.text}", 2, trace)


class Model:
    """Answers at once, and knows what it was asked."""

    def __init__(self, broken=()):
        self.asked, self.broken = [], broken

    def __call__(self, asked, methods, on_done):
        self.asked += [(question.text, method) for question in asked for method in methods]
        return [
            ValueError(f"no {method}") if method in self.broken else [answered(question, method) for question in asked]
            for method in methods
        ]


@given(st.lists(st.sampled_from([(), ("x",), ("y",), ("x", "y"), ("z",)]), max_size=40), st.integers(1, 9))
def test_every_question_is_in_one_shard_and_pictures_stay_together(pictures, parts):
    found = split(pictures, parts)
    assert sorted(index for shard in found for index in shard) == list(range(len(pictures)))
    assert len(found) <= parts
    assert all(found)
    if found:
        assert len(found) == parts or max(map(len, found)) <= -(-len(pictures) // parts)


@pytest.fixture
def poll(monkeypatch):
    monkeypatch.setattr(shards, "_POLL_SECONDS", 0.01)


def test_helpers_answer_what_the_leader_puts_together_in_order(tmp_path, poll):
    asked, board = questions(), Board(tmp_path)
    models = [Model() for _ in range(3)]
    with board.offering(["a", "b"], 4) as leading, ThreadPoolExecutor(3) as pool:
        (offer,) = Board(tmp_path).offers()
        helping = [pool.submit(Shards(offer).help, model, asked, METHODS) for model in models[1:]]
        found = Shards(leading).lead(models[0])(asked, METHODS, lambda count: None)
        helped = sum(help.result() for help in helping)
    assert offer.cells == ("a", "b")
    assert [[answer.text for answer in own] for own in found] == [
        [f"{method}: {question.text}" for question in asked] for method in METHODS
    ]
    assert all(torch.equal(answer.trace.neurons[1], answer.trace.visual_tokens[0]) for answer in found[0])
    everything = [pair for model in models for pair in model.asked]
    assert sorted(everything) == sorted((question.text, method) for question in asked for method in METHODS)
    assert helped == sum(len(model.asked) for model in models[1:]) / len(METHODS) / 3
    assert not list((tmp_path / "shards").iterdir()), "an offer was left behind"


def test_the_leader_uses_what_helpers_have_done(tmp_path, poll):
    asked, helper, leader = questions(), Model(), Model()
    with Board(tmp_path).offering(["a"], 3) as leading:
        (offer,) = Board(tmp_path).offers()
        assert Shards(offer).help(helper, asked, METHODS) == 3
        assert Shards(offer).help(Model(), asked, METHODS) == 0
        found = Shards(leading).lead(leader)(asked, METHODS, lambda count: None)
    assert not leader.asked
    assert [answer.text for answer in found[1]] == [f"fastv: {question.text}" for question in asked]


def test_what_a_helper_fails_at_is_found_out_by_the_leader(tmp_path, poll):
    asked = questions()
    for broken, ends in ((("fastv",), str), ((), list)):
        with Board(tmp_path).offering(["a"], 3) as leading:
            (offer,) = Board(tmp_path).offers()
            Shards(offer).help(Model(broken=["fastv"]), asked, METHODS)
            dense, fastv = Shards(leading).lead(Model(broken))(asked, METHODS, lambda count: None)
        assert len(dense) == 12
        assert str(fastv) == "no fastv" if ends is str else len(fastv) == 12


def test_offers_of_a_process_that_is_gone_are_void(tmp_path, monkeypatch):
    board = Board(tmp_path)
    with board.offering(["a"], 3):
        folder = next((tmp_path / "shards").glob("*/offer.json")).parent
        kept = (folder / "offer.json").read_text()
    folder.mkdir()
    (folder / "offer.json").write_text(kept)
    assert list(Board(tmp_path).offers()) == []
    assert not folder.exists()
