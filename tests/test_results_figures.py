"""Figures: they show the right numbers, exist when there is something to show, and have deterministic bytes."""

import hashlib
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import IMAGE_TOKEN, IMAGE_TOKENS
from matplotlib.colors import to_rgb
from PIL import Image
from synthetic_store import cell_config, write_accuracy_cell, write_efficiency_cell, write_store

from corematching.answering.conversation import render
from corematching.evaluation.publishing import publish_run
from corematching.groups import choices
from corematching.inspection import evidence_figures, overlays
from corematching.inspection.evidence import (
    Evidence,
    Example,
    Kept,
    elbow,
    matching_evidence,
    mini_examples,
    rank_correlation,
)
from corematching.models.families import ImageTokens, Tile
from corematching.results import dashboard, efficiency_figures, figures
from corematching.results.accuracy import contexts
from corematching.results.aggregate import aggregate
from corematching.results.figures import heat, looks
from corematching.results.figures.about import About
from corematching.results.overlays import load
from corematching.results.publish import publish


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = write_store(tmp_path_factory.mktemp("results"), keeps=(192, 64), n=40)
    for method, keep, total in (("dense", None, 40.0), ("fastv", 64, 16.0)):
        times = {"prefill_ms": total / 2, "decode_ms_per_token": 0.5}
        write_efficiency_cell(folder, method, keep, model="tiny", end_to_end_ms=total, **times)
    return folder


@pytest.fixture(scope="module")
def aggregation(experiment):
    return aggregate([experiment])


def digests(paths):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_publish_writes_every_figure_twice_alike(experiment, tmp_path):
    first, second = (publish([experiment], tmp_path / name, report=False) for name in "ab")
    names = {path.stem for path in first if path.suffix in (".pdf", ".png")}
    assert names >= {"pareto_flops", "pareto_latency", "accuracy_over_tokens", "accuracy_over_keep", "heat_map"}
    assert names >= {"layers", "time_breakdown"}
    assert digests(first) == digests(second)
    assert b"CreationDate" not in (tmp_path / "a" / "figures" / "layers.pdf").read_bytes()


def test_notebooks_show_figures(aggregation):
    assert figures.heat_map(aggregation.cells)._repr_png_().startswith(b"\x89PNG")


def test_pareto_points_are_the_tables_numbers(aggregation):
    points = figures.pareto_points(aggregation.cells, aggregation.efficiency).set_index(["method", "keep"])
    table = aggregation.tables[0]
    place = [column.key for column in table.columns].index("share")
    shares = {(row.entries[0].text, row.entries[1].text): row.entries[place].text for row in table.rows}
    for (method, keep), point in points.iterrows():
        assert f"{point['share']:.1f}" == shares[method, "all" if keep is None or keep != keep else f"{keep:g}"]
    assert points.loc[("fastv", 64), "milliseconds"] == 16.0
    assert np.isnan(points.loc[("random", 64), "milliseconds"])


def test_frontier_by_hand():
    cost, quality = np.array([1.0, 2, 2, 3, 4]), np.array([5.0, 4, 6, 6, 9])
    assert figures.frontier(cost, quality).tolist() == [0, 2, 4]


def test_nothing_to_draw_is_none(tmp_path):
    folder = write_store(tmp_path, methods=("dense",), benchmarks=("gqa",), n=20)
    (_, cells), *_ = contexts(aggregate([folder]).cells)
    assert figures.pareto(cells) is None
    assert figures.accuracy_over_keep(cells) is None
    assert figures.heat_map(cells) is None
    assert efficiency_figures.efficiency_figures(aggregate([folder]).efficiency) == {}


def test_a_heat_map_of_one_benchmark_is_left_out(tmp_path):
    folder = write_store(tmp_path, methods=("dense", "fastv"), benchmarks=("gqa",), n=20)
    assert figures.heat_map(aggregate([folder]).cells) is None


def test_heat_map_marks_what_its_colours_do_not_reach():
    share = np.concatenate([np.linspace(80.0, 99.0, 48), [20.0, 140.0]])
    assert heat.colour_range(share) == (80.0, 100.0)
    assert heat.colour_range(np.array([np.nan])) == (95.0, 100.0)
    assert heat.colour_range(np.array([40.0, 60.0])) == (40.0, 60.0)


def test_heat_map_shows_holes(tmp_path):
    for method, keep, benchmark in (("dense", None, "gqa"), ("dense", None, "pope"), ("fastv", 64, "gqa")):
        draws = np.linspace(0, 1, 20)
        write_accuracy_cell(tmp_path / "e", cell_config(method, keep, benchmark, 20), draws, skill=0.5)
    figure = figures.heat_map(aggregate([tmp_path / "e"]).cells)
    assert [text.get_text() for text in figure.axes[0].texts] == ["100", "—"]


def named(*pairs):
    return pd.DataFrame(pairs, columns=["method", "method_name"])


def test_a_look_follows_from_the_name_alone():
    labels = [(name, name) for name in choices("method")]
    labels += [(f"{name} (rho={rho})", name) for name in ("corematching", "random") for rho in (0.1, 0.4)]
    together = looks.styles(named(*labels))
    alone = {label: looks.styles(named((label, name)))[label] for label, name in labels}
    assert together == alone


def test_looks_are_told_apart_and_controls_are_grey():
    labels = [(f"mine {i}", "mine") for i in range(30)]
    look = looks.styles(named(*labels, *((name, name) for name in choices("method"))))
    assert len({tuple(one.items()) for one in look.values()}) == len(look)
    assert {look[name]["color"] for name in looks.GREYED} <= set(looks.GREYS)
    assert look["dense"]["color"] == looks.DENSE
    assert not {look[f"mine {i}"]["color"] for i in range(30)} & {*looks.GREYS, looks.DENSE}
    assert set(looks.MARKERS) < set(looks.SYMBOLS)


def lightness_and_opponents(colour, blindness):
    """CIE Lab of a colour as seen with a complete colour-blindness (Machado, Oliveira and Fernandes, 2009)."""
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(BLINDNESS[blindness]) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.maximum(to_xyz @ seen / [0.9505, 1, 1.089], 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


BLINDNESS = {
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colours_stay_apart_for_colour_blind_readers(blindness):
    seen = [lightness_and_opponents(colour, blindness) for colour in looks.COLOURS]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 14


def test_figures_use_the_one_look(aggregation):
    look = figures.styles(aggregation.cells)
    for name, figure in figures.all_figures(aggregation.cells, aggregation.efficiency).items():
        for line in (line for axes in figure.axes for line in axes.lines if line.get_marker() in looks.SYMBOLS):
            pair = {"color": line.get_color(), "marker": line.get_marker()}
            assert pair in look.values(), name
            assert line.get_markerfacecolor() == "none", name


def test_shade_fades_only_dropped_patches():
    image = Image.new("RGB", (8, 8), "#ff0000")
    shaded = np.asarray(evidence_figures.shade(image, [0, 3], (2, 2), strength=1.0))
    assert (shaded[:4, :4] == [255, 0, 0]).all()
    assert (shaded[4:, 4:] == [255, 0, 0]).all()
    assert (shaded[:4, 4:] == 0xDC).all()


def test_elbow_by_hand():
    # Chord from (0, 10) to (5, 0): the point farthest from it is (2, 1); it and what lies above stay.
    curve, kept = elbow(np.array([1, 10, 9, 1, 0, 1]))
    assert curve.tolist() == [10, 9, 1, 1, 1, 0]
    assert kept == 5


class OneSpanProcessor:
    """Stands in for a processor: a fixed prompt with one visual span, whatever is asked."""

    image_token = "<image>"

    def __init__(self):
        self.image_processor = type("Images", (), {"image_mean": (0.5, 0.5, 0.5)})
        self.tokenizer = type("Tokens", (), {"added_tokens_decoder": {}})

    def __call__(self, text, images, return_tensors):
        generator = torch.Generator().manual_seed(len(text))
        words = torch.randint(3, 90, (9,), generator=generator)
        ids = torch.cat([torch.tensor([1]), torch.full((IMAGE_TOKENS,), IMAGE_TOKEN), words])[None]
        pixels = torch.randn(1, 3, 112, 112, generator=generator)
        values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        return type("Batch", (dict,), {"to": lambda self, *_, **__: self})(values)


@pytest.fixture(scope="module")
def evidence(random_llava):
    example = Example(Image.new("RGB", (112, 112)), "What is it?", "red")
    return matching_evidence(random_llava, OneSpanProcessor(), example)


def test_evidence_counts_what_the_hooks_saw(random_llava, evidence):
    """The same counts from sets in plain Python, at one layer."""
    layer = 2
    seen = {}
    mlp = random_llava.model.language_model.layers[layer].mlp
    hook = mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.update(activations=args[0][0]))
    text = render(OneSpanProcessor(), "What is it?", 1, "llava15")
    with torch.no_grad():
        random_llava(**OneSpanProcessor()(text, None, "pt"))
    hook.remove()
    active = [set(torch.nonzero(row > 0).flatten().tolist()) for row in seen["activations"]]
    expected = [len(active[1 + token] & active[-1]) for token in range(IMAGE_TOKENS)]
    assert evidence.coactivation[layer].tolist() == expected
    assert evidence.match.shape == (6, IMAGE_TOKENS)
    assert evidence.grid == (8, 8)
    assert (np.abs(evidence.cosine) <= 1 + 1e-6).all()


def test_probing_leaves_no_hooks(random_llava, evidence):
    assert all(not layer.mlp._forward_pre_hooks for layer in random_llava.model.language_model.layers)
    assert all(not layer.mlp.down_proj._forward_pre_hooks for layer in random_llava.model.language_model.layers)


def test_rank_correlation_of_known_order():
    ranks = np.arange(10.0)[None].repeat(2, axis=0)
    known = Evidence(match=ranks, coactivation=ranks**2, cosine=np.stack([ranks[0], -ranks[0]]), grid=(2, 5))
    np.testing.assert_allclose(rank_correlation([known]), [[1.0, -1.0]])


def test_evidence_figures_draw(evidence, tmp_path):
    example = Example(Image.new("RGB", (112, 112)), "What is it?\nAnswer.", "red")
    rows = [
        (example, {"fastv": Kept([0, 1], "red"), "core": Kept([5], "blue")}),
        (example, {"fastv": Kept([2], "Red "), "core": Kept([], "")}),
    ]
    about = About("a model", "a model; torch 2")
    made = {
        "elbow": evidence_figures.elbow_curve(evidence, [1, 3]),
        "matching": evidence_figures.matching([evidence, evidence], [1]),
        "core": evidence_figures.core_tokens(rows, (8, 8), about),
    }
    for name, figure in made.items():
        assert all(path.stat().st_size > 2000 for path in figures.save(figure, tmp_path, name))
    titles = [axes.get_title(loc="left").split("\n") for axes in made["core"].axes]
    assert titles[:3] == [["What is it?", "expected: red"], ["fastv: 2 stay", "✓ red"], ["core: 1 stay", "✗ blue"]]
    assert titles[3:] == [["What is it?", "expected: red"], ["fastv: 1 stay", "✓ Red"], ["core: 0 stay", "✗ "]]
    ticks = made["matching"].axes[-1].get_xticks()
    assert (ticks == ticks.round()).all()


def test_mini_examples_are_seeded_test_scenes():
    first, again = mini_examples(2, 2), mini_examples(2, 2)
    assert [one.question for one in first] == [one.question for one in again]
    assert len(first) == 4
    assert first[0].image.size == (336, 336)


class Traced:
    """Answers with a fixed trace."""

    def __init__(self, layers):
        self.text = "red"
        self.trace = SimpleNamespace(
            visual_tokens=[torch.tensor(layer) for layer in layers], shown=[ImageTokens((Tile(8, 8),), (1, 8, 8))]
        )


class FixedGenerator:
    def __init__(self, model):
        self.model = model

    def answer(self, questions, method):
        assert [question.images()[0].size for question in questions] == [(112, 112)] * len(questions)
        return [Traced([[0, 1, 2, 3], [0, 1, 2, 3], [1, -1], [1, -1]]) for _ in questions]


def test_overlays_are_recorded_and_read_back(random_llava, tmp_path):
    image = Image.new("RGB", (112, 112), "red")
    examples = [Example(image, "first", "red"), Example(image, "second", "blue")]
    variants = [overlays.Variant("fastv", "64", None)]
    overlays.record(FixedGenerator(random_llava), variants, examples, tmp_path / "overlays")
    found = load(tmp_path / "overlays")
    assert found["examples"][0]["tile"] == {"first": 0, "rows": 8, "columns": 8, "stride": 8}
    assert [one["image"] for one in found["examples"]] == ["0.png", "0.png"]
    # Only changes are stored, and tokens without a place on the image are left out.
    stages = found["examples"][0]["answers"][0]["stages"]
    assert stages == [{"layer": 0, "kept": [0, 1, 2, 3]}, {"layer": 2, "kept": [1]}]


@pytest.mark.parametrize("damage", ["absent", "not json", "other schema", "image missing"])
def test_unreadable_overlays_are_none(damage, tmp_path):
    record = {"schema": 2, "examples": []}
    if damage == "not json":
        (tmp_path / "overlays.json").write_text("{")
    elif damage == "other schema":
        (tmp_path / "overlays.json").write_text(json.dumps({**record, "schema": 1}))
    elif damage == "image missing":
        (tmp_path / "overlays.json").write_text(json.dumps({**record, "examples": [{"image": "0.png"}]}))
    assert load(tmp_path) is None


def test_variants_are_built_from_table_rows():
    rows = [
        {"method": "fastv", "method_name": "fastv", "keep": 64, "parameters": {"layer": 2, "keep": 64}},
        {
            "method": "both",
            "method_name": "fastv",
            "keep": 64,
            "parameters": {"layer": 2, "keep": 64, "with": {"name": "core_neurons", "keep": 0.4}},
        },
    ]
    first, second = overlays.variants_of(rows)
    assert (first.label, first.keep, first.method.keep) == ("fastv", "64", 64)
    assert second.method.acts_on == {"tokens", "neurons"}


def test_samples_and_pareto_for_tracking(aggregation):
    frame = dashboard.sample_frame(aggregation, count=3)
    assert list(frame.columns) == list(dashboard.SAMPLE_COLUMNS)
    assert frame.groupby(["benchmark", "method", "keep"]).size().eq(3).all()
    points = dashboard.pareto_frame(aggregation.cells, aggregation.efficiency)
    assert list(points.columns) == list(dashboard.PARETO_COLUMNS)


def test_media_are_what_wandb_logs(aggregation):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    made = dashboard.media(aggregation)
    assert {"tables/accuracy", "tables/scaling", "pareto", "samples", "figures/pareto_flops"} <= set(made)
    assert isinstance(made["figures/layers"], wandb.Image)
    table = aggregation.tables[0]
    assert made["tables/accuracy"].data == [[entry.text + entry.spread for entry in row.entries] for row in table.rows]


def test_workspace_has_the_pareto_and_a_panel_per_benchmark():
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed")
    built = dashboard.workspace("me", "p", ["pope", "gqa"])
    text = json.dumps(built._to_model().model_dump(mode="json", by_alias=True))
    assert text.index("^gqa/[^/]+/accuracy$") < text.index("^pope/[^/]+/F1$")
    assert '"GFLOPs"' in text
    names = [section.name for section in built.sections]
    assert names == ["Trade-off", "Score over keep", "What really ran", "Figures"]


def test_a_run_ends_with_its_report_and_logs_media(tmp_path):
    folder = write_store(tmp_path, methods=("dense", "fastv"), benchmarks=("gqa",), n=20)
    lines, logged = [], []
    publish_run(folder, lines.append, lambda make: logged.append(make()))
    assert lines == [f"report: {folder / 'report.html'} (tables and figures beside it)"]
    assert (folder / "report.html").is_file()
    assert (folder / "tables" / "accuracy.md").is_file()
    assert "tables/accuracy" in logged[0]


def test_a_report_that_fails_costs_no_result(tmp_path, monkeypatch):
    folder = write_store(tmp_path, methods=("dense",), benchmarks=("gqa",), n=20)

    def full_disk(*_, **__):
        raise OSError("No space left\non device")

    monkeypatch.setattr("corematching.results.render.write", full_disk)
    lines = []
    publish_run(folder, lines.append, lambda make: None)
    assert lines == ["no report (OSError: No space left on device); the results are stored"]
