"""What a run shows at its end: overlays, tables, figures, report, and the same on its tracker.

Imports pandas, scipy and matplotlib only when called: the runner imports this module, and its errors must be quick.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corematching.results.overlays import FOLDER
from corematching.results.reading import RECORD
from corematching.results.store import Store

if TYPE_CHECKING:
    from corematching.results.aggregate import Aggregation


def outdated(store: Store) -> bool:
    """Whether the report is missing or older than a cell, as after a run that was killed while it drew."""
    try:
        written = (store.root / "report.html").stat().st_mtime_ns
        newest = max(path.stat().st_mtime_ns for path in (store.cells, *store.cells.glob(f"*/{RECORD}")))
    except OSError:
        return True
    return written < newest


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
        from corematching.inspection.overlays import record_experiment, uses_bundled_model

        cells = aggregated().cells
        if uses_bundled_model(cells):
            # Loading it once more takes a second; for real models there is scripts/report.py --overlays N.
            record_experiment(cells, folder / FOLDER, images=3)

    def thumbnails() -> None:
        from corematching.inspection.thumbnails import record_thumbnails

        record_thumbnails(aggregated(), folder / FOLDER)

    def report() -> None:
        from corematching.results.publish import write

        write(aggregated(), folder, folder / FOLDER)
        say(f"report: {folder / 'report.html'} (tables and figures beside it)")

    def tracked() -> None:
        from corematching.results.dashboard import media

        log_media(lambda: media(aggregated()))

    @cache
    def aggregated() -> Aggregation:
        from corematching.results.aggregate import aggregate

        return aggregate([folder])

    for what, action in (
        ("overlays", overlays),
        ("thumbnails", thumbnails),
        ("report", report),
        ("tracked tables", tracked),
    ):
        try:
            action()
        except ImportError as error:
            say(f"no {what}: the package {error.name} is not installed; the results are stored")
        except Exception as error:  # hours of computing must not end in the traceback of a drawing
            reason = " ".join(str(error).split())[:200]
            say(f"no {what} ({type(error).__name__}: {reason}); the results are stored")
