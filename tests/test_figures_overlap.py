"""No text in any figure lies on another or leaves the page, whatever the names and however many methods."""

import itertools
import random

import numpy as np
import pytest
from matplotlib.figure import Figure
from overlaps import overlapping
from PIL import Image
from synthetic_store import UGLY, write_ugly_store

from corematching.inspection import evidence_figures
from corematching.inspection.evidence import Evidence, Example, Kept
from corematching.results.aggregate import aggregate
from corematching.results.efficiency_figures import efficiency_figures
from corematching.results.figures import all_figures, save
from corematching.results.figures.about import About
from corematching.results.figures.text import name_of, shown, width, wrapped
from corematching.results.load import StoreWarning

ABOUT = About("a model with a long name · " * 8, "details", "A banner that says what must not be overlooked. " * 3)
EVERY = {
    *("pareto_flops", "pareto_latency", "accuracy_over_tokens", "accuracy_over_keep", "heat_map", "layers"),
    *("time_breakdown", "speedup_over_keep", "decode_over_neurons"),
}


def figures_of(folder):
    with pytest.warns(StoreWarning):
        aggregation = aggregate([folder])
    cells, efficiency = aggregation.cells, aggregation.efficiency
    return {**all_figures(cells, efficiency), **efficiency_figures(efficiency)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every figure of a small store with ugly names."""
    root = tmp_path_factory.mktemp("ugly")
    return figures_of(write_ugly_store(root, methods=12, benchmarks=("gqa", "pope"), keeps=(192, 64)))


def test_the_helper_sees_overlaps_and_cut_texts():
    figure = Figure((2, 2))
    figure.text(0.5, 0.5, "one\nand two")
    figure.text(0.5, 0.55, "another")
    figure.text(0.9, 0.1, "leaves the page")
    assert len(overlapping(figure)) == 2


def test_figures_of_ugly_names_do_not_overlap(made):
    assert set(made) == EVERY
    assert {name: overlapping(figure) for name, figure in made.items()} == {name: [] for name in made}


@pytest.mark.slow
def test_thirty_methods_on_ten_benchmarks_do_not_overlap(tmp_path):
    made = figures_of(write_ugly_store(tmp_path))
    assert set(made) == EVERY
    assert {name: overlapping(figure) for name, figure in made.items()} == {name: [] for name in made}
    for name, figure in made.items():
        assert all(path.stat().st_size > 5000 for path in save(figure, tmp_path, name))


def test_figures_of_what_a_model_does_inside_do_not_overlap():
    rng = np.random.default_rng(0)
    found = [
        Evidence(*(rng.integers(0, 99, (4, 64)).astype(float) for _ in range(3)), (8, 8), f"{label}?", ABOUT)
        for label in UGLY[:5]
    ]
    example = Example(Image.new("RGB", (112, 112)), f"{UGLY[0]} {UGLY[2]} {UGLY[5]}?\nAnswer.", UGLY[8])
    kept = {label: Kept([1, 2], 40 * "runs away ") for label in UGLY[:6]}
    made = {
        "elbow": evidence_figures.elbow_curve(found[0], [0, 3]),
        "matching": evidence_figures.matching(found, [1, 2]),
        "core_tokens": evidence_figures.core_tokens([(example, kept)] * 2, (8, 8), ABOUT),
    }
    assert {name: overlapping(figure) for name, figure in made.items()} == {name: [] for name in made}


def test_every_figure_carries_where_it_comes_from(made, tmp_path):
    for name, figure in made.items():
        assert figure.about.caption.startswith("tiny (float32)"), name
        assert "n = " in figure.about.caption, name
        assert "torch 2" in figure.about.details, name
        assert "commit 0123456789abcdef" in figure.about.details, name
    pdf, png = save(made["layers"], tmp_path, "layers")
    assert b"/Subject" in pdf.read_bytes()
    assert b"/Type3" not in pdf.read_bytes()
    with Image.open(png) as picture:
        assert picture.text["Description"] == made["layers"].about.caption
        assert "commit 0123456789abcdef" in picture.text["Source"]
        assert picture.text["Warning"] == made["layers"].about.banner != ""


def test_long_labels_stay_different():
    labels = [f"{'corematching with many parameters, ' * 4}rho={rho}{', and more' * 12}" for rho in range(50)]
    assert len({name_of(label) for label in labels}) == 50
    assert max(map(len, map(name_of, labels))) < 110
    assert name_of("fastv", 64).split() == ["fastv", "·", "64"]


def test_any_text_is_wrapped_to_its_width_and_kept_whole():
    rng = random.Random(0)
    for text, inches in itertools.product([*map(shown, UGLY), "word " * rng.randint(5, 30)], (0.5, 1.1, 3.0)):
        lines = wrapped(text, inches, 8).split("\n")
        assert max(width(line, 8) for line in lines) <= inches
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_what_no_font_can_draw_is_replaced():
    assert shown("a\tb\nc\x00 \U0001f680") == "a b c\\x00 \N{REPLACEMENT CHARACTER}"
