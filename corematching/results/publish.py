"""Everything that a finished experiment shows, written in one call.

Imports pandas, scipy and matplotlib only when called: the runner imports this module, and its errors must be quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from corematching.results import overlays

if TYPE_CHECKING:
    from corematching.results.aggregate import Aggregation


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
    from corematching.results.aggregate import aggregate

    return write(aggregate(folders), Path(out or folders[0]), Path(folders[0]) / overlays.FOLDER, figures, report)


def write(
    aggregation: Aggregation, target: Path, overlay_folder: Path, figures: bool = True, report: bool = True
) -> list[Path]:
    """Write tables, figures and report of an aggregation into `target`, overlays from their folder."""
    from corematching.results.aggregate import write_tables

    written = write_tables(aggregation, target / "tables")
    if figures:
        written += write_all_figures(aggregation, target / "figures")
    if report:
        from corematching.results.report import write_report

        written.append(write_report(aggregation, target / "report.html", overlay_folder))
    return written


def write_all_figures(aggregation: Aggregation, folder: Path) -> list[Path]:
    """Write the figures of every context and of the efficiency rows."""
    from corematching.results.accuracy import contexts
    from corematching.results.efficiency_figures import write_efficiency_figures
    from corematching.results.figures import write_figures

    groups = contexts(aggregation.cells) if len(aggregation.cells) else []
    written = write_figures(groups, aggregation.efficiency, folder)
    return written + write_efficiency_figures(aggregation.efficiency, folder)
