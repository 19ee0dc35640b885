"""The lmms-eval model: same answers as lmms-eval's own wrapper, batched or not, and nothing swallowed."""

import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_llava import save_small_llava

import corematching as cm
from corematching.answering.conversation import VICUNA_V1, pad_to_square, prepare_images, render, to_rgb
from corematching.answering.generator import Generator
from corematching.answering.prompts import Question
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

    monkeypatch.setattr(loaded[0].model.language_model.layers[0], "forward", out_of_memory)
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


# ----------------------------------------------------------------------------------------------- what is put to a model
@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("I;16", [0, 32896, 65535], [0, 128, 255]),
        ("I;16B", [0, 32896, 65535], [0, 128, 255]),
        ("I", [0, 32896, 65535], [0, 128, 255]),
        ("I", [0, 100, 255], [0, 100, 255]),
        ("F", [0.0, 0.5, 1.0], [0, 128, 255]),
        ("F", [0.0, 100.0, 255.0], [0, 100, 255]),
        ("L", [0, 100, 255], [0, 100, 255]),
        ("1", [0, 255, 255], [0, 255, 255]),
    ],
)
def test_grey_images_of_every_depth_keep_their_greys(mode, values, expected):
    if mode == "I;16B":
        image = Image.frombytes(mode, (3, 1), np.array(values, dtype=">u2").tobytes())
    elif mode == "1":
        image = Image.fromarray(np.array([values], dtype=np.uint8)).convert("1")
    else:
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32, "L": np.uint8}[mode]
        image = Image.fromarray(np.array([values], dtype=dtype))
    assert image.mode == mode
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert np.asarray(rgb)[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "YCbCr"])
def test_other_modes_convert_as_in_the_official_evaluation(mode):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).convert(mode)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("prompt", ["llava15", "lmms_eval"])
def test_special_tokens_in_a_question_are_text(loaded, prompt):
    model, processor = loaded
    if prompt == "lmms_eval" and not processor.chat_template:
        pytest.skip("this checkpoint has no chat template")
    picture = Image.new("RGB", (40, 30), "red")
    texts = ["What does <image> mean in <image>?", "Is </s> an end?", "What is this?"]
    questions = [Question(text, lambda: [picture]) for text in texts]
    batched, alone = Generator(model, processor, prompt, batch_size=3, max_new_tokens=4), []
    together = batched.answer(questions, cm.build_method("dense"))
    single = Generator(model, processor, prompt, max_new_tokens=4)
    for question in questions:
        alone += single.answer([question], cm.build_method("dense"))
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert {(answer.trace.images, answer.trace.image_tokens) for answer in together} == {
        (1, model.config.image_seq_length)
    }
    plain_text = texts[2]
    assert render(processor, plain_text, 1, prompt).endswith(f"{plain_text} ASSISTANT:") or prompt == "lmms_eval"


def test_batches_that_do_not_fit_are_halved_and_that_is_remembered(loaded, monkeypatch):
    model, processor = loaded
    pictures = [Image.new("RGB", (40 + count, 30), "red") for count in range(7)]
    questions = [Question(f"Question {'again ' * count}?", lambda own=own: [own]) for count, own in enumerate(pictures)]
    method = cm.build_method("fastv", keep=16, layer=2)
    right = Generator(model, processor, batch_size=1, max_new_tokens=3).answer(questions, method)
    generator, sizes = Generator(model, processor, batch_size=6, max_new_tokens=3), []
    stock = model.model.language_model.layers[1].forward

    def short_of_memory(hidden, *args, **kwargs):
        if hidden.shape[1] > 1:
            sizes.append(len(hidden))
        if len(hidden) > 2:
            raise torch.OutOfMemoryError("simulated")
        return stock(hidden, *args, **kwargs)

    monkeypatch.setattr(model.model.language_model.layers[1], "forward", short_of_memory)
    answers = generator.answer(questions, method)
    assert sizes == [6, 3] + [1] * 7
    assert generator.batch_size == 1
    assert [answer.text for answer in answers] == [answer.text for answer in right]
    for answer, own in zip(answers, right):
        assert cm.flops(model.config, answer.trace) == cm.flops(model.config, own.trace)


def test_a_sample_that_does_not_fit_is_named_with_batch_size(loaded, monkeypatch):
    model, processor = loaded

    def never(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(model.model.language_model.layers[1], "forward", never)
    question = Question("What?", lambda: [Image.new("RGB", (8, 8))], where="gqa, document 3")
    with pytest.raises(cm.UserError, match=r"gqa, document 3: out of memory .*batch_size=1"):
        Generator(model, processor, batch_size=4).answer([question] * 4, cm.build_method("dense"))


def test_other_runtime_errors_stay_as_they_are(loaded, monkeypatch):
    model, processor = loaded

    def broken(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(model.model.language_model.layers[1], "forward", broken)
    question = Question("What?", lambda: [Image.new("RGB", (8, 8))])
    with pytest.raises(RuntimeError, match="shapes do not match"):
        Generator(model, processor, batch_size=4).answer([question] * 4, cm.build_method("dense"))


def test_prompts_beyond_the_context_name_their_document(loaded, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", 100)
    question = Question("word " * 200, lambda: [Image.new("RGB", (8, 8))], where="gqa, document 3")
    with pytest.raises(cm.UserError, match=r"gqa, document 3: a prompt of \d+ tokens .* context of 100"):
        Generator(model, processor).answer([question], cm.build_method("dense"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, r"batch_size='auto' is not valid: give a count >= 1"),
        ({"batch_size": "0"}, r"batch_size='0' is not valid"),
        ({"max_new_tokens": "many"}, r"max_new_tokens='many' is not valid"),
        ({"prompt": "vicuna"}, r"unknown prompt 'vicuna'; valid: llava15, lmms_eval"),
        ({"image": "crop"}, r"unknown image mode 'crop'; valid: pad, processor"),
        ({"attn_implementation": "sdpa"}, r"unknown parameter 'attn_implementation': model arguments are pretrained"),
        ({"method": "fastv", "kep": 3}, r"unknown parameter 'kep': .*parameters of fastv are layer, keep"),
        ({"method": "nonsense"}, r"unknown method 'nonsense'"),
    ],
)
def test_wrong_model_arguments_are_refused_before_loading(arguments, message, monkeypatch):
    from corematching.evaluation import lmms_model

    monkeypatch.setattr(lmms_model.cm, "load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(cm.UserError, match=message):
        lmms_model.CoreMatchingLMM(**arguments)
