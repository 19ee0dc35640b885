"""The vision tower's states on disk: the same answers without the tower, whatever happens to the files."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from small_llava import save_small_llava

import corematching as cm
from corematching.answering.features import FeatureStore
from corematching.answering.generator import Generator
from corematching.answering.prompts import Question

METHODS = ["dense", "visionzip", "random", "tome"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return cm.load_model(str(save_small_llava(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def tower(loaded):
    """Counts the images that go through the tower's last block."""
    seen = []
    block = loaded[0].model.vision_tower.encoder.layers[-1]
    hook = block.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    yield seen
    hook.remove()


def methods():
    overrides = {"random": {"keep": 16}, "visionzip": {"dominant": 12, "contextual": 4}}
    return [cm.build_method(name, **overrides.get(name, {})) for name in METHODS]


def questions(colours=(0, 120)):
    pictures = [Image.linear_gradient("L").convert("RGB").point(lambda value, c=c: (value + c) % 256) for c in colours]
    return [
        Question(f"What is {i}?", lambda i=i: [pictures[i % len(pictures)]], {"max_new_tokens": 3}) for i in range(5)
    ]


def answers(loaded, store, asked=None, chosen=None):
    generator = Generator(*loaded, batch_size=4, features=store)
    found = generator.answer_together(asked or questions(), chosen or methods())
    assert not [error for error in found if isinstance(error, Exception)], found
    return found


def same(one, other):
    return all(
        (a.text, a.trace.kv_lengths, a.trace.vision_tokens, a.trace.overhead_flops)
        == (b.text, b.trace.kv_lengths, b.trace.vision_tokens, b.trace.overhead_flops)
        and all(torch.equal(x, y) for x, y in zip(a.trace.visual_tokens, b.trace.visual_tokens, strict=True))
        for own, others in zip(one, other, strict=True)
        for a, b in zip(own, others, strict=True)
    )


def test_a_second_sweep_skips_the_tower(loaded, tower, tmp_path):
    plain = answers(loaded, None)
    outside = len(tower)
    first = answers(loaded, FeatureStore(tmp_path, 10**9))
    assert len(tower) <= 2 * outside
    tower.clear()
    chosen = [method for method in methods() if method.name != "tome"]
    second = answers(loaded, FeatureStore(tmp_path, 10**9), chosen=chosen)
    assert tower == [], "the tower ran although its states are on disk"
    assert same(plain, first)
    assert same([own for name, own in zip(METHODS, plain) if name != "tome"], second)
    answers(loaded, FeatureStore(tmp_path, 10**9), questions((7,)), chosen)
    assert tower, "other pictures have other states"


def test_other_weights_have_states_of_their_own(loaded, tower, tmp_path):
    chosen = [cm.build_method("dense")]
    answers(loaded, FeatureStore(tmp_path, 10**9), chosen=chosen)
    weight = loaded[0].model.vision_tower.encoder.layers[0].mlp.fc1.weight
    tower.clear()
    with torch.no_grad():
        weight.add_(0.01)
    try:
        answers(loaded, FeatureStore(tmp_path, 10**9), chosen=chosen)
    finally:
        with torch.no_grad():
            weight.sub_(0.01)
    assert tower


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_damaged_files_are_computed_again(loaded, tower, tmp_path, damage):
    chosen = [cm.build_method("dense")]
    right = answers(loaded, FeatureStore(tmp_path, 10**9), chosen=chosen)
    files = sorted(tmp_path.rglob("*.features"))
    content = files[0].read_bytes()
    flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    spoilt = {"cut": content[:-5], "flipped": flipped, "empty": b"", "other": b"x" * len(content)}
    files[0].write_bytes(spoilt[damage])
    tower.clear()
    assert same(right, answers(loaded, FeatureStore(tmp_path, 10**9), chosen=chosen))
    assert tower
    tower.clear()
    answers(loaded, FeatureStore(tmp_path, 10**9), chosen=chosen)
    assert not tower, "the file was not repaired"


def test_the_least_recently_used_go_first_and_the_bound_holds(tmp_path):
    size = 1000
    store = FeatureStore(tmp_path, 12 * size)
    tensors = [torch.full((size // 8,), number, dtype=torch.float64) for number in range(30)]
    for number, tensor in enumerate(tensors[:9]):
        store.put(f"{number:02}", tensor)
        os.utime(next(tmp_path.rglob(f"{number:02}.features")), (number, number))
    assert torch.equal(store.get("00"), tensors[0])  # now the one used last
    for number in range(9, 14):
        store.put(f"{number:02}", tensors[number])
    assert store.get("01") is None
    assert torch.equal(store.get("00"), tensors[0])
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.features")) <= 12 * size


def test_several_may_write_and_read_at_once(tmp_path):
    stores = [FeatureStore(tmp_path, 20_000) for _ in range(4)]

    def work(number):
        for step in range(40):
            name = f"{step % 7:02}"
            stores[number].put(name, torch.full((200,), float(step % 7)))
            found = stores[(number + 1) % 4].get(name)
            assert found is None or bool((found == step % 7).all())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".features"]


@pytest.mark.parametrize(("cache", "device", "kept"), [("auto", "cpu", 1), ("auto", "cuda", 0), (True, "cuda", 1)])
def test_states_are_kept_where_reading_is_faster_unless_told(cache, device, kept):
    from corematching.evaluation.evaluator import feature_store

    store = feature_store({"cache": cache, "most_gb": 0.5}, torch.device(device))
    assert bool(store) == bool(kept)
    assert not store or store.most_bytes == 5 * 10**8


def test_a_folder_that_cannot_be_written_costs_nothing(loaded, tmp_path):
    (tmp_path / "file").write_text("")
    assert answers(loaded, FeatureStore(tmp_path / "file" / "cache", 10**9), chosen=[cm.build_method("dense")])
