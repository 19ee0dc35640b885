"""The report in a browser at three widths: nothing leaves the page, no toolbar or legend covers anything."""

import json
import re
import shutil
import subprocess

import pytest
from synthetic_store import write_ugly_store

from corematching.results.aggregate import aggregate
from corematching.results.load import StoreWarning
from corematching.results.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed, so the report was not looked at"),
]
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000"]
#: Measures the page as it stands, and says so in an element that the test reads.
RULER = """
<script>
window.addEventListener("load", () => setTimeout(() => {
  const faults = [];
  const check = (truth, fault) => { if (!truth) faults.push(fault); };
  const box = (query) => document.querySelector(query).getBoundingClientRect();
  check(document.documentElement.scrollWidth <= window.innerWidth, "the page is wider than the window");
  const scroll = document.querySelector("#table-accuracy .scroll");
  if (window.innerWidth >= 1400) check(scroll.scrollWidth <= scroll.clientWidth, "the table does not fit");
  scroll.scrollLeft = 10000;
  const first = scroll.querySelector("tbody td").getBoundingClientRect();
  check(Math.abs(first.left - scroll.getBoundingClientRect().left) < 2, "the first column left");
  check(first.width < window.innerWidth / 2, "the first column fills the page");
  for (const cell of scroll.querySelectorAll("td")) {
    if (/^[A-Za-z]{6,}$/.test(cell.textContent)) {
      check(cell.getBoundingClientRect().height < 60, "a word is broken: " + cell.textContent);
    }
  }
  const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
  check(apart(box("#pareto .modebar"), box("#pareto .nsewdrag")), "the toolbar covers the plot");
  check(apart(box("#pareto .modebar"), box("#pareto .legend")), "the toolbar covers the legend");
  check(apart(box("#pareto .legend"), box("#pareto .nsewdrag")), "the legend covers the plot");
  check(box("#pareto .nsewdrag").width > 150 && box("#pareto .nsewdrag").height > 150, "the plot is too small");
  const result = document.createElement("pre");
  result.id = "ruler";
  result.textContent = JSON.stringify(faults);
  document.body.append(result);
}, 1500));
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = write_ugly_store(tmp_path_factory.mktemp("widths"), methods=12, keeps=(64,), n=8)
    with pytest.warns(StoreWarning):
        aggregation = aggregate([folder])
    report = write_report(aggregation, folder / "report.html")
    tried = folder / "tried.html"
    tried.write_text(report.read_text(encoding="utf-8").replace("<body>", "<body>" + RULER, 1), encoding="utf-8")
    return tried


@pytest.mark.parametrize("width", [1400, 900, 500])
def test_the_report_fits_its_window(page, width, tmp_path):
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    size, picture = f"--window-size={width},1200", tmp_path / "page.png"
    shot = subprocess.run(
        [CHROMIUM, *OPTIONS, profile, size, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=240
    )
    assert shot.returncode == 0
    assert picture.stat().st_size > 10_000
    dumped = subprocess.run(
        [CHROMIUM, *OPTIONS, profile, size, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=240
    )
    found = re.search(r'<pre id="ruler">(.*?)</pre>', dumped.stdout, flags=re.S)
    assert found, dumped.stdout[-500:]
    assert json.loads(found.group(1)) == []
