"""Checkpoints that are incomplete, damaged or of something else are refused in one line, before any cell."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_llava import save_small_llava

import corematching as cm
from corematching import cli
from corematching.errors import UserError

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return save_small_llava(tmp_path_factory.mktemp("intact"))


@pytest.fixture
def checkpoint(intact, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(intact, tmp_path / "model")


def rewrite(checkpoint, change) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    change(tensors)
    save_file(tensors, checkpoint / WEIGHTS, {"format": "pt"})


def drop_seven(tensors):
    for name in [name for name in tensors if "layers.1." in name and "vision" not in name][:7]:
        del tensors[name]


def reshape(tensors):
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name] = torch.zeros(3, 3)


def split_badly(checkpoint):
    """A sharded checkpoint with one shard missing."""
    names = list(load_file(checkpoint / WEIGHTS))
    (checkpoint / WEIGHTS).rename(checkpoint / "model-00001-of-00002.safetensors")
    shards = {name: f"model-0000{1 + (place > 50)}-of-00002.safetensors" for place, name in enumerate(names)}
    (checkpoint / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def set_config(checkpoint, **values) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


FAULTS = {
    "seven tensors missing": (lambda at: rewrite(at, drop_seven), "7 weights missing"),
    "no projector": (
        lambda at: rewrite(at, lambda w: [w.pop(name) for name in list(w) if "projector" in name]),
        "weights missing .*projector",
    ),
    "left over": (lambda at: rewrite(at, lambda w: w.update({"adapter.weight": torch.zeros(2)})), "1 unexpected"),
    "another shape": (lambda at: rewrite(at, reshape), "1 weights of another shape"),
    "cut": (lambda at: (at / WEIGHTS).write_bytes((at / WEIGHTS).read_bytes()[:5000]), "cannot be loaded"),
    "empty": (lambda at: (at / WEIGHTS).write_bytes(b""), "cannot be loaded"),
    "gone": (lambda at: (at / WEIGHTS).unlink(), "cannot be loaded"),
    "a shard gone": (split_badly, "cannot be loaded"),
    "a folder": (lambda at: ((at / WEIGHTS).unlink(), (at / WEIGHTS).mkdir()), "cannot be loaded"),
    "text only": (lambda at: (at / "config.json").write_text('{"model_type": "llama"}'), "'llama' is not supported"),
    "unknown type": (lambda at: set_config(at, model_type="nonesuch"), "not available"),
    "no config": (lambda at: (at / "config.json").unlink(), "not available"),
    "broken config": (lambda at: (at / "config.json").write_text("{"), "not available"),
    "unknown dtype": (lambda at: set_config(at, dtype="float99"), "(not available|cannot be loaded)"),
    "broken tokenizer": (lambda at: (at / "tokenizer.json").write_text("{}"), "processor of model"),
    "no tokenizer": (lambda at: [(at / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "processor"),
    "broken processor": (lambda at: (at / "processor_config.json").write_text("["), "processor of model"),
    "no image processor": (lambda at: (at / "processor_config.json").unlink(), "processor of model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_checkpoint_is_refused_in_one_line(checkpoint, fault):
    damage, told = FAULTS[fault]
    damage(checkpoint)
    with pytest.raises(UserError, match=told) as error:
        cm.load_model(str(checkpoint))
    assert "\n" not in str(error.value)


def test_buffers_and_layers_left_aside_are_no_fault(checkpoint):
    buffer = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(checkpoint, lambda tensors: tensors.update({buffer: torch.zeros(2)}))
    model, processor = cm.load_model(str(checkpoint), num_layers=2)
    assert len(model.model.language_model.layers) == 2
    assert processor is not None


def test_tied_weights_need_not_be_stored(checkpoint):
    set_config(checkpoint, tie_word_embeddings=True)
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    set_config(checkpoint, text_config=text | {"tie_word_embeddings": True})
    rewrite(checkpoint, lambda tensors: [tensors.pop(name) for name in list(tensors) if "lm_head" in name])
    model, _ = cm.load_model(str(checkpoint))
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_weights_alone_come_without_a_processor(checkpoint):
    for path in checkpoint.iterdir():
        if path.name not in ("config.json", WEIGHTS):
            path.unlink()
    assert cm.load_model(str(checkpoint))[1] is None


def test_a_run_ends_before_its_first_cell(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CM_CACHE", str(tmp_path / "cache"))
    rewrite(checkpoint, drop_seven)
    words = ["methods=[dense]", "benchmarks=[gqa]", "limit=2", "data.n=4", "tracking=none", "report=false"]
    words += [f"model.path={checkpoint}", "model.visual_tokens=64", f"results_dir={tmp_path / 'results'}"]
    assert cli.main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "7 weights missing" in line
    assert not list((tmp_path / "results").rglob("cell.json"))
