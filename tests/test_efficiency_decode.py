"""Fast decoding: static shapes, neurons read in place or gathered lazily, and kernels answer like the plain path."""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys

import pytest
import torch
from conftest import IMAGE_TOKENS, left_pad, make_prompt
from torch.utils._pytree import tree_leaves

import corematching as cm
from corematching import kernels
from corematching.engine import compiled, ffn
from corematching.engine.compiled import decoder_of, generate, prefill
from corematching.registry import group_names

# Parameters that fit the six-layer fixture; methods not named run with their defaults.
PARAMETERS = {
    "random": {"keep": 10},
    "uniform": {"keep": 10},
    "pooling": {"keep": 0.25},
    "fastv": {"keep": 10},
    "corematching_release": {"first_layer": 2, "last_layer": 4},
    "pyramiddrop": {"layers": (1, 2, 4)},
    "sparsevlm": {"layers": (1, 2, 4), "schedule": (40, 20, 10)},
    "topv": {"keep": 10},
    "dart": {"keep": 20},
    "tome": {"r": 8},
    "tome_pre_llm": {"keep": 10},
    "visionzip": {"dominant": 8, "contextual": 2},
    "fastervlm": {"keep": 10},
    "vtc_cls": {"layer": 1, "keep": 10},
    "divprune": {"keep": 10},
    "as_vit": {"layers": (1, 2), "thresholds": (0.008, 0.016)},
    "streaming_llm": {"keep": 0.3},
    "snapkv": {"keep": 40},
}
# These need files beside the model: a CLIP text tower, trained predictors (tested apart), a second model.
NEEDS_FILES = {"cdpruner", "focusllava", "dejavu", "powerinfer", "sgl"}
CHOOSE_ROWS = {"refreshkv", "adakv", "actqkv", "attention_predictor", "pod"}
METHODS = [name for name in group_names("method") if name not in NEEDS_FILES | CHOOSE_ROWS]


@pytest.mark.parametrize("name", sorted(CHOOSE_ROWS))
def test_static_decoding_refuses_what_chooses_rows_for_each_step(name, random_llava, prompts):
    with (
        cm.build_method(name)(random_llava),
        pytest.raises(cm.UserError, match=f"engine='compiled'.*'{name}'.*use eager"),
    ):
        generate(random_llava, prompts[0], 3, engine="compiled")


@pytest.mark.parametrize("name", METHODS)
def test_static_decoding_answers_like_eager(name, random_llava, prompts):
    with cm.build_method(name, **PARAMETERS.get(name, {}))(random_llava) as trace:
        for inputs in (prompts[0], left_pad([prompts[0], prompts[1]])):
            eager = generate(random_llava, inputs, 6)
            stock = random_llava.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
            static = generate(random_llava, inputs, 6, engine="compiled")
            assert torch.equal(eager, stock[:, inputs["input_ids"].shape[1] :])
            assert torch.equal(static, eager)
            samples = trace.drain()
            by_run = [samples[start :: len(samples) // 3] for start in range(len(samples) // 3)]
            for runs in by_run:
                assert {run.decode_steps for run in runs} == {5}
                assert {run.head_positions for run in runs} == {6}


@pytest.mark.parametrize("name", ["dejavu", "powerinfer"])
def test_neurons_chosen_for_every_token_are_not_captured(name, random_llava, predictor_file, prompts):
    """What Python chooses and books in each step would be lost in a replay."""
    with cm.build_method(name, keep=0.3, predictor=predictor_file)(random_llava) as trace, torch.inference_mode():
        eager = generate(random_llava, prompts[0], 6)
        random_llava._corematching.capture = pretend_to_capture
        for _ in range(2):
            assert torch.equal(generate(random_llava, prompts[0], 6, "compiled"), eager)
        first, *others = trace.drain()
    for sample in others:
        assert sample.overhead_flops == first.overhead_flops > 0
        assert all(map(torch.equal, sample.neurons, first.neurons))
        assert sample.predictor_weights == first.predictor_weights > 0


def test_captured_steps_decode_with_each_prompts_own_neurons(random_llava, prompts, monkeypatch):
    def capture(step):
        if not isinstance(step.__self__, compiled.StaticDecoder):
            return pretend_to_capture(step)  # prefill
        decoder, first = step.__self__, step.__self__.state

        def replay():
            now, decoder.state = decoder.state, first  # a graph knows the tensors of the prompt it was captured with
            step()
            decoder.state = now

        return replay, None

    monkeypatch.setattr(kernels, "CACHED_BYTES", 0)  # rows read in place, as the captured list of neurons names them
    other = {**prompts[0], "pixel_values": -prompts[0]["pixel_values"]}
    with cm.build_method("core_neurons", keep=0.3)(random_llava) as trace, torch.inference_mode():
        session = random_llava._corematching
        plain = [generate(random_llava, inputs, 6) for inputs in (prompts[0], other)]
        expected = trace.drain()
        session.capture = capture
        answers = [generate(random_llava, inputs, 6, "compiled") for inputs in (prompts[0], other)]
        (decoder,) = session.decoders.values()
        assert decoder.captured
        assert all(map(torch.equal, answers, plain))
        for sample, own in zip(trace.samples, expected, strict=True):
            assert all(map(torch.equal, sample.neurons, own.neurons))


@pytest.mark.parametrize("length", [2, 3])
def test_capturing_finds_room_for_its_warm_ups(length, random_llava, prompts):
    """Prompts that fill their KV buffers to the last row, and answers shorter than the warm-ups."""

    def capture(work):
        for _ in range(compiled.WARM_UPS):
            work()
        return work, None

    text = -(prompts[0]["input_ids"].shape[1] + length - 1) % compiled.BLOCK
    ids = torch.cat([prompts[0]["input_ids"], torch.arange(3, 3 + text)[None]], 1)
    inputs = {**prompts[0], "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with cm.build_method("dense")(random_llava), torch.inference_mode():
        eager = generate(random_llava, inputs, length)
        cache, token = prefill(random_llava, inputs)
        random_llava._corematching.capture = capture
        decoder = decoder_of(random_llava, inputs, cache, token, length - 1, "compiled")
        steps = [decoder.step().clone() for _ in range(length - 1)]
        assert torch.equal(torch.cat([token, *steps], 1), eager)


def test_static_buffers_are_sized_after_pruning(random_llava, prompts):
    with cm.build_method("fastv", keep=10)(random_llava), torch.inference_mode():
        cache, token = prefill(random_llava, prompts[1])
        decoder = decoder_of(random_llava, prompts[1], cache, token, 4, "compiled")
        sizes = [keys.shape[2] for keys in decoder.kv.keys]
    length = prompts[1]["input_ids"].shape[1]
    assert sizes[0] >= length + 4
    assert sizes[2] >= length - IMAGE_TOKENS + 10 + 4
    assert sizes[2] < length


def test_prompts_of_one_shape_share_a_static_decoder(random_llava, prompts):
    with cm.build_method("fastv", keep=10)(random_llava), torch.inference_mode():
        made = []
        for inputs in (prompts[0], {**prompts[0], "pixel_values": -prompts[0]["pixel_values"]}, prompts[2]):
            cache, token = prefill(random_llava, inputs)
            made.append(decoder_of(random_llava, inputs, cache, token, 4, "compiled"))
    assert made[0] is made[1]
    assert made[0] is not made[2]


def test_generation_stops_at_the_end_token(random_llava, prompts):
    free = generate(random_llava, prompts[0], 6)[0].tolist()
    stopped = generate(random_llava, prompts[0], 6, eos_token_id=free[2])[0].tolist()
    assert stopped == free[: free.index(free[2]) + 1]


def test_static_decoder_refuses_more_steps_than_it_has_room_for(random_llava, prompts):
    with cm.build_method("dense")(random_llava), torch.inference_mode():
        cache, token = prefill(random_llava, prompts[0])
        decoder = decoder_of(random_llava, prompts[0], cache, token, 2, "compiled")
        decoder.step(), decoder.step()
        with pytest.raises(RuntimeError, match="2 steps"):
            decoder.step()


def test_wrong_engines_are_refused(random_llava, prompts):
    with pytest.raises(cm.UserError, match=r"engine='fast'.*eager, compiled"):
        generate(random_llava, prompts[0], 2, engine="fast")
    with pytest.raises(cm.UserError, match="inside a method's context"):
        generate(random_llava, prompts[0], 2, engine="compiled")


@pytest.fixture
def mlp(random_llava):
    return random_llava.model.language_model.layers[0].mlp


def reference(mlp, index, x):
    """The definition: unchosen activations are zero."""
    chosen = torch.zeros(mlp.gate_proj.weight.shape[0]).index_fill(0, index, 1.0)
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) * chosen)


@torch.no_grad()
def test_lazily_gathered_neurons_give_the_same_numbers_at_every_step(mlp):
    index, x = torch.tensor([3, 4, 20, 47]), torch.randn(1, 1, 32)
    build = ffn.FFNBuilder(gather_after=2)
    lazy = build(mlp, index[None])
    for step in range(4):
        assert torch.allclose(lazy(x), reference(mlp, index, x), atol=1e-6)
        assert lazy.masked_steps == min(step + 1, 2)
    assert lazy.rows.owner is lazy.key


@torch.no_grad()
def test_prompts_that_take_turns_do_not_read_each_others_neurons(mlp):
    build, x = ffn.FFNBuilder(gather_after=0), torch.randn(1, 1, 32)
    first, second = torch.tensor([1, 2, 3]), torch.tensor([10, 20, 30])
    ours, theirs = build(mlp, first[None]), build(mlp, second[None])
    for _ in range(2):
        assert torch.allclose(ours(x), reference(mlp, first, x), atol=1e-6)
        assert torch.allclose(theirs(x), reference(mlp, second, x), atol=1e-6)
    assert ours.rows is theirs.rows, "room is kept from prompt to prompt"


@pytest.fixture
def large(mlp, monkeypatch):
    """An FFN that counts as too big for the cache, stored neuron by neuron."""
    monkeypatch.setattr(kernels, "CACHED_BYTES", 0)
    restore = ffn.neuron_major(mlp)
    yield mlp
    restore()


@pytest.mark.parametrize("count", [1, 5, 47, 48])
@torch.no_grad()
def test_a_large_ffn_reads_chosen_neurons_in_place(large, count):
    index, x = torch.randperm(48)[:count].sort().values, torch.randn(1, 1, 32)
    chosen = ffn.FFNBuilder()(large, index[None])
    assert torch.allclose(chosen(x), reference(large, index, x), atol=1e-6)
    assert torch.equal(chosen(x), chosen(x))
    assert chosen.masked_steps == 0
    assert chosen.rows is None, "nothing was copied"


@torch.no_grad()
def test_rows_of_other_neurons_are_not_even_looked_at(large):
    index, x = torch.tensor([3, 4, 20, 47]), torch.randn(1, 1, 32)
    poisoned = copy.deepcopy(large)
    neuron_rows = [poisoned.gate_proj.weight, poisoned.up_proj.weight, poisoned.down_proj.weight.t()]
    for rows in neuron_rows:
        rows[torch.ones(48, dtype=torch.bool).index_fill(0, index, False)] = torch.nan
    assert torch.equal(ffn.SlicedFFN(poisoned, index)(x), ffn.SlicedFFN(large, index)(x))


@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize("name", ["core_neurons", "corematching", "coreinfer"])
def test_neurons_read_in_place_answer_like_gathered_ones(name, engine, random_llava, prompts, monkeypatch):
    answers, calls, read = [], [], kernels.cpu_ffn.chosen_ffn
    monkeypatch.setattr(kernels.cpu_ffn, "chosen_ffn", lambda *words: calls.append(words) or read(*words))
    for cached in (kernels.CACHED_BYTES, 0):
        assert not calls
        monkeypatch.setattr(kernels, "CACHED_BYTES", cached)
        with cm.build_method(name, **PARAMETERS.get(name, {}))(random_llava) as trace:
            answers.append(generate(random_llava, prompts[0], 6, engine=engine))
            (sample,) = trace.drain()
            assert sample.ffn_mode == "sliced"
    assert torch.equal(*answers)
    assert len(calls) >= 5, "every step of every layer that chose"


@torch.no_grad()
def test_several_tokens_at_once_gather_instead(large):
    index, x = torch.tensor([3, 4, 20, 47]), torch.randn(2, 1, 32)
    for build in (ffn.FFNBuilder(), ffn.FFNBuilder().once):
        chosen = build(large, index.expand(2, -1))
        assert torch.allclose(chosen(x), reference(large, index, x), atol=1e-6)
        assert chosen.rows.owner is chosen.key


def test_half_the_threads_asked_for_are_noticed():
    """Torch's sampled product would leave out what the missing threads were to compute."""
    source = (
        "import torch; from corematching.kernels.cpu_ffn import trusted; torch.set_num_threads(4); print(trusted(4))"
    )
    said = []
    for limit in ({}, {"OMP_THREAD_LIMIT": "2"}, {"OMP_DYNAMIC": "true"}):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")} | limit
        done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
        said.append(done.stdout.strip())
    assert said == ["True", "False", "False"]


@torch.no_grad()
def test_gathering_waits_until_it_repays(large, monkeypatch):
    mlp = large
    monkeypatch.setattr(kernels.cpu_ffn, "DTYPES", frozenset())  # as if it were half precision
    build, x = ffn.FFNBuilder(), torch.randn(1, 1, 32)
    most = build(mlp, torch.arange(36)[None])  # 1.7 x 0.75 / 0.25 = 5.1 steps repay
    for _ in range(5):
        most(x)
        assert most.rows.owner is None
    most(x)
    assert most.rows.owner is most.key
    soon_over = build(mlp, torch.arange(29)[None])  # three steps repay
    soon_over.most_steps = 5
    for _ in range(5):
        soon_over(x)
        assert soon_over.rows.owner is not soon_over.key, "after three steps, two are left"
    few = build(mlp, torch.arange(10)[None])
    few(x)
    assert few.rows.owner is few.key, "0.45 steps: the first one repays it"


@torch.no_grad()
def test_choosing_for_one_step_gathers_only_where_that_is_cheaper(large, monkeypatch):
    build = ffn.FFNBuilder()
    assert build.once(large, torch.arange(40)[None]).mode == "sliced", "in place nothing is gathered"
    monkeypatch.setattr(kernels.cpu_ffn, "DTYPES", frozenset())
    assert build.once(large, torch.arange(40)[None]).mode == "masked"
    assert build.once(large, torch.arange(5)[None]).mode == "sliced"


@torch.no_grad()
def test_neuron_major_storage_changes_no_value_and_is_undone(mlp, monkeypatch):
    monkeypatch.setattr(kernels, "CACHED_BYTES", 0)
    before, x = mlp.down_proj.weight.clone(), torch.randn(3, 32)
    dense = mlp(x)
    restore = ffn.neuron_major(mlp)
    assert mlp.down_proj.weight.t().is_contiguous()
    assert torch.equal(mlp.down_proj.weight, before)
    assert torch.allclose(mlp(x), dense, atol=1e-6)
    restore()
    assert mlp.down_proj.weight.is_contiguous()
    assert torch.equal(mlp(x), dense)


def pretend_to_capture(work):
    """What a CUDA graph does, on a CPU: the work again on the tensors it was captured with, results in fixed places."""
    places = work()

    def replay():
        for place, result in zip(tree_leaves(places), tree_leaves(work()), strict=True):
            if place is not None:
                place.copy_(result)

    return replay, places


@pytest.mark.parametrize("name", METHODS)
def test_captured_prefill_answers_like_eager(name, random_llava, prompts):
    other = {**prompts[0], "pixel_values": -prompts[0]["pixel_values"]}
    with cm.build_method(name, **PARAMETERS.get(name, {}))(random_llava) as trace, torch.inference_mode():
        plain = [generate(random_llava, inputs, 6) for inputs in (prompts[0], other, prompts[1])]
        expected = trace.drain()
        session = random_llava._corematching
        session.capture = pretend_to_capture
        for inputs, answer in zip((prompts[0], other, prompts[1]), plain, strict=True):
            prefill(random_llava, inputs, "compiled")  # capturing is for lengths met before
            cache, token = prefill(random_llava, inputs, "compiled")
            session.capture = None  # the decode step is tested above
            decoder = decoder_of(random_llava, inputs, cache, token, 5, "compiled")
            session.capture = pretend_to_capture
            assert torch.equal(torch.cat([token, *(decoder.step().clone() for _ in range(5))], 1), answer)
        for sample, own in zip(trace.drain()[1::2], expected, strict=True):
            assert sample.kv_lengths == own.kv_lengths
            assert sample.overhead_flops == own.overhead_flops
            assert all(map(torch.equal, sample.visual_tokens, own.visual_tokens))
        captured = session.captured
    assert (captured is None) == any("kv" in kind for kind in cm.build_method(name).acts_on)


def test_a_captured_prompt_survives_the_next_one(random_llava, prompts):
    """Two prompts of one length prefilled before either decodes: the second replays over the first one's tensors."""
    inputs = [prompts[0], {**prompts[0], "pixel_values": -prompts[0]["pixel_values"]}]
    with cm.build_method("corematching", threshold="keep", keep=10)(random_llava) as trace, torch.inference_mode():
        plain = [generate(random_llava, own, 6) for own in inputs]
        neurons = [sample.neurons for sample in trace.drain()]
        session = random_llava._corematching
        session.capture = pretend_to_capture
        prefill(random_llava, prompts[0], "compiled")  # capturing is for lengths met before
        trace.drain()
        filled = [prefill(random_llava, own, "compiled") for own in inputs]
        session.capture = None
        for own, (cache, token), answer in zip(inputs, filled, plain, strict=True):
            decoder = decoder_of(random_llava, own, cache, token, 5, "compiled")
            assert torch.equal(torch.cat([token, *(decoder.step().clone() for _ in range(5))], 1), answer)
        for sample, own in zip(trace.drain(), neurons, strict=True):
            assert all(map(torch.equal, sample.neurons, own))
        assert len(session.captured.runs) == 2


def test_prompt_lengths_that_take_turns_are_captured_once(random_llava):
    """pyramiddrop has four runs per prompt: all of a length's runs stay, or go, together."""
    captured, lengths = [], [5, 6, 7, 8]

    def capture(work):
        captured.append(work.__self__.length)
        return pretend_to_capture(work)

    with cm.build_method("pyramiddrop", **PARAMETERS["pyramiddrop"])(random_llava), torch.inference_mode():
        random_llava._corematching.capture = capture
        for length in 3 * lengths:
            prefill(random_llava, make_prompt(0, text=length), "compiled")
        assert len(captured) == 4 * len(lengths)
        for length in [9, 10, 11, 12, *lengths]:  # four others push them out; meeting them anew captures nothing
            prefill(random_llava, make_prompt(0, text=length), "compiled")
        assert len(captured) == 4 * len(lengths)


def test_batches_and_eager_prompts_are_not_captured(random_llava, prompts):
    with cm.build_method("fastv", keep=10)(random_llava), torch.inference_mode():
        session = random_llava._corematching
        session.capture = pretend_to_capture
        prefill(random_llava, left_pad([prompts[0], prompts[1]]), "compiled")
        prefill(random_llava, prompts[0])
        assert session.captured is None
        prefill(random_llava, prompts[0], "compiled")
        assert session.captured is not None


GATHERING = """
import torch
from corematching.kernels.gpu_ffn import chosen_ffn
torch.manual_seed(0)
for width, d, k, name, act in ((90, 192, 77, "silu", torch.nn.functional.silu), (64, 600, 64, "relu", torch.relu),
                               (70, 512, 1, "silu", torch.nn.functional.silu)):
    gate, up, down = (torch.randn(width, d) for _ in range(3))
    x, index = torch.randn(1, 1, d), torch.randperm(width)[:k]
    wanted = (act(x @ gate[index].T) * (x @ up[index].T)) @ down[index]
    assert torch.allclose(chosen_ffn(gate, up, down, index, x, name), wanted, rtol=1e-4, atol=1e-3), (width, d, k)
"""


CHOOSING = """
import torch
from corematching.kernels.MODULE import core_neurons
from corematching.methods.core import sentence_core_neurons, token_core_neurons
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for batch, n, width, rho, count in ((2, 7, 90, 0.2, 36), (1, 1, 64, 1.0, 64), (1, 30, 70, 0.013, 1),
                                          (2, 150, 40, 0.3, 20)):
        acts = (torch.randn(batch, n, width) * 10.0 ** torch.randint(-8, 4, (batch, n, 1))).to(dtype)
        acts[:, 0] = -acts[:, 0].abs()  # a token without core neurons
        acts[:, -1] = acts[:, -1].sign()  # and one whose threshold all its neurons share
        valid = torch.arange(n) >= torch.arange(batch)[:, None]
        wanted = sentence_core_neurons(token_core_neurons(acts, rho), valid, count)
        assert torch.equal(core_neurons(acts, valid, rho, count), wanted), (dtype, width, rho)
"""


SOURCES = {"gathering": GATHERING, **{kind: CHOOSING.replace("MODULE", kind) for kind in ("gpu_core", "cpu_core")}}


@pytest.mark.parametrize("name", SOURCES)
def test_kernels_compute_what_the_plain_path_computes(name):
    """Triton's interpreter runs a GPU kernel's source on the CPU; it must be chosen before Triton is imported."""
    if name != "cpu_core":
        pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", SOURCES[name]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


TILE = {"ROWS": 4, "COLUMNS": 512, "RELU": False}
KERNELS = {
    "gpu_ffn._activate": ("x:p gate:p up:p index:*i64 out:*fp32 k:i32 d:i32", TILE),
    "gpu_ffn._add_up": ("act:*fp32 down:p index:*i64 out:*fp32 k:i32 d:i32 per_slice:i32", {"CHUNK": 8, "WIDTH": 256}),
    "gpu_core._vote": (
        "activations:p valid:*u8 wanted:*i32 votes:*i32 width:i32 length:i32",
        {"ZERO_BITS": 16, "BLOCK": 16384},
    ),
    "gpu_core._elect": ("votes:*i32 out:*i64 width:i32 count:i32", {"BITS": 34, "BLOCK": 16384}),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_a_gpu(name):
    """The interpreter forgives types that the compiler does not; compiling needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    module, kernel = name.split(".")
    function = getattr(importlib.import_module(f"corematching.kernels.{module}"), kernel)
    arguments, constants = KERNELS[name]
    signature = dict(argument.split(":") for argument in arguments.replace(":p", ":*bf16").split())
    source = triton.compiler.ASTSource(function, signature | dict.fromkeys(constants, "constexpr"), constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16})
    assert compiled.asm["cubin"]
