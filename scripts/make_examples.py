"""Regenerate ``results/examples/``: a sweep with the bundled model on the bundled suite, and times at real width.

Usage: ``python scripts/make_examples.py [settings of run.py, e.g. limit=20]``

Runs what is missing of ``conf/experiment/bundled_sweep.yaml`` and ``efficiency_slice.yaml`` (into ``results/``, not
committed; a second call takes seconds), then writes their tables and figures, the figures of what the model does
inside, and a page that shows them.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from corematching import files
from corematching.results.accuracy import contexts, methods_of
from corematching.results.aggregate import Aggregation, aggregate, write_tables
from corematching.results.publish import write_all_figures
from corematching.results.render import to_markdown

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ("bundled_sweep", "efficiency_slice")
OUT = ROOT / "results" / "examples"
README_KEEP = "64"
README_MARKS = ("<!-- made by make examples: from here -->", "<!-- to here -->")


def main() -> int:
    """Run the sweep, then write everything that is committed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings of run.py, e.g. limit=20")
    chosen = parser.parse_args()
    for experiment in EXPERIMENTS:
        words = [f"+experiment={experiment}", "tracking=none", *chosen.overrides]
        run = subprocess.run([sys.executable, str(ROOT / "run.py"), *words], cwd=ROOT, check=False)
        if run.returncode:
            return run.returncode
    aggregation = aggregate([ROOT / "results" / experiment for experiment in EXPERIMENTS])
    for part in ("tables", "figures"):  # what other commands made stays
        shutil.rmtree(OUT / part, ignore_errors=True)
    write_tables(aggregation, OUT / "tables")
    write_all_figures(aggregation, OUT / "figures")
    write_evidence(OUT / "figures")
    files.write(OUT / "README.md", page(aggregation))
    files.write(ROOT / "README.md", with_main_table((ROOT / "README.md").read_text(encoding="utf-8"), aggregation))
    print(f"wrote {OUT.relative_to(ROOT)}")
    return 0


def write_evidence(folder: Path) -> None:
    """The elbow, core tokens on images, and co-activation against cosine, from the bundled model."""
    import corematching as cm
    from corematching.answering.generator import Generator
    from corematching.inspection import evidence_figures
    from corematching.inspection.evidence import about_model, answered, matching_evidence, mini_examples
    from corematching.results.figures import save

    model, processor = cm.load_model("tiny")
    examples = mini_examples(images=4, questions=1)
    found = [matching_evidence(model, processor, one) for one in examples]
    depth = len(found[0].match)
    layers = [1, depth // 2, depth - 2]
    save(evidence_figures.elbow_curve(found[0], layers), folder, "elbow")
    save(evidence_figures.matching(found, layers), folder, "matching")

    asked = mini_examples(images=2, questions=2)
    methods = {
        "random": cm.build_method("random", keep=64),
        "fastv": cm.build_method("fastv", keep=64),
        "core tokens": cm.build_method("core_tokens", threshold="keep", keep=64),
        "core tokens, elbow": cm.build_method("core_tokens", threshold="elbow", keep=None),
    }
    rows = answered(Generator(model, processor), asked, methods)
    about = about_model(model, "data gqa", f"n = {len(asked)} questions")
    save(evidence_figures.core_tokens(rows, found[0].grid, about), folder, "core_tokens")


def with_main_table(readme: str, aggregation: Aggregation) -> str:
    """The project's README with the lines of one budget of the accuracy table between its two marks."""
    lines = to_markdown(aggregation.tables[0]).splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("| Method"))
    place = [name.strip() for name in lines[header].split("|")].index("Keep")
    rows = [line for line in lines[header:] if line.startswith("|")]
    chosen = [line for line in rows if line.split("|")[place].strip() in ("Keep", "---:", "all", README_KEEP)]
    caption = next(line for line in lines[header:] if line.startswith("Accuracy on"))
    before, _, rest = readme.partition(README_MARKS[0])
    after = rest.partition(README_MARKS[1])[2]
    return before + "\n".join([README_MARKS[0], *chosen, "", caption, README_MARKS[1]]) + after


def page(aggregation: Aggregation) -> str:
    """``README.md``: the main tables and the figures."""
    (_, group), *_ = contexts(aggregation.cells)
    methods = ", ".join(dict.fromkeys(methods_of(group)["method"]))
    figures = {
        "pareto_flops": "Mean share of dense accuracy against FLOPs per question.",
        "accuracy_over_tokens": "Score over the visual tokens that a layer really sees; line and band are dense.",
        "accuracy_over_keep": "The same over the nominal budget.",
        "heat_map": "Score in percent of dense.",
        "layers": "What the traces say per decoder layer.",
        "core_tokens": "Visual tokens that stay and answers given, for two questions on each of two images.",
        "elbow": "Core neurons that each visual token activates, sorted; the dot is where the elbow rule cuts.",
        "matching": "Neurons activated together with the last token against cosine similarity.",
        "time_breakdown": "Prefill and decode time (real width, few layers, random weights: see the panels' titles).",
        "speedup_over_keep": "End-to-end speed-up over dense by visual tokens kept, likewise.",
        "decode_over_neurons": "Decode time against kept neurons, with what the bytes read allow.",
    }
    accuracy = aggregation.tables[0]
    times = next(table for table in aggregation.tables if table.name == "hardware")
    present = [name for name in figures if (OUT / "figures" / f"{name}.png").is_file()]
    lines = [
        "# Example results",
        "",
        f"The bundled model on the bundled suite: {methods}. Made by `make examples`; how to read the tables:",
        "[docs/tables.md](../../docs/tables.md) and [docs/efficiency.md](../../docs/efficiency.md).",
        "",
        to_markdown(accuracy),
        to_markdown(times),
        "All tables (CSV, Markdown, LaTeX, HTML) and every comparison with dense (`statistics.csv`) are in `tables/`.",
        "",
        *(f"![{name}](figures/{name}.png)\n\n{figures[name]}\n" for name in present),
    ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
