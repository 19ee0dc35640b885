"""Everything that a finished experiment shows, written in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from corematching.results.accuracy import contexts
from corematching.results.aggregate import Aggregation, aggregate, write_tables

OVERLAYS = "overlays"


def publish(
    folders: Sequence[Path | str], out: Path | None = None, figures: bool = True, report: bool = True
) -> list[Path]:
    """Write tables, figures and the report of one or more experiments.

    Parameters
    ----------
    folders
        Experiment folders.
    out
        Where to write; default the experiment's own folder (the first one's).
    figures, report
        Whether to write figures (``figures/``) and ``report.html`` beside the tables (``tables/``).

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    UserError
        If a folder is no experiment folder.
    """
    target = Path(out or folders[0])
    aggregation = aggregate(folders)
    written = write_tables(aggregation, target / "tables")
    if figures:
        written += write_all_figures(aggregation, target / "figures")
    if report:
        from corematching.results.report import write_report

        written.append(write_report(aggregation, target / "report.html", Path(folders[0]) / OVERLAYS))
    return written


def write_all_figures(aggregation: Aggregation, folder: Path) -> list[Path]:
    """Write the figures of every context and of the efficiency rows."""
    from corematching.results.figures import write_figures

    groups = contexts(aggregation.cells) if len(aggregation.cells) else []
    return write_figures(groups, aggregation.efficiency, folder)
