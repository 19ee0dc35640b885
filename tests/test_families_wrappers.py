"""Every family is asked as lmms-eval's own wrapper of it asks: the same model inputs, so the same answers."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch
from small_families import SMALL_FAMILIES, save_small_family

import corematching as cm
from corematching.answering.generator import Generator
from corematching.answering.prompts import Prompts, Question
from corematching.answering.recipes import RECIPES
from corematching.benchmarks import load_benchmark, load_source

WRAPPERS = {"llava_hf": "LlavaHf", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3_VL", "internvl_hf": "InternVLHf"}
ASKED = ("gqa", "mmbench", "scienceqa")
LIMIT, MOST = 2, 4


@pytest.fixture(scope="module", params=SMALL_FAMILIES)
def family(request, tmp_path_factory):
    return request.param, save_small_family(request.param, tmp_path_factory.mktemp(request.param), seed=2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Questions of the bundled suite: (text, document, its images, settings)."""
    from corematching.benchmarks.tasks import build_tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CM_CACHE", str(tmp_path_factory.mktemp("cache")))
        found = []
        for name in ASKED:
            for task in build_tasks(load_benchmark(name), load_source("mini", n=8), "lmms_eval", LIMIT, None, MOST):
                settings = dict(task.config.generation_kwargs)
                found += [(task.doc_to_text(doc), task.doc_to_visual(doc) or [], settings) for doc in task.eval_docs]
        # What the suite does not have: several images, none, and images that are not square.
        text, (image, *_), settings = found[0]
        wide = image.crop((0, 40, image.width, 140))
        return [*found, (text, [wide], settings), (text, [image, wide.rotate(90, expand=True)], settings)]


class Recording:
    """lmms-eval's chat wrapper of a family at batch size 1, its calls of ``generate`` noted."""

    def __init__(self, name, folder, monkeypatch):
        decord = types.ModuleType("decord")
        decord.VideoReader = decord.cpu = None
        monkeypatch.setitem(sys.modules, "decord", decord)
        wrapper = RECIPES[name].wrapper
        cls = getattr(importlib.import_module(f"lmms_eval.models.chat.{wrapper}"), WRAPPERS[wrapper])
        dtype = {"dtype": "float32"} if wrapper == "llava_hf" else {}  # the others know one
        self.model = cls(pretrained=str(folder), device="cpu", device_map="cpu", **dtype)
        self.inputs = []
        generate = self.model.model.generate

        def noted(**given):
            self.inputs.append({key: value for key, value in given.items() if torch.is_tensor(value)})
            return generate(**given)

        monkeypatch.setattr(self.model.model, "generate", noted)

    def answers(self, rows):
        from lmms_eval.api.instance import Instance

        requests = []
        for number, (text, images, settings) in enumerate(rows):
            content = [*({"type": "image", "url": image} for image in images), {"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}]
            given = (text, lambda doc, messages=messages: list(messages), dict(settings), number, "task", "test")
            metadata = {"task": "task", "doc_id": number, "repeats": 1}
            requests.append(Instance("generate_until", arguments=given, idx=0, metadata=metadata))
        self.model.task_dict = {"task": {"test": list(range(len(rows)))}}
        found = []
        for request in requests:  # one by one, since wrappers sort what they get
            found += self.model.generate_until([request])
        return [str(getattr(one, "text", one)).strip() for one in found]


@pytest.fixture(scope="module")
def recording(family):
    with pytest.MonkeyPatch.context() as patch:
        yield Recording(*family, patch)


@pytest.fixture(scope="module")
def loaded(family):
    return cm.load_model(str(family[1]), dtype="float32" if RECIPES[family[0]].wrapper == "llava_hf" else "bfloat16")


def questions(rows):
    return [Question(text, lambda images=images: images, dict(settings)) for text, images, settings in rows]


def test_model_inputs_are_the_wrappers(family, recording, loaded, rows):
    recording.answers(rows)
    model, processor = loaded
    generator = Generator(model, processor, "lmms_eval", "processor")
    batches = Prompts(questions(rows), generator.encoder, "lmms_eval", "processor").batches(lambda: 1, 1)
    mine = {batch.indices[0]: batch for batch in batches}
    assert len(recording.inputs) == len(mine) == len(rows)
    for number, theirs in enumerate(recording.inputs):
        batch = mine[number]
        own = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        own |= generator._visual(batch, batch.images[0])
        told = set(generator.family.visual_inputs) | {"input_ids", "attention_mask"}
        assert {name for name in own if name in told} == {name for name in theirs if name in told}
        for name, value in own.items():
            if value.is_floating_point():
                torch.testing.assert_close(value.float(), theirs[name].to(value.dtype).float(), rtol=0, atol=0)
            else:
                assert torch.equal(value, theirs[name]), name


def test_predictions_are_the_wrappers(recording, loaded, rows):
    theirs = recording.answers(rows)
    for batch_size in (1, 3):
        generator = Generator(*loaded, "lmms_eval", "processor", batch_size)
        answers = generator.answer(questions(rows), cm.build_method("dense"))
        if batch_size == 1:
            assert [answer.text for answer in answers] == theirs
    assert any(theirs)
