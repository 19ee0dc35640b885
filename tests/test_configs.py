"""Every configuration composes, plans into distinct cells, and names methods that fit the models it is meant for."""

import dataclasses

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from corematching import build_method, cli, groups
from corematching.benchmarks.data import DataSource
from corematching.benchmarks.spec import BENCHMARKS
from corematching.errors import UserError
from corematching.evaluation import experiment, machine, provenance
from corematching.evaluation.evaluator import build
from corematching.evaluation.experiment import method_rows, plan
from corematching.methods.base import Geometry

GEOMETRIES = {
    "tiny": Geometry(depth=12, ffn_width=512, heads=6, image_tokens=576, vision_depth=6),
    "llava_1_5_7b": Geometry(depth=32, ffn_width=11008, heads=32, image_tokens=576, vision_depth=24),
}


def has_own_runner(name):
    """Experiments with a runner of their own, or of the experiment they build on, plan in their own way."""
    file, others = groups.load("experiment", name), groups.choices("experiment")
    return "runner" in file or any(has_own_runner(base) for base in file.get("defaults", []) if base in others)


EXPERIMENTS = [name for name in groups.choices("experiment") if not has_own_runner(name)]


def composed(*words):
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", [cli._normalise(word) for word in words], return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        choices = config.hydra.runtime.choices
        del config.hydra
        return cli.settle(config, choices, words)


@pytest.fixture
def no_files(monkeypatch):
    """Plan without model weights and without generating data."""
    monkeypatch.setattr(provenance, "model_revision", lambda model: "revision")
    monkeypatch.setattr(DataSource, "version", lambda self, benchmark: "version")


@pytest.mark.parametrize("name", groups.choices("experiment"))
def test_every_experiment_composes_and_carries_its_own_name(name):
    assert composed(f"+experiment={name}").experiment == name


@pytest.mark.parametrize("group", ["model", "data", "judge", "tracking", "executor", "method"])
def test_every_choice_of_every_part_composes(group):
    for name in groups.choices(group):
        config = composed(f"{group}={name}")
        assert OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("model", GEOMETRIES)
def test_every_experiment_plans_methods_that_fit_the_model(name, model, no_files):
    planned = plan(composed(f"+experiment={name}", f"model={model}"))
    assert planned.cells
    assert len({cell.id for cell in planned.cells}) == len(planned.cells)
    lines = [(cell.label["method"], cell.label["keep"], cell.label["benchmark"]) for cell in planned.cells]
    assert len(set(lines)) == len(lines), "two cells would share a line of the table"
    for method in {build(cell) for cell in planned.cells}:
        method.stages(GEOMETRIES[model])


def test_method_files_name_exactly_the_parameters_of_their_class():
    for name in groups.choices("method"):
        method = build_method(name)
        in_file = {key for key in groups.load("method", name) if not key.startswith("_") and key != "name"}
        assert in_file == {field.name for field in dataclasses.fields(method)}, name


def test_model_files_state_their_visual_tokens():
    for name in groups.choices("model"):
        model = groups.load("model", name)
        vision = model.get("architecture", {}).get("vision_config")
        if vision:
            assert (vision["image_size"] // vision["patch_size"]) ** 2 == model["visual_tokens"]


def test_table1_is_the_papers_table(no_files):
    planned = plan(composed("+experiment=table1", "data=mini", "model=tiny"))
    assert tuple(benchmark.name for benchmark in planned.benchmarks) == BENCHMARKS
    keeps = {(row.label, row.keep) for row in planned.rows}
    assert keeps == {("dense", None)} | {(m, k) for m in ("random", "fastv", "corematching") for k in (192, 128, 64)}
    assert len(planned.cells) == 10 * (1 + 3 * 3)


def test_one_method_on_the_command_line_joins_the_sweep_unless_it_brings_its_keep(no_files):
    swept = plan(composed("method=fastv", "method.layer=3", "keep=[64,32]", "benchmark=pope"))
    assert [(row.label, row.keep, row.parameters["layer"]) for row in swept.rows] == [
        ("fastv", 64, 3),
        ("fastv", 32, 3),
    ]
    assert {cell.label["benchmark"] for cell in swept.cells} == {"pope"}
    own = plan(composed("method=fastv", "method.keep=192", "keep=[64,32]"))
    assert [(row.label, row.keep) for row in own.rows] == [("fastv", 192)]


def test_a_sweep_forces_budgets_on_adaptive_methods(no_files):
    (row,) = plan(composed("methods=[corematching]", "keep=[64]", "benchmark=gqa")).rows
    assert (row.parameters["keep"], row.parameters["threshold"]) == (64, "keep")
    (row,) = plan(composed("methods=[{name:corematching,keep:null}]", "keep=[64]", "benchmark=gqa")).rows
    assert (row.parameters["keep"], row.parameters["threshold"]) == (None, "elbow")


def test_entries_may_map_budgets_and_compose(no_files):
    entry = {
        "name": "fastv",
        "budgets": {64: {"keep": 50}},
        "with": {"name": "core_neurons", "keep": 0.4},
    }
    settings = {"methods": [entry], "keep": [64], "model": {"visual_tokens": 576}}
    (row,) = method_rows(settings)
    assert (row.label, row.keep, row.parameters["keep"]) == ("fastv + core_neurons", 64, 50)
    assert row.parameters["with"]["name"] == "core_neurons"
    with pytest.raises(UserError, match="no budget 32"):
        method_rows({**settings, "keep": [32]})


def test_a_models_layers_reach_its_methods():
    model = {"visual_tokens": 576, "method_overrides": {"fastv": {"layer": 1}}}
    (row,) = method_rows({"methods": ["fastv"], "keep": [64], "model": model})
    assert row.parameters["layer"] == 1
    (row,) = method_rows({"methods": [{"name": "fastv", "layer": 5}], "keep": [64], "model": model})
    assert row.parameters["layer"] == 5


def test_cells_differ_by_everything_that_can_change_a_number(no_files):
    base = plan(composed("benchmark=gqa", "methods=[dense]")).cells
    changes = [
        "limit=7",
        "seed=1",
        "prompt=lmms_eval",
        "image=processor",
        "generation.max_new_tokens=5",
        "model.dtype=bfloat16",
    ]
    for change in changes:
        assert plan(composed("benchmark=gqa", "methods=[dense]", change)).cells != base, change
    for change in ("batch_size=3", "tracking=none", "results_dir=elsewhere", "debug=true"):
        assert plan(composed("benchmark=gqa", "methods=[dense]", change)).cells == base, change


def test_the_machine_decides_model_and_data_where_nobody_does(monkeypatch):
    monkeypatch.setattr(machine, "why_small", lambda: None)
    config = composed("+experiment=gqa_sweep")
    assert (config.model.name, config.data.name) == ("llava_1_5_7b", "hub")
    assert composed("+experiment=gqa_sweep", "model=tiny").model.name == "tiny"
    assert composed().model.name == "tiny", "the quickstart is small everywhere"
    monkeypatch.setattr(machine, "why_small", lambda: "no GPU found")
    config = composed("+experiment=gqa_sweep")
    assert (config.model.name, config.data.name) == ("tiny", "mini")


def test_the_mini_suite_brings_its_judge():
    assert composed("data=mini").judge.name == "local"
    assert composed("data=mini", "judge=none").judge.name == "none"
    assert composed("+experiment=table1", "data=hub").judge.name == "none"


def test_keep_is_a_count_or_a_fraction():
    for good in (1, 64, 576, 0.5, 1.0):
        experiment.check_keep("keep", good, 576)
    for bad in (0, -1, 577, 1.5, 0.0, True, "64", None):
        with pytest.raises(UserError, match=r"1 to 576.*\(0, 1\]"):
            experiment.check_keep("keep", bad, 576)
