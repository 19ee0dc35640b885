"""Everything that a finished experiment shows, written in one call.

Imports pandas, scipy and matplotlib only when called: the runner imports this module, and its errors must be quick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corematching.results.aggregate import Aggregation

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
    from corematching.results.aggregate import aggregate

    return _write(aggregate(folders), Path(out or folders[0]), Path(folders[0]) / OVERLAYS, figures, report)


def publish_run(
    folder: Path, say: Callable[[str], None], log_media: Callable[[Callable[[], dict[str, Any]]], None]
) -> None:
    """Publish what a run has stored, at its end; whatever goes wrong is said in one line and costs no result.

    Parameters
    ----------
    folder
        The experiment's folder.
    say
        Prints a line.
    log_media
        ``Tracker.log_media``: given a function that makes media, logs them if there is a tracker.
    """

    def overlays() -> None:
        from corematching.results.overlays import record_experiment, uses_bundled_model

        cells = aggregated().cells
        if uses_bundled_model(cells):
            # Loading it once more takes a second; for real models there is scripts/report.py --overlays N.
            record_experiment(cells, folder / OVERLAYS, images=3)

    def report() -> None:
        _write(aggregated(), folder, folder / OVERLAYS)
        say(f"report: {folder / 'report.html'} (tables and figures beside it)")

    def tracked() -> None:
        from corematching.results.dashboard import media

        log_media(lambda: media(aggregated()))

    @cache
    def aggregated() -> Aggregation:
        from corematching.results.aggregate import aggregate

        return aggregate([folder])

    for what, action in (("overlays", overlays), ("report", report), ("tracked tables", tracked)):
        try:
            action()
        except ImportError as error:
            say(f"no {what}: the package {error.name} is not installed; the results are stored")
        except Exception as error:  # hours of computing must not end in the traceback of a drawing
            reason = " ".join(str(error).split())[:200]
            say(f"no {what} ({type(error).__name__}: {reason}); the results are stored")


def _write(
    aggregation: Aggregation, target: Path, overlay_folder: Path, figures: bool = True, report: bool = True
) -> list[Path]:
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
