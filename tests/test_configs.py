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
from corematching.evaluation import experiment, machine, matching, provenance
from corematching.evaluation.controls import NEURON_METHODS
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
        return cli.settle(config, choices, [cli._normalise(word) for word in words])


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
    lines = [
        (cell.label["method"], cell.label["keep"], cell.label["benchmark"], cell.config["method"].get("seed"))
        for cell in planned.cells
    ]
    assert len(set(lines)) == len(lines), "cells that differ in more than their seed would share a line of the table"
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
        if vision and "image_size" not in model:
            assert (vision["image_size"] // vision["patch_size"]) ** 2 == model["visual_tokens"]


def test_table1_is_the_papers_table(no_files):
    planned = plan(composed("+experiment=table1", "data=mini", "model=tiny"))
    assert tuple(benchmark.name for benchmark in planned.benchmarks) == BENCHMARKS
    keeps = {(row.label, row.keep) for row in planned.rows}
    methods = ("random", "uniform", "random (layer 2)", "fastv", "corematching")
    assert keeps == {("dense", None)} | {(method, keep) for method in methods for keep in (192, 128, 64)}
    assert len(planned.cells) == 10 * (1 + 3 * (3 + 3 + 3))  # two of them with three seeds


def test_one_method_on_the_command_line_joins_the_sweep_unless_it_brings_its_keep(no_files):
    swept = plan(composed("method=fastv", "method.layer=3", "keep=[64,32]", "benchmark=pope", "controls=false"))
    assert [(row.label, row.keep, row.parameters["layer"]) for row in swept.rows] == [
        ("fastv", 64, 3),
        ("fastv", 32, 3),
    ]
    assert {cell.label["benchmark"] for cell in swept.cells} == {"pope"}
    own = plan(composed("method=fastv", "method.keep=192", "keep=[64,32]", "controls=false"))
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


@pytest.mark.parametrize(
    "entry",
    [
        "{name:focusllava,router:FILE}",
        "{name:dejavu,predictor:FILE}",
        "{name:attention_predictor,predictor:FILE}",
        "{name:random,keep:64,with:{name:powerinfer,predictor:FILE}}",
    ],
)
def test_a_file_that_a_method_names_counts_by_its_content(tmp_path, entry):
    file = tmp_path / "weights.bin"

    def cells():
        return plan(composed("benchmark=gqa", f"methods=[{entry.replace('FILE', str(file))}]", "controls=false")).cells

    file.write_bytes(b"one")
    first = cells()
    assert cells() == first
    file.write_bytes(b"two")
    assert cells() != first
    file.write_bytes(b"one")
    assert cells() == first


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


# ------------------------------------------------------------------------------------------------ controls and folders
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_holds_uniform_and_random_at_the_layer_of_each_method(name, no_files):
    planned = plan(composed(f"+experiment={name}", "model=tiny", "data=mini"))
    model = groups.load("model", "tiny")
    random_layers = {row.parameters["layer"] for row in planned.rows if row.method == "random"}
    assert {"dense", "uniform"} <= {row.method for row in planned.rows}
    for row in planned.rows:
        if row.method in ("fastv", "core_tokens", "corematching"):
            layer = matching.dropping_layer(row.method, row.parameters, model)
            assert layer is None or layer in random_layers, row.label
    assert all(
        len({row.parameters["seed"] for row in planned.rows if row.label == label}) > 1
        for label in random_labels(planned)
    )


def random_labels(planned):
    return {row.label for row in planned.rows if row.method == "random"}


def test_rows_of_the_ablation_differ_from_the_first_in_what_they_say(no_files):
    rows = [
        row
        for row in plan(composed("+experiment=ablation", "model=tiny", "data=mini")).rows
        if row.method == "corematching"
    ]
    first = next(row for row in rows if row.label == "both halves")
    for row in rows:
        changed = {name: value for name, value in row.parameters.items() if value != first.parameters[name]}
        if row.label.startswith(("rho", "beta")):
            name, value = row.label.split()
            assert changed == {name: float(value)}
        elif row.label.startswith(("score", "voters")):
            assert set(changed) == {row.label.split(":")[0]}
    changes = [{name for name, value in row.parameters.items() if value != first.parameters[name]} for row in rows]
    assert sum(not changed for changed in changes) == 1
    assert {"neurons"} in changes
    assert {"tokens"} in changes


@pytest.mark.parametrize(
    ("words", "label", "layer"),
    [
        (["method=fastv", "method.layer=5"], "random (layer 5)", 5),
        (["method=visionzip"], "random", -1),
        (["method=corematching"], "random (layer 2)", 2),
        (["method=topv"], "random (layer 3)", 3),
        (["method=sparsevlm"], "random (layer 2)", 2),  # the tiny model's own layers: tokens leave at layer 1's output
    ],
)
def test_a_single_method_is_shown_beside_dense_and_random_at_its_layer(words, label, layer, no_files):
    rows = plan(composed(*words, "keep=[64]", "benchmark=pope")).rows
    assert rows[0].label == "dense"
    assert [(row.label, row.keep, row.parameters["layer"]) for row in rows if row.method == "random"] == [
        (label, 64, layer)
    ]
    alone = plan(composed(*words, "keep=[64]", "benchmark=pope", "controls=false")).rows
    assert {row.method for row in alone} == {words[0].removeprefix("method=")}


def test_controls_follow_what_the_method_does(no_files):
    def methods(*words):
        return [(row.method, row.keep) for row in plan(composed(*words, "keep=[64,32]", "benchmark=pope")).rows]

    assert methods("method=h2o")[0] == ("dense", None)
    assert "random" not in dict(methods("method=h2o")), "no random choice of tokens is like one of KV rows"
    assert methods("method=core_neurons", "method.keep=0.3") == [
        ("dense", None),
        ("random_neurons", 0.3),
        ("core_neurons", 0.3),
    ]
    neurons = {name for name in groups.choices("method") if build_method(name).acts_on == {"neurons"}}
    assert set(NEURON_METHODS) == neurons - {"random_neurons"}
    assert methods("method=dense") == [("dense", None)]
    assert methods("method=fastv", "method.keep=16") == [("dense", None), ("random", 16), ("fastv", 16)]
    assert methods("methods=[fastv]") == [("fastv", 64), ("fastv", 32)], "a list is taken as it is"


def folder(tmp_path, *words):
    return plan(composed(*words, f"results_dir={tmp_path}")).folder


def occupy(folder, *words):
    """Stand in for a run of a command in a folder."""
    manifest = plan(composed(*words, f"results_dir={folder.parent}")).manifest
    (folder / "cells" / "x").mkdir(parents=True)
    manifest.write(folder)


def test_a_command_that_is_no_experiment_gets_a_folder_named_from_its_words(tmp_path, no_files):
    asked = ["method=fastv", "keep=[64,32]", "benchmark=pope"]
    assert folder(tmp_path, *asked).name == "fastv-keep-64-32-pope"
    assert folder(tmp_path, *asked[::-1], "batch_size=2", "report=false").name == "fastv-keep-64-32-pope"
    assert folder(tmp_path, *asked, "limit=5").name != folder(tmp_path, *asked).name
    assert folder(tmp_path, *asked, "name=mine").name == "mine"
    assert folder(tmp_path).name == "quickstart"
    long = [f"methods=[{','.join(groups.choices('method'))}]", "benchmark=pope"]
    assert len(folder(tmp_path, *long).name) < 80
    assert folder(tmp_path, *long).name != folder(tmp_path, *long, "keep=[64]").name


def test_an_experiment_with_other_settings_never_replaces_a_table(tmp_path, no_files):
    full, short = ["+experiment=table1", "model=tiny"], ["+experiment=table1", "model=tiny", "limit=5"]
    assert folder(tmp_path, *short).name == "table1", "nothing else stands there"
    occupy(tmp_path / "table1", *full)
    assert folder(tmp_path, *full).name == "table1"
    assert folder(tmp_path, *short).name == "table1-limit-5"
    occupy(tmp_path / "table1-limit-5", *short)
    assert folder(tmp_path, *short, "tracking=none").name == "table1-limit-5", "the same ask resumes"
    assert folder(tmp_path, *short, "seed=1").name == "table1-limit-5-seed-1"


def test_what_came_first_stays_where_it_is(tmp_path, no_files):
    short = ["+experiment=table1", "model=tiny", "limit=5"]
    occupy(tmp_path / "table1", *short)
    assert folder(tmp_path, *short).name == "table1"
    assert folder(tmp_path, "+experiment=table1", "model=tiny").name == "table1-full"


def test_a_name_that_stands_for_something_else_is_refused(tmp_path, no_files):
    occupy(tmp_path / "mine", "method=fastv", "name=mine")
    assert folder(tmp_path, "method=fastv", "name=mine").name == "mine"
    with pytest.raises(UserError, match="name=mine stands for another command"):
        folder(tmp_path, "method=dart", "name=mine")


def test_a_store_from_before_belongs_to_its_experiment(tmp_path, no_files):
    (tmp_path / "quickstart" / "cells" / "x").mkdir(parents=True)
    assert folder(tmp_path).name == "quickstart"
    assert folder(tmp_path, "limit=5").name == "quickstart-limit-5"


def test_force_is_true_false_or_a_time():
    assert experiment.forced_since(False) == 0
    assert experiment.forced_since(True) > 1.7e9
    assert experiment.forced_since(1.5e9) == 1.5e9
    for bad in ("yes", "-1", "null", ".inf"):
        with pytest.raises(UserError, match="true, false or a time"):
            plan(composed(f"force={bad}"))
