"""The walkthrough of docs/add_a_method.md, executed: its class, its YAML, its use."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import left_pad

import corematching as cm
from corematching import registry

PAGE = (Path(__file__).parent.parent / "docs" / "add_a_method.md").read_text()


def block(language: str) -> str:
    """The page's first code block in a language."""
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL).group(1)


@pytest.fixture
def longest(tmp_path, monkeypatch):
    """The page's method, found by name as if its two files lay where the page puts them."""
    name = "corematching.methods.longest"
    (tmp_path / "longest.py").write_text(block("python"))
    spec = importlib.util.spec_from_file_location(name, tmp_path / "longest.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    shutil.copytree(registry.CONF / "method", tmp_path / "method")
    (tmp_path / "method" / "longest.yaml").write_text(block("yaml"))
    monkeypatch.setattr(registry, "CONF", tmp_path)
    return name


@torch.no_grad()
def test_the_method_of_the_walkthrough_works(longest, random_llava, prompts):
    def first_states(prompt):
        features = torch.cat(random_llava.model.get_image_features(prompt["pixel_values"]).pooler_output)
        return features.norm(dim=1)

    with cm.build_method("longest", layer=0, keep=9)(random_llava) as trace:
        batch = random_llava.generate(**left_pad(prompts), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert batch.shape[0] == 3
    for sample, prompt in zip(trace.samples, prompts, strict=True):
        expected = first_states(prompt).topk(9).indices.sort().values
        assert sample.visual_tokens[0].tolist() == expected.tolist()
    dense = random_llava(**prompts[0]).logits
    with cm.build_method("longest", keep=1.0)(random_llava):
        assert torch.equal(random_llava(**prompts[0]).logits, dense)


def test_its_parameters_are_checked(longest, random_llava):
    with pytest.raises(cm.UserError, match="keep=0 "):
        cm.build_method("longest", keep=0)
    with pytest.raises(cm.UserError, match="layer=6"):
        cm.build_method("longest", keep=9, layer=6)(random_llava).__enter__()


def test_the_walkthrough_is_short():
    assert len(block("python").splitlines()) <= 40
    assert len(block("yaml").splitlines()) <= 6


def test_every_stage_is_in_the_table():
    from corematching.methods import base

    for stage in base.Stage.__args__:
        assert f"`{stage.__name__}`" in PAGE
