"""Training of token selection: a policy of zeros is dropping, gradients reach the selector and nothing else."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import corematching as cm
from corematching.methods.focusllava import candidates, region_of, region_summary, regions, route
from corematching.training import as_vit, focusllava
from corematching.training.architecture import TinyShape, build_model
from corematching.training.codes import CodeBook
from corematching.training.language import Packer
from corematching.training.reading import attend_by_policy, run_layers
from corematching.training.selection import answers, ask, frozen
from corematching.training.vision import tower_features
from corematching.training.vocabulary import build_tokenizer

LAYERS = (1, 2)


@pytest.fixture(scope="module")
def untrained():
    tokenizer = build_tokenizer()
    shape = TinyShape(layers=2, ffn=32, vision_layers=4, vision_ffn=32)
    model = build_model(tokenizer, CodeBook(tokenizer, shape.width), shape)
    return frozen(model), Packer(tokenizer)


@pytest.fixture(scope="module")
def asked(untrained):
    return ask(untrained[1], 0, 0, 2)


def test_a_policy_of_zeros_hides_keys_and_keeps_their_gradient():
    query, key, value = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    policy = torch.tensor([1.0, 0, 1, 1, 0]).requires_grad_()
    out = attend_by_policy(query, key, value, None, policy)
    left = [0, 2, 3]
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key[:, :, left], value[:, :, left])
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-4)
    out.square().sum().backward()
    assert (policy.grad != 0).all()


@torch.no_grad()
def test_text_under_a_policy_reads_as_if_the_others_were_dropped(untrained, asked):
    model, packer = untrained
    visual = as_vit.run_tower(model, asked.pixels, LAYERS).projected
    kept = torch.randperm(576, generator=torch.Generator().manual_seed(1))[:100].sort().values
    policy = torch.zeros(2, 576)
    policy[:, kept] = 1
    _, under = run_layers(model, asked.batch, visual, policy=policy)
    short = ask(packer, 0, 0, 2, places=kept).batch
    assert torch.equal(short.text, asked.batch.text)
    _, dropped = run_layers(model, short, visual[:, kept])
    torch.testing.assert_close(under, dropped, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("second", [0.0, 1e-30])
def test_patches_that_left_do_not_come_back_in_training(untrained, asked, second):
    """Their score is 0, and a second threshold may be as low."""
    model, _ = untrained
    first, _ = as_vit.first_thresholds(model, asked.pixels, (2, 3), 0.6)
    logs = torch.tensor([first, second]).log()
    run = as_vit.run_tower(model, asked.pixels, (2, 3), partial(as_vit.above, logs))
    assert 0 < run.kept[1] <= run.kept[0] < 576


def test_steps_move_the_selector_and_leave_the_model_alone(untrained, asked):
    model, packer = untrained
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    thresholds = as_vit.Thresholds(as_vit.first_thresholds(model, asked.pixels, LAYERS))
    router = focusllava.Router(model.config.vision_config.hidden_size, 0)
    stages = [
        (as_vit.ThresholdStage("t", 4, model, packer, LAYERS, 0.65, scenes=1), thresholds),
        (focusllava.RouterStage("r", 4, model, packer, 0.25, scenes=1), router),
    ]
    for stage, trained in stages:
        (optimizer,) = stage.start(trained)
        start = [parameter.detach().clone() for parameter in trained.parameters()]
        loss, scores = stage.loss(trained, 0)
        again, _ = stage.loss(trained, 0)
        assert float(loss) == float(again), "a step must be a function of its number"
        loss.backward()
        optimizer.step()
        assert all(not torch.equal(old, new) for old, new in zip(start, trained.parameters()))
        assert all(value == value for value in scores.values())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@torch.no_grad()
def test_the_router_sees_in_training_what_it_sees_at_inference(untrained, asked, tmp_path):
    model, packer = untrained
    weights = focusllava.Router(model.config.vision_config.hidden_size, 3).weights.detach() * 10
    features = tower_features(model, asked.pixels)[:, 1:]
    tokens, patch, scale = candidates(features, 24, 24)
    chosen = route(region_summary(regions(features, 24, 24)), weights).argmax(-1)
    wanted = chosen[:, region_of(patch, 24)] == scale
    torch.save({"router": weights}, tmp_path / "router.pt")
    ids = torch.tensor([[1, *[model.config.image_token_id] * 1152, 5]])
    method = cm.build_method("focusllava", router=str(tmp_path / "router.pt"), keep=1.0)
    with method(model) as trace:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=asked.pixels)
    listed = [576 * image + place for image in range(2) for place in patch[wanted[image]].tolist()]
    assert trace.samples[0].visual_tokens[0].tolist() == listed
    batch = ask(packer, 0, 0, 2, places=patch).batch
    logits, targets = answers(model, batch, model.model.multi_modal_projector(tokens), wanted.float())
    assert len(logits) == len(targets) > 0
