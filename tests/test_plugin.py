"""The lmms-eval model: same answers as lmms-eval's own wrapper, batched or not, and nothing swallowed."""

import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_llava import save_small_llava

import corematching as cm
from corematching.answering.conversation import VICUNA_V1, pad_to_square, prepare_images, render
from corematching.answering.generator import Generator, Question
from corematching.benchmarks import BENCHMARKS, load_benchmark, load_source
from corematching.evaluation.harness import evaluate

TINY = Path(cm.__file__).parent / "models" / "tiny_llava"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_small_llava(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return cm.load_model(str(checkpoint))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("CM_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


def build(name, limit=2, prompt="llava15", most=4):
    from corematching.benchmarks.tasks import build_tasks

    return build_tasks(load_benchmark(name), load_source("mini", n=8), prompt, limit, None, most)


def predictions(model, tasks):
    samples = evaluate(model, tasks)["samples"]
    return {(task, row["doc_id"]): row["filtered_resps"][0] for task, rows in samples.items() for row in rows}


def ours(loaded, method="dense", batch_size=1, prompt="llava15", image="pad", **parameters):
    from corematching.evaluation.lmms_model import CoreMatchingLMM

    generator = Generator(*loaded, prompt, image, batch_size)
    return CoreMatchingLMM.wrap(generator, cm.build_method(method, **parameters), "small")


def stock(checkpoint, monkeypatch):
    """lmms-eval's own simple `llava_hf`, with what it lacks here: decord, and a device map that transformers takes."""
    decord = types.ModuleType("decord")
    decord.VideoReader = decord.cpu = None
    monkeypatch.setitem(sys.modules, "decord", decord)
    from lmms_eval.models.simple.llava_hf import VICUNA_CHAT_TEMPLATE, LlavaHf

    return LlavaHf(
        pretrained=str(checkpoint), device="cpu", device_map="cpu", dtype="float32", chat_template=VICUNA_CHAT_TEMPLATE
    )


@pytest.mark.parametrize("name", BENCHMARKS)
def test_dense_answers_equal_the_stock_wrappers(name, loaded, checkpoint, cache, monkeypatch):
    tasks = build(name)
    mine = predictions(ours(loaded), tasks)
    theirs = predictions(stock(checkpoint, monkeypatch), tasks)
    assert len(mine) >= 2
    assert mine == {key: text.strip() for key, text in theirs.items()}
    assert any(mine.values())


@pytest.mark.skipif(not (TINY / "config.json").exists(), reason="the bundled model is not there")
def test_the_bundled_models_answers_equal_the_stock_wrappers(cache, monkeypatch):
    model = cm.load_model("tiny")
    for name in ("gqa", "pope", "textvqa"):
        tasks = build(name, limit=4)
        mine = predictions(ours(model), tasks)
        assert mine == predictions(stock(TINY, monkeypatch), tasks)


@pytest.mark.parametrize(("method", "parameters"), [("dense", {}), ("fastv", {"keep": 16}), ("corematching", {})])
def test_batches_answer_as_single_questions_do(loaded, cache, method, parameters):
    tasks = [task for name in ("gqa", "textvqa") for task in build(name, limit=6)]
    single, batched = (ours(loaded, method, size, **parameters) for size in (1, 5))
    assert predictions(single, tasks) == predictions(batched, tasks)
    assert single.answers.keys() == batched.answers.keys()
    for key, answer in single.answers.items():
        other = batched.answers[key]
        assert answer.tokens == other.tokens
        assert answer.trace.kv_lengths == other.trace.kv_lengths
        assert answer.trace.decode_steps == other.trace.decode_steps
        assert [len(layer) for layer in answer.trace.visual_tokens] == [
            len(layer) for layer in other.trace.visual_tokens
        ]


def test_lmms_eval_finds_the_plugin_and_builds_it_from_strings(checkpoint, cache):
    (entry,) = (e for e in metadata.entry_points(group="lmms_eval.models") if e.name == "corematching")
    (manifest,) = entry.load()()
    assert manifest.model_id == "corematching"
    from lmms_eval.models import get_model

    cls = get_model("corematching")
    text = f"pretrained={checkpoint},method=fastv,keep=16,layer=3,max_new_tokens=3"
    model = cls.create_from_arg_string(text, {"batch_size": "4", "device": "cpu", "max_batch_size": None})
    assert (model.method.keep, model.method.layer, model.generator.batch_size) == (16, 3, 4)
    predictions(model, build("gqa"))
    assert {len(answer.trace.visual_tokens[-1]) for answer in model.answers.values()} == {16}
    with pytest.raises(ValueError, match="unknown parameter 'kep'"):
        cls.create_from_arg_string(f"pretrained={checkpoint},method=fastv,kep=16", {})


def test_the_fingerprint_names_everything_that_changes_answers(loaded):
    base = repr(ours(loaded, "fastv", keep=16))
    assert base == repr(ours(loaded, "fastv", keep=16, batch_size=3))
    assert "0x" not in base
    for other in (
        ours(loaded, "fastv", keep=8),
        ours(loaded, "random", keep=16),
        ours(loaded, "fastv", keep=16, prompt="lmms_eval"),
        ours(loaded, "fastv", keep=16, image="processor"),
    ):
        assert repr(other) != base


def test_an_exception_in_generation_comes_out(loaded, cache, monkeypatch):
    def out_of_memory(*_, **__):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(loaded[0], "generate", out_of_memory)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        predictions(ours(loaded), build("gqa"))


def test_an_exception_in_scoring_comes_out_as_itself(loaded, cache, monkeypatch):
    tasks = build("gqa")

    def broken(self, doc, results, full_docs=None):
        raise KeyError("a bug in scoring")

    monkeypatch.setattr(type(tasks[0]), "process_results", broken)
    with pytest.raises(KeyError, match="a bug in scoring"):
        predictions(ours(loaded), tasks)


def test_the_model_survives_an_evaluation_and_so_do_the_hosts_random_numbers(loaded, cache):
    import random

    import torch

    random.seed(5)
    torch.manual_seed(5)
    expected = random.Random(5).random(), torch.rand(1, generator=torch.Generator().manual_seed(5))
    model = ours(loaded)
    predictions(model, build("gqa"))
    assert (random.random(), torch.rand(1)) == expected
    assert model.generator.model is loaded[0]
    assert predictions(model, build("gqa"))


def ask(loaded, *questions, method="dense", **settings):
    return Generator(*loaded, **settings).answer(questions, cm.build_method(method))


def picture(seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_questions_without_and_with_several_images_share_a_run(loaded):
    two, limit = [picture(0), picture(1)], {"max_new_tokens": 3}
    questions = [
        Question("What color is it?", lambda: [], limit),
        Question("What color is it?", lambda: two[:1], limit),
        Question("What color is it?", lambda: two, limit),
    ]
    together = ask(loaded, *questions, batch_size=3)
    alone = [ask(loaded, question)[0] for question in questions]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.trace.image_tokens for answer in together] == [0, 64, 128]


def test_limits_stops_and_lengths(loaded):
    def answer(image, limit=6):
        return ask(loaded, Question("What color is it?", lambda: [image], {"max_new_tokens": limit}))[0]

    # The random model says anything; take a picture to which it begins with two different words of one token each.
    image = next(seen for seen in map(picture, range(60)) if len(set(answer(seen, limit=2).text.split())) == 2)
    long = answer(image)
    assert long.tokens == 6
    words = long.text.split()
    cut = ask(loaded, Question("What color is it?", lambda: [image], {"max_new_tokens": 6, "until": [words[1]]}))[0]
    assert cut.text == words[0]
    assert ask(loaded, Question("What color is it?", lambda: [image]), max_new_tokens=2)[0].tokens == 2
    model = loaded[0]
    first = model.generation_config.eos_token_id
    try:
        token = loaded[1].tokenizer(words[1], add_special_tokens=False).input_ids[0]
        model.generation_config.eos_token_id = [first, token]
        ended = ask(loaded, Question("What color is it?", lambda: [image], {"max_new_tokens": 6}))[0]
    finally:
        model.generation_config.eos_token_id = first
    assert ended.tokens == 2
    assert ended.trace.decode_steps == 1


def test_settings_of_the_task_decide_about_sampling(loaded):
    generator = Generator(*loaded)
    greedy = generator._generate_arguments({"temperature": 0.2, "top_p": 1.0, "do_sample": False, "num_beams": 1})
    assert (greedy["do_sample"], greedy["temperature"], greedy["num_beams"]) == (False, None, 1)
    sampled = generator._generate_arguments({"temperature": 0.2, "do_sample": True})
    assert (sampled["do_sample"], sampled["temperature"]) == (True, 0.2)


def test_prompt_modes(loaded):
    processor = loaded[1]
    official = VICUNA_V1.format(turn="<image>\nIs it red?")
    assert official.endswith("USER: <image>\nIs it red? ASSISTANT:")
    assert render(processor, "Is it red?", 1, "llava15") == official
    assert render(processor, "Is it red?", 1, "lmms_eval") == official, "the bundled chat template is vicuna_v1"
    assert render(processor, "Is it {red}?", 2, "llava15").count("<image>\n") == 2
    assert "<image>" not in render(processor, "Is it red?", 0, "llava15")
    with pytest.raises(ValueError, match="valid: llava15, lmms_eval"):
        render(processor, "Is it red?", 1, "vicuna")
    bare = types.SimpleNamespace(chat_template=None)
    with pytest.raises(ValueError, match="use prompt=llava15"):
        render(bare, "Is it red?", 1, "lmms_eval")


def test_images_are_padded_to_squares_with_the_mean_colour(loaded):
    processor = loaded[1]
    wide = Image.new("RGB", (100, 40), (255, 0, 0))
    (square,) = prepare_images([wide], "pad", processor)
    mean = tuple(int(255 * channel) for channel in processor.image_processor.image_mean)
    assert square.size == (100, 100)
    assert square.getpixel((50, 29)) == mean
    assert square.getpixel((50, 30)) == (255, 0, 0)
    assert square.getpixel((50, 69)) == (255, 0, 0)
    assert square.getpixel((50, 70)) == mean
    assert pad_to_square(wide.rotate(90, expand=True), mean).getpixel((29, 50)) == mean
    assert prepare_images([wide], "processor", processor)[0].size == (100, 40)
    assert prepare_images([wide.convert("L")], "processor", processor)[0].mode == "RGB"
    with pytest.raises(ValueError, match="valid: pad, processor"):
        prepare_images([wide], "crop", processor)


def test_wrong_arguments_are_told(loaded):
    with pytest.raises(ValueError, match="batch_size=0"):
        Generator(*loaded, batch_size=0)


def test_the_plugin_entry_point_imports_nothing_heavy():
    script = "import sys; import corematching.evaluation.plugin; assert not {'torch','transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
