"""The check of the bundled model: questions, replies that survive an interruption, gates that can be missed."""

import pytest
import torch
from conftest import make_prompt

from corematching.errors import UserError
from corematching.inspection.activity import activity
from corematching.training import gates
from corematching.training.architecture import TinyShape, build_model
from corematching.training.codes import CodeBook
from corematching.training.export import build_processor
from corematching.training.vocabulary import build_tokenizer


@pytest.fixture(scope="module")
def untrained():
    tokenizer = build_tokenizer()
    shape = TinyShape(layers=3, ffn=32, vision_layers=3, vision_ffn=32)
    model = build_model(tokenizer, CodeBook(tokenizer, shape.width), shape)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.eval(), build_processor(tokenizer)


def test_questions_are_new_and_paired_by_image():
    asked = gates.ask(9, 0)
    assert asked == gates.ask(9, 0)
    assert not {one.scene for one in asked} & {one.scene for one in gates.ask(9, 1)}
    assert len({one.scene for one in asked}) == 5


def test_an_interrupted_check_goes_on_and_counts_patches_on_objects(untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "_CHUNK", 1)
    asked, lines = gates.ask(2, 0), []
    few = gates.Condition("few, late", "random", {"keep": 64, "layer": 2})
    first = gates.run(few, asked[:1], *untrained, tmp_path, lines.append)
    replies = gates.run(few, asked, *untrained, tmp_path, lines.append)
    assert replies[:1] == first
    assert len(lines) == 2, "the first question was answered twice"
    assert [reply.kept for reply in replies] == [64] * 2
    assert all(reply.on_object <= gates.object_patches(one.scene).sum() for reply, one in zip(replies, asked))
    with pytest.raises(UserError, match="holds 2 replies for 1 questions"):
        gates.run(few, asked[:1], *untrained, tmp_path, print)


def replies(share, n=200):
    return [gates.Reply(i < share * n, 64, 16) for i in range(n)]


def test_gates_are_met_or_missed_by_the_numbers():
    asked = gates.ask(200, 0)
    good = {name: replies(1.0) for name in [condition.name for condition in gates.CONDITIONS]}
    good |= {name: replies(0.4) for name in good if "random" in name or "blank" in name}
    text, met = gates.report(asked, good | {"random 64, layer 8": replies(1.0)})
    assert met, text
    assert "| random 64, layer 2 | 40.0 |" in text
    for name, share in (("dense", 0.9), ("blank image", 0.6), ("fastv 64, layer 8", 0.9), ("random 64, layer 2", 1.0)):
        text, met = gates.report(asked, good | {name: replies(share)})
        assert not met
        assert "MISSED" in text
    text, met = gates.report(asked, {"dense": replies(1.0)})
    assert not met
    assert "not run" in text


def test_activity_tells_even_votes_from_agreement(random_llava):
    prompt = make_prompt(0)
    layers = activity(random_llava, [prompt], rho=1.0, beta=0.5)
    assert len(layers) == 6
    for layer in layers:
        assert 0.3 < layer.positive_visual < 0.7
        assert 0.5 <= layer.concentration < 0.8
    with torch.no_grad():  # now a few neurons fire on everything, the others never
        weight = random_llava.model.language_model.layers[0].mlp.up_proj.weight
        kept = weight.clone()
        weight[8:] = 0
        agreed = activity(random_llava, [prompt], rho=1.0, beta=0.5)[0]
        weight.copy_(kept)
    assert agreed.concentration == 1
    assert agreed.positive_visual < layers[0].positive_visual
