"""FocusLLaVA: the scale of every region, the tokens that come of it, and what the text leaves of them."""

from __future__ import annotations

import pickle
from pathlib import PurePosixPath

import pytest
import torch
from conftest import left_pad, make_prompt

import corematching as cm


def save(path, weights):
    torch.save({"router": weights}, path)
    return str(path)


def always(scale, tmp_path):
    """A router that gives every region one scale."""
    weights = torch.zeros(3, 65)
    weights[scale, -1] = 1
    return save(tmp_path / f"always-{scale}.pt", weights)


@torch.no_grad()
def test_the_finest_scale_everywhere_is_dense_bit_for_bit(random_llava, prompts, tmp_path):
    batch = left_pad(prompts)
    dense = random_llava(**batch).logits
    with cm.build_method("focusllava", router=always(2, tmp_path), keep=1.0)(random_llava) as trace:
        assert torch.equal(random_llava(**batch).logits, dense)
    assert [sample.average_visual_tokens for sample in trace.samples] == [64, 64, 128]


@torch.no_grad()
@pytest.mark.parametrize(("scale", "tokens"), [(0, 4), (1, 16)])
def test_one_scale_everywhere_is_max_pooling(scale, tokens, random_llava, tmp_path):
    prompt = make_prompt(3)
    side = (4, 2)[scale]
    tower = random_llava.model.vision_tower(prompt["pixel_values"], output_hidden_states=True)
    grid = tower.hidden_states[-2][0, 1:].view(8 // side, side, 8 // side, side, -1)
    wanted = random_llava.model.multi_modal_projector(grid.amax((1, 3)).flatten(0, 1))
    with cm.build_method("focusllava", router=always(scale, tmp_path), keep=1.0)(random_llava) as trace:
        seen = random_llava(**prompt).image_hidden_states
    torch.testing.assert_close(seen, wanted, atol=1e-5, rtol=1e-4)
    assert len(trace.samples[0].visual_tokens[0]) == trace.samples[0].projected_tokens == tokens
    middle = [(row * side + side // 2) * 8 + column * side + side // 2
              for row in range(8 // side) for column in range(8 // side)]  # fmt: skip
    assert trace.samples[0].visual_tokens[0].tolist() == middle


@torch.no_grad()
def test_every_region_has_the_scale_its_router_gives_most(random_llava, router_file):
    """Against a loop over regions, with the router written out."""
    weights = torch.load(router_file, weights_only=True)["router"]
    prompt = make_prompt(4, images=3)
    tower = random_llava.model.vision_tower(prompt["pixel_values"], output_hidden_states=True)
    wanted, scales = [], set()
    for number, features in enumerate(tower.hidden_states[-2][:, 1:]):
        grid, places = features.view(8, 8, -1), []
        for top in (0, 4):
            for left in (0, 4):
                part = grid[top : top + 4, left : left + 4].flatten(0, 1)
                mean, above = part.mean(0), part.amax(0) - part.mean(0)
                both = [(one - one.mean()) / (one.var(unbiased=False) + 1e-5).sqrt() for one in (mean, above)]
                scale = int((weights[:, :-1] @ torch.cat(both) + weights[:, -1]).argmax())
                scales.add(scale)
                side = (4, 2, 1)[scale]
                places += [
                    (top + row + side // 2) * 8 + left + column + side // 2
                    for row in range(0, 4, side)
                    for column in range(0, 4, side)
                ]
        wanted += [64 * number + place for place in sorted(places)]
    assert len(scales) > 1, "the router must use several scales for the test to tell anything"
    with cm.build_method("focusllava", router=router_file, keep=1.0)(random_llava) as trace:
        random_llava(**prompt)
    assert trace.samples[0].visual_tokens[0].tolist() == wanted


@torch.no_grad()
def test_text_keeps_what_it_attends_to_and_batches_answer_like_single_prompts(random_llava, router_file, prompts):
    before = random_llava(**prompts[0]).logits
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with cm.build_method("focusllava", router=router_file, layer=3, keep=0.5)(random_llava) as trace:
        together = random_llava.generate(**left_pad(prompts), **options)
        batch = trace.drain()
        for row, prompt in enumerate(prompts):
            alone = random_llava.generate(**prompt, **options)
            assert torch.equal(alone[0, -5:], together[row, -5:])
            (own,) = trace.drain()
            counts = [len(layer) for layer in own.visual_tokens]
            assert counts == [len(layer) for layer in batch[row].visual_tokens]
            assert counts == [counts[0]] * 3 + [counts[0] // 2] * 3
            assert set(own.visual_tokens[3].tolist()) <= set(own.visual_tokens[0].tolist())
    assert torch.equal(random_llava(**prompts[0]).logits, before)


@torch.no_grad()
def test_the_text_sampler_goes_by_all_tokens_behind_the_image(random_llava, tmp_path):
    """Against the stock model's attention, all regions at their finest."""
    prompt = make_prompt(6, text=7)
    random_llava.set_attn_implementation("eager")
    try:
        attention = random_llava(**prompt, output_attentions=True).attentions[2][0].mean(0)
    finally:
        random_llava.set_attn_implementation("sdpa")
    received = attention[-7:, 5:69].sum(0)
    with cm.build_method("focusllava", router=always(2, tmp_path), layer=3, keep=0.25)(random_llava) as trace:
        random_llava(**prompt)
    assert trace.samples[0].visual_tokens[3].tolist() == received.topk(16).indices.sort().values.tolist()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, r"router=None.*train_selection.py focusllava"),
        ({"router": "nowhere.pt"}, r"router='nowhere.pt' is no router"),
        ({"router": "packaged:routers/other.pt"}, r"router='packaged:routers/other.pt' is no router"),
        ({"router": "here", "layer": 6}, r"layer=6 .*1 to 5"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(parameters, message, random_llava, router_file):
    if parameters.get("router") == "here":
        parameters = {**parameters, "router": router_file}
    with pytest.raises(cm.UserError, match=message), cm.build_method("focusllava", **parameters)(random_llava):
        pass
    with pytest.raises(cm.UserError, match=r"keep=0"):
        cm.build_method("focusllava", keep=0.0)


@pytest.mark.parametrize(
    "content",
    [b"a text", pickle.dumps(PurePosixPath("a"), protocol=2), 3, torch.zeros(3), torch.zeros(2, 65)],
    ids=["text", "other pickle", "number", "vector", "two scales"],
)
def test_a_file_that_holds_no_router_is_one_line(content, random_llava, tmp_path):
    path = tmp_path / "odd.pt"
    path.write_bytes(content) if isinstance(content, bytes) else save(path, content)
    with pytest.raises(cm.UserError, match=r"^router='.*odd.pt' is no router that can be read: train one [^\n]*$"):
        cm.build_method("focusllava", router=str(path))(random_llava).__enter__()


@torch.no_grad()
def test_a_router_of_another_tower_is_refused(random_llava, tmp_path):
    router = save(tmp_path / "wide.pt", torch.zeros(3, 257))
    with (
        cm.build_method("focusllava", router=router, layer=3)(random_llava),
        pytest.raises(cm.UserError, match="tower of width 128, the model's has 32"),
    ):
        random_llava(**make_prompt(3))
