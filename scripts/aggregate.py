"""Make the paper's tables and figures from finished experiments.

Usage: ``python scripts/aggregate.py results/<experiment> [more experiments ...] [--out FOLDER]``

Writes ``tables/`` (CSV, Markdown, LaTeX, HTML, statistics) and ``figures/`` (PDF, PNG) into the experiment's folder, or
into FOLDER. Several experiments are put into one set of tables; then FOLDER is needed.
"""

from corematching.commands import aggregate_command

if __name__ == "__main__":
    raise SystemExit(aggregate_command())
