"""The report: deterministic, self-contained, safe to open, and working in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic_store import (
    cell_config,
    cell_record,
    samples_table,
    write_cell,
    write_efficiency_cell,
    write_store,
)

from corematching.results.aggregate import aggregate
from corematching.results.report import json_in_html, write_report

HOSTILE = "<img src=x onerror=\"document.title='broken'\"> </script><script>document.title='broken'</script> & ${x}"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def write_overlays(folder: Path) -> Path:
    """Two questions about one image, two methods, two budgets, two stages."""
    folder.mkdir(parents=True)
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3).astype(np.uint8)).save(folder / "0.png")
    answers = [
        {
            "method": method,
            "keep": keep,
            "prediction": HOSTILE if method == "fastv" else "red",
            "stages": [{"layer": 0, "kept": list(range(16))}, {"layer": 2, "kept": list(range(count))}],
        }
        for method in ("fastv", "random")
        for keep, count in (("8", 8), ("2", 2))
    ]
    answers.insert(
        0, {"method": "dense", "keep": "all", "prediction": "red", "stages": [{"layer": 0, "kept": list(range(16))}]}
    )
    example = {"image": "0.png", "benchmark": "gqa", "question": HOSTILE, "target": "red", "answers": answers}
    example["tile"] = {"first": 0, "rows": 4, "columns": 4, "stride": 4}
    record = {"schema": 2, "examples": [example, {**example, "question": "second"}]}
    (folder / "overlays.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    folder = write_store(tmp_path_factory.mktemp("results"), methods=("dense", "random", "fastv"), n=60)
    # One cell whose method label and model output are hostile.
    config = cell_config("fastv", 32, "gqa", 60, label=HOSTILE)
    table = samples_table((np.random.default_rng(0).random(60) < 0.5).astype(float))
    place = table.schema.get_field_index("prediction")
    table = table.set_column(place, "prediction", [[HOSTILE] * 60])
    write_cell(folder, cell_record(config, value=50.0, n=60), table)
    write_cell(folder, cell_record(cell_config("fastv", 16, "gqa", 60), status="failed"))
    for method, keep, milliseconds in (("dense", None, 30.0), ("fastv", 64, 12.0)):
        write_efficiency_cell(
            folder, method, keep, model="tiny", end_to_end_ms=milliseconds, prefill_ms=9.0, decode_ms_per_token=0.5
        )
    write_overlays(folder / "overlays")
    return folder


@pytest.fixture(scope="module")
def page(experiment) -> Path:
    return write_report(aggregate([experiment]), experiment / "report.html", experiment / "overlays")


def test_same_store_same_bytes(experiment, page, tmp_path):
    again = write_report(aggregate([experiment]), experiment / "again.html", experiment / "overlays")
    assert again.read_bytes() == page.read_bytes()


def test_nothing_is_loaded_from_elsewhere(page):
    text = page.read_text(encoding="utf-8")
    own = text.replace(plotly(), "")
    assert len(own) < len(text)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", own)
    assert "default-src 'none'" in own
    assert not re.search(r"@import|url\(", own)


def plotly() -> str:
    from corematching.results.report import plotly_script

    return plotly_script()


def test_model_output_is_escaped(page):
    own = page.read_text(encoding="utf-8").replace(plotly(), "")
    assert "<img src=x" not in own
    assert "</script><script>document" not in own
    assert "&lt;img src=x" in own


def test_json_cannot_end_its_script_element():
    text = json_in_html({"a": "</script>&<!--\u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": "</script>&<!--\u2028"}


def test_links_lead_to_cells(page):
    links = re.findall(r'href="(cells/[^"]+)"', page.read_text(encoding="utf-8"))
    assert links
    assert all((page.parent / link).is_file() for link in links)


def test_failed_cells_and_their_errors_are_shown(page):
    text = page.read_text(encoding="utf-8")
    assert "RuntimeError: out of &lt;memory&gt; &amp; time" in text


def test_a_report_without_pareto_or_overlays_leaves_them_out(tmp_path):
    folder = write_store(tmp_path, methods=("dense",), benchmarks=("gqa",), n=20)
    text = write_report(aggregate([folder]), folder / "report.html").read_text(encoding="utf-8")
    assert 'id="pareto' not in text
    assert 'id="overlay-canvas"' not in text
    assert len(text) < 400_000  # plotly's bundle stays out, too


# What a reader would do, and what they should see; the result lands in the page's title.
READER = """
<script>
const problems = [];
window.addEventListener("error", (event) => problems.push("error: " + event.message));
window.addEventListener("unhandledrejection", (event) => problems.push("rejection: " + event.reason));
document.addEventListener("securitypolicyviolation", (event) => problems.push("blocked: " + event.violatedDirective));
const check = (truth, name) => { if (!truth) problems.push(name); };
const input = (id, value) => {
  const element = document.getElementById(id);
  element.value = value;
  element.dispatchEvent(new Event("input"));
};
const choose = (id, index) => {
  const element = document.getElementById(id);
  element.selectedIndex = index;
  element.dispatchEvent(new Event("change"));
};
const drawn = () => document.getElementById("overlay-canvas").toDataURL();
const text = (id) => document.getElementById(id).textContent;
setTimeout(() => {
  check(document.title !== "broken", "hostile text ran");
  // Tables sort both ways and filter.
  const table = document.querySelector("#table-accuracy table");
  const head = [...table.tHead.rows[0].cells].find((cell) => cell.textContent === "GQA");
  const column = head.cellIndex;
  const rows = () => [...table.tBodies[0].rows];
  const values = () => rows().map((row) => row.cells[column].dataset.value).filter(Boolean).map(Number);
  const before = values();
  head.click();
  const down = values();
  check(down.length > 2 && down.every((value, place) => !place || value <= down[place - 1]), "descending sort");
  check(head.getAttribute("aria-sort") === "descending", "aria-sort");
  const hole = [...table.tBodies[0].rows].findIndex((row) => row.cells[column].dataset.value === undefined);
  check(hole === down.length, "holes come last");
  head.click();
  check(values().every((value, place, all) => !place || value >= all[place - 1]), "ascending sort");
  const filter = table.closest("section").querySelector("input[type=search]");
  filter.value = "random 64";
  filter.dispatchEvent(new Event("input"));
  const visible = [...table.tBodies[0].rows].filter((row) => !row.hidden);
  check(visible.length === 1 && visible[0].textContent.includes("random"), "filter");
  // The plot draws, and follows its axis.
  const plot = document.getElementById("pareto");
  check(plot.querySelectorAll(".scatterlayer .trace").length >= 3, "pareto traces");
  const flops = JSON.stringify(plot.data[0].x);
  choose("pareto-axis", 1);
  check(JSON.stringify(plot.data[0].x) !== flops, "pareto axis");
  // The overlay follows method, budget, depth and question.
  check(text("overlay-keep-text") === "8", "first budget");
  const pictures = new Set([drawn()]);
  input("overlay-keep", 1);
  check(text("overlay-keep-text") === "2" && text("overlay-layer-text").includes("2 tokens"), "keep slider");
  pictures.add(drawn());
  input("overlay-layer", 0);
  check(text("overlay-layer-text") === "from layer 0 on: 16 tokens", "depth slider");
  pictures.add(drawn());
  check(pictures.size === 3, "overlay pictures differ: " + pictures.size);
  check(text("overlay-prediction").startsWith("<img src=x"), "prediction shown as text");
  choose("overlay-method", 2);
  check(text("overlay-prediction") === "red", "method select");
  choose("overlay-example", 1);
  check(text("overlay-question") === "second", "question select");
  const result = document.createElement("pre");
  result.id = "reader";
  result.textContent = JSON.stringify({ problems, rows: before.length });
  document.body.append(result);
}, 1500);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed, so the report was not tried in a browser")
def test_a_reader_can_use_it_in_chromium(page, tmp_path):
    tried = page.with_name("tried.html")
    # Before the page's own scripts, so that errors in those are seen, too.
    tried.write_text(page.read_text(encoding="utf-8").replace("<body>", "<body>" + READER, 1), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=8000"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    run = subprocess.run(
        [CHROMIUM, *options, profile, "--dump-dom", tried.as_uri()], capture_output=True, text=True, timeout=120
    )
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    found = re.search(r'<pre id="reader">(.*?)</pre>', run.stdout, flags=re.S)
    assert found, run.stdout[-2000:]
    assert json.loads(found.group(1).replace("&lt;", "<").replace("&gt;", ">"))["problems"] == []
