"""The command line: wrong input is one clear line and status 2, help and complaints come at once."""

import os
import subprocess
import sys

import pytest
from small_llava import save_small_llava

from corematching import cli
from corematching.evaluation import machine

METHODS = "corematching, corematching_release"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_small_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, checkpoint, tmp_path_factory):
    """Run the program in an empty folder on a small model; returns (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CM_CACHE", str(tmp_path_factory.getbasetemp() / "cm-cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small = [f"model.path={checkpoint}", "model.visual_tokens=64", "data.n=6", "keep=[16]", "tracking=none"]

    def call(*words, settings=small):
        given = {word.split("=")[0] for word in words}
        given |= {"data.n"} if "data" in given else set()  # a setting of the mini suite only
        words = [*words, *(word for word in settings if word.split("=")[0] not in given)]
        status = cli.main(words)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


WRONG = {
    "experiment": (["+experiment=gqa_swep"], ["experiment 'gqa_swep'", "did you mean 'gqa_sweep'", "quickstart"]),
    "model": (["model=llava"], ["model 'llava'", "llava_1_5_7b", "tiny"]),
    "data": (["data=huggingface"], ["data 'huggingface'", "hub, mini"]),
    "tracking": (["tracking=mlflow"], ["tracking 'mlflow'", "wandb_offline"]),
    "executor": (["executor=slurm"], ["executor 'slurm'", "local"]),
    "judge": (["judge=gpt"], ["judge 'gpt'", "openai"]),
    "method": (["method=fastvv"], ["method 'fastvv'", METHODS]),
    "method in a list": (["methods=[dense,fastvv]"], ["method 'fastvv'", METHODS]),
    "no methods": (["methods=[]"], ["methods is empty", METHODS]),
    "benchmark": (["benchmark=gqa2"], ["benchmark 'gqa2'", "vqav2, gqa"]),
    "benchmarks": (["benchmarks=[gqa,pop]"], ["benchmark 'pop'", "did you mean 'pope'"]),
    "no benchmarks": (["benchmarks=[]"], ["benchmarks is empty"]),
    "setting": (["limits=5"], ["setting 'limits'", "did you mean 'limit'"]),
    "setting of a part": (["tracking.proj=x"], ["tracking none", "'proj'", "name, mode"]),
    "parameter": (["method=fastv", "method.layr=3"], ["parameter of method fastv 'layr'", "layer, keep"]),
    "parameter in a list": (["methods=[{name:fastv,layr:3}]"], ["parameter of fastv 'layr'", "layer, keep"]),
    "parameter without method": (["method.keep=3"], ["method.keep", "add method=NAME", METHODS]),
    "parameter value": (["method=fastv", "method.layer=6"], ["layer=6", "1 to 5"]),
    "keep 0": (["keep=0"], ["keep=0", "1 to 64", "(0, 1]"]),
    "keep 0 of the method": (["method=fastv", "method.keep=0"], ["keep=0", "count >= 1", "(0, 1]"]),
    "keep negative": (["keep=[-3]"], ["keep=-3", "1 to 64"]),
    "keep too many": (["keep=[65]"], ["keep=65", "1 to 64"]),
    "keep 1.5": (["keep=[1.5]"], ["keep=1.5", "(0, 1]"]),
    "keep word": (["keep=[many]"], ["keep=many", "1 to 64"]),
    "limit": (["limit=0"], ["limit=0", "at least 1"]),
    "batch size": (["batch_size=none"], ["batch_size=none", "at least 1"]),
    "seed": (["seed=-1"], ["seed=-1", "at least 0"]),
    "prompt": (["prompt=vicuna"], ["prompt 'vicuna'", "llava15, lmms_eval"]),
    "image": (["image=crop"], ["image 'crop'", "pad, processor"]),
    "dtype": (["model.dtype=int8"], ["dtype 'int8'", "float16"]),
    "weights": (["model.weights=none"], ["weights 'none'", "pretrained, random"]),
    "model folder": (["model.path=/no/such/model"], ["/no/such/model", "config.json"]),
    "hub model offline": (["model=llava_1_5_7b", "model.path=a/b"], ["'a/b'", "download.py --models a/b"]),
    "hub data offline": (["data=hub", "benchmark=gqa"], ["GQA", "download.py"]),
    "results folder": (["results_dir=/dev/null"], ["/dev/null", "results_dir=PATH"]),
    "judge without key": (["judge=openai", "benchmark=mmvet"], ["OPENAI_API_KEY"]),
    "flag": (["--experiment", "gqa"], ["--experiment", "--help"]),
    "no value": (["limit"], ["'limit'", "name=value"]),
    "syntax": (["keep=[1"], ["'keep=[1'", "[a,b]"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_with_the_value_and_the_valid_ones(run, case, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    words, fragments = WRONG[case]
    status, _, err = run(*words)
    lines = err.strip().splitlines()
    assert status == 2
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for fragment in fragments:
        assert fragment in lines[0]


def test_wrong_input_leaves_the_folder_as_it_was(run, tmp_path):
    run("keep=0")
    run("+experiment=nothing")
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(run):
    status, _, err = run("methods=[nothing]", "debug=true")
    assert status == 2
    assert "Traceback" in err
    assert err.strip().splitlines()[-1].startswith("error: unknown method")


def test_help_says_what_there_is_to_choose(run):
    status, out, err = run("--help", settings=[])
    assert (status, err) == (0, "")
    for line in (METHODS, "experiment: ablation", "model: internvl3_8b, llava_1_5_13b", "Exit status: 0"):
        assert line in out


def test_cfg_prints_the_composed_configuration_and_runs_nothing(run, tmp_path):
    status, out, _ = run("+experiment=gqa_sweep", "--cfg", "job", settings=["model=tiny"])
    assert status == 0
    assert "experiment: gqa_sweep" in out
    assert "visual_tokens: 576" in out
    assert list(tmp_path.iterdir()) == []


def test_help_and_complaints_do_not_wait_for_torch(tmp_path):
    script = (
        "import sys\n"
        "from corematching.cli import main\n"
        "codes = [main(['--help']), main(['+experiment=nothing']), main(['methods=[nothing]']), main(['keep=0'])]\n"
        "heavy = {'torch', 'transformers', 'lmms_eval', 'pandas', 'datasets'} & set(sys.modules)\n"
        "assert codes == [0, 2, 2, 2], codes\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr


def test_experiment_may_be_written_with_or_without_plus(run):
    outputs = [
        run(word, "--cfg", "job", settings=["model=tiny"])[1] for word in ("+experiment=table1", "experiment=table1")
    ]
    assert outputs[0] == outputs[1]
    assert "experiment: table1" in outputs[0]


def test_an_unexpected_error_is_not_swallowed(run, monkeypatch):
    def broken(config):
        raise RuntimeError("a bug")

    monkeypatch.setattr("corematching.evaluation.runner.run_experiment", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run()


@pytest.mark.parametrize(
    ("gpus", "cached", "reachable", "why"),
    [(0, True, True, "no GPU"), (1, False, False, "no network"), (1, True, False, None), (1, False, True, None)],
)
def test_the_real_model_needs_a_gpu_and_its_weights(monkeypatch, gpus, cached, reachable, why):
    monkeypatch.setattr(machine, "gpu_count", lambda: gpus)
    monkeypatch.setattr(machine, "cached_revision", lambda repository: "commit" if cached else None)
    monkeypatch.setattr(machine, "hub_reachable", lambda: reachable)
    machine.why_small.cache_clear()
    try:
        found = machine.why_small()
        assert found is None if why is None else why in found
    finally:
        machine.why_small.cache_clear()


def test_cached_models_are_named_by_their_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--a--b"
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    (repository / "snapshots" / "c0ffee" / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    assert machine.cached_revision("a/b") == "c0ffee"
    assert machine.cached_revision("a/b", "c0ffee") == "c0ffee"
    assert machine.cached_revision("a/b", "other") is None
    assert machine.cached_revision("a/c") is None
