"""Training of the tiny model: the shared code, the packing, exact continuation, the exported folder."""

import random

import numpy as np
import pytest
import torch

from corematching.benchmarks.mini.drawing import ground_of, render, render_array
from corematching.benchmarks.mini.questions import BENCHMARK_FAMILIES, questions_for
from corematching.benchmarks.mini.scenes import GRID, make_scene
from corematching.training.architecture import TinyShape, build_model, deepen
from corematching.training.card import model_card
from corematching.training.cli import main
from corematching.training.codes import ATTRIBUTES, CodeBook, PatchLabels
from corematching.training.evaluate import evaluate
from corematching.training.export import build_processor
from corematching.training.language import LanguageStage, Mix, Packer, choose_patches, where_loss
from corematching.training.loop import Schedule, Track
from corematching.training.prompts import user_prompt
from corematching.training.reading import IGNORED, ReadingLayers, run_layers, twin_of
from corematching.training.vision import VisionStage, pixels, summary_loss, vision_batch, visual_features
from corematching.training.vocabulary import SYSTEM, build_tokenizer

MICRO = TinyShape(layers=2, ffn=32, vision_layers=3, vision_ffn=32)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def codes(tokenizer):
    return CodeBook(tokenizer, MICRO.width)


@pytest.fixture(scope="module")
def packer(tokenizer):
    return Packer(tokenizer)


@pytest.fixture
def model(tokenizer, codes):
    return build_model(tokenizer, codes, MICRO)


def vision_stage(codes):
    return VisionStage("crops", 4, 2, 12, codes)


def language_stage(codes, packer):
    mix = Mix({"gqa": 1, "seedbench": 1})
    return LanguageStage(
        "few",
        4,
        4,
        mix,
        codes,
        packer,
        questions=2,
        visual=16,
        reading=ReadingLayers(1, 2),
        gate_weight=0.1,
        where_weight=0.1,
    )


def test_answers_are_single_tokens_and_decode_exactly(tokenizer):
    for answer in ("yes", "no", "7", "A", "D", "unanswerable", "red", "cat", "It is a large striped circle"):
        ids = tokenizer(answer, add_special_tokens=False).input_ids
        assert len(ids) == len(answer.split())
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == answer


def test_any_text_encodes_and_words_outside_the_vocabulary_survive(tokenizer):
    ids = tokenizer("Zebra xylophone", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "Zebra xylophone"
    assert tokenizer.unk_token_id in tokenizer("汉字").input_ids


def test_no_mini_prompt_needs_the_character_fallback(tokenizer):
    rng = random.Random(0)
    for benchmark in BENCHMARK_FAMILIES:
        for seed in range(40):
            for question in questions_for(benchmark, make_scene(seed, "test"), rng):
                for variant in ("llava15", "lmms_eval"):
                    tokens = tokenizer.tokenize(user_prompt(benchmark, question, variant))
                    assert not [token for token in tokens if token.startswith("##") or token == "<unk>"], tokens


def test_the_chat_template_is_vicuna_v1_for_both_kinds_of_content(tokenizer):
    expected = f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:"
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    for content in ("<image>\nWhat is it?", parts):
        chat = [{"role": "user", "content": content}]
        assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected


def test_visual_features_are_those_of_the_stock_model(model):
    values = pixels(_pictures(2))
    stock = torch.stack(list(model.model.get_image_features(values, return_dict=True).pooler_output))
    assert torch.allclose(visual_features(model, values), stock, atol=1e-5)


def _pictures(count):
    return np.stack([render_array(make_scene(seed, "test")) for seed in range(count)])


def test_the_visual_code_can_be_read_back(codes):
    scenes = [make_scene(seed, "test") for seed in range(20)]
    labels = PatchLabels.of(scenes)
    index = torch.arange(GRID * GRID).expand(len(scenes), -1)
    tokens = codes.visual_tokens(labels, index // GRID, index % GRID)
    for name in ATTRIBUTES:
        truth = labels.values[name]
        read = (tokens @ codes.attribute_codes(name).T).argmax(-1)
        assert (read == truth)[truth >= 0].all()


def test_few_patches_are_those_of_objects_first():
    labels = PatchLabels.of([make_scene(1, "test")])
    on_object = labels.values["colour"][0] >= 0
    index = choose_patches(labels, int(on_object.sum()) + 3, torch.Generator().manual_seed(0))
    assert set(on_object.nonzero()[:, 0].tolist()) < set(index[0].tolist())


@torch.no_grad()
def test_packed_questions_answer_like_single_prompts(model, tokenizer, packer):
    """Packing is only a speed-up: the logits are those of the stock model fed with each prompt alone."""
    rng = random.Random(3)
    scene = make_scene(5, "test")
    drawn = [("gqa", question) for question in questions_for("gqa", scene, rng)[:3]]
    whole = torch.arange(GRID * GRID)[None]
    batch = packer.pack([scene], whole, [drawn], random.Random(1))
    visual = visual_features(model, pixels(_pictures(6)[5:]))
    _, last = run_layers(model, batch, visual)
    packed = model.lm_head(model.model.language_model.norm(last))[0]
    processor = build_processor(tokenizer)
    at = 0
    for _, question in drawn:
        text = f"{SYSTEM} USER: <image>\n{user_prompt('gqa', question, 'llava15')} ASSISTANT:"
        inputs = processor(images=[render(scene)], text=[text], return_tensors="pt")
        alone = model(**inputs).logits[0, -1]
        length = inputs.input_ids.shape[1] - len(packer.prefix) - GRID * GRID
        assert torch.allclose(packed[at + length - 1], alone, atol=1e-3)
        assert batch.targets[0, at + length - 1] == tokenizer(question.answer, add_special_tokens=False).input_ids[0]
        at += length + 1
    assert (batch.targets[0] != IGNORED).sum() == 2 * len(drawn)


@torch.no_grad()
def test_text_meets_its_own_image_in_the_reading_layers_only(model, codes, packer):
    """Below them it sees its own keys with the twin's values, above them a stranger's keys and values."""
    stage = language_stage(codes, packer)
    batch, visual = stage.packed(model, random.Random(0))

    def moved(layers, row, changed):
        """Whether the text of `row` changes when the visual tokens of `changed` do."""
        other = visual.clone()
        other[changed] = visual[changed].flip(0) + 1
        one, two = (run_layers(model, batch, v, layers)[1][row] for v in (visual, other))
        return not torch.equal(one, two)

    everywhere, above, below = ReadingLayers(0, 2), ReadingLayers(0, 0), ReadingLayers(2, 2)
    assert [moved(everywhere, 0, [row]) for row in range(4)] == [True, False, False, False]
    assert [moved(above, 0, [row]) for row in range(4)] == [False, True, False, False]
    assert [moved(below, 0, [row]) for row in range(4)] == [True, False, True, False]


def test_where_is_asked_of_questions_about_one_object(model, tokenizer, packer):
    """The last token before the answer is told left or right, top or bottom; other questions are left out."""
    scene, rng = make_scene(0, "train"), random.Random(0)
    drawn = [("gqa", question) for question in questions_for("gqa", scene, rng)]
    batch = packer.pack([scene], torch.arange(4)[None], [drawn], rng)
    asked = [question.boxes[0] for _, question in drawn if len(question.boxes) == 1]
    spots = batch.spots[batch.spots[..., 0] != IGNORED]
    told = [tokenizer.decode(pair) for pair in spots]
    assert told == [
        f"{'left' if x0 + x1 < 336 else 'right'} {'top' if y0 + y1 < 336 else 'bottom'}" for x0, y0, x1, y1 in asked
    ]
    sure = torch.zeros(1, batch.text.shape[1], model.config.text_config.hidden_size)
    sure[batch.spots[..., 0] != IGNORED] = model.lm_head.weight[spots].sum(1)
    assert where_loss(model, sure, batch.spots)[1] == 1
    assert where_loss(model, sure, torch.full_like(batch.spots, IGNORED))[0] == 0


def test_twins_share_the_layout_and_nothing_that_is_asked(model, codes, packer):
    rng = random.Random(0)
    for seed in range(20):
        scene = make_scene(seed, "train")
        twin = twin_of(scene, rng)
        places = [(item.category, item.size, item.box) for item in scene.objects]
        assert places == [(item.category, item.size, item.box) for item in twin.objects]
        assert [item.colour for item in scene.objects] != [item.colour for item in twin.objects]
        assert len({item.colour for item in twin.objects}) == len(twin.objects)
        assert (ground_of(scene)[0] == ground_of(twin)[0]).all()


@pytest.mark.parametrize("kind", ["vision", "language"])
def test_an_interrupted_run_continues_exactly(kind, tokenizer, codes, packer, tmp_path):
    def run(folder, *pieces):
        for steps in pieces:
            model = build_model(tokenizer, codes, MICRO)
            stage = vision_stage(codes) if kind == "vision" else language_stage(codes, packer)
            track = Track(kind, [stage], folder, log=lambda line: None)
            track.run(model, stop_after=steps)
        return model.state_dict(), track

    straight, _ = run(tmp_path / "straight", None)
    pieces, track = run(tmp_path / "pieces", 1, 2, None)
    assert track.done.keys() == {"crops" if kind == "vision" else "few"}
    assert all(torch.equal(straight[name], pieces[name]) for name in straight)
    start = build_model(tokenizer, codes, MICRO).state_dict()
    assert any(not torch.equal(straight[name], start[name]) for name in straight)


def test_vision_training_lowers_its_loss(model, codes):
    stage = VisionStage("crops", 20, 2, 12, codes)
    optimizers = stage.start(model)
    losses = []
    for step in range(stage.steps):
        loss, _ = stage.loss(model, step % 2)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])


def test_batches_are_functions_of_their_name():
    first, again, other = (vision_batch(name, 1, 12) for name in ("a", "a", "b"))
    assert torch.equal(first.pixels, again.pixels)
    assert not torch.equal(first.pixels, other.pixels)


@torch.no_grad()
def test_deepening_keeps_the_function(model, tokenizer, codes):
    deep = build_model(tokenizer, codes, TinyShape(layers=4, ffn=32, vision_layers=3, vision_ffn=32), seed=9)
    deepen(model, deep)
    ids = tokenizer("What color is the square?", return_tensors="pt").input_ids
    assert torch.equal(model(input_ids=ids).logits, deep(input_ids=ids).logits)
    with pytest.raises(ValueError, match="cannot deepen 4 decoder layers to 2"):
        deepen(deep, model)


def test_evaluation_counts_every_question_and_names_its_conditions(model, codes, packer):
    tallies = evaluate(model, packer, codes, "random-64", ("pope",), images=3)
    assert set(tallies) == {("pope", "exists")}
    assert tallies["pope", "exists"].total == 6
    with pytest.raises(ValueError, match="unknown condition 'grey': use one of dense, blank"):
        evaluate(model, packer, codes, "grey")


def test_the_summary_asks_which_colours_and_kinds_are_there(codes):
    labels = PatchLabels.of([make_scene(0, "test")])
    exact = sum(truth @ codes.attribute_codes(name) * 7 for name, truth in labels.present.items())
    loss, found = summary_loss(exact, labels, codes)
    assert found == 1
    assert loss < 0.1
    assert summary_loss(torch.zeros_like(exact), labels, codes)[0] > 3 * loss


def test_the_schedule_rises_stays_and_falls():
    schedule = Schedule(100, warmup=10, decay_share=0.5)
    assert schedule(0) == pytest.approx(0.1)
    assert schedule(30) == 1
    assert schedule(99) < 0.05


def test_the_command_line_refuses_what_it_would_overwrite_or_lacks(tmp_path, capsys):
    (tmp_path / "vision.pt").touch()
    refusals = {
        "vision": "give --resume to go on",
        "deep": "needs the finished vision track",
        "whole": "the whole track needs the finished sight track",
    }
    for tracks, message in refusals.items():
        with pytest.raises(SystemExit) as stop:
            main(["--out", str(tmp_path), "--tracks", tracks, *(["--resume"] if tracks != "vision" else [])])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
        (tmp_path / "vision.pt").unlink(missing_ok=True)


def test_the_card_tells_times_and_tables(model):
    card = model_card(model.config, 6_600_000, {"vision: quarter": 61.4}, 1, "| a | b |")
    assert "| vision: quarter | 61 |" in card
    assert "6.6 million parameters" in card
    assert "| a | b |" in card
    assert "made from nothing" in card
    assert "goes on from a friend" in model_card(model.config, 1, {}, 1, "", "a friend")
