"""Small pictures for the report's answers: the images of the questions on which methods disagree."""

from __future__ import annotations

from pathlib import Path

from corematching import files
from corematching.benchmarks.data import load_source
from corematching.benchmarks.spec import ROW, available_benchmarks, load_benchmark
from corematching.benchmarks.tasks import build_tasks
from corematching.results.accuracy import contexts
from corematching.results.aggregate import Aggregation
from corematching.results.answers import disagreements
from corematching.results.overlays import thumbnail_path

SIDE = 112
"""Longest side in pixels."""
MOST = 2000
"""Questions of a cell up to which its data is read through for their images."""


def record_thumbnails(aggregation: Aggregation, folder: Path) -> list[Path]:
    """Write thumbnails for the report's answers into `folder`, for every benchmark whose data is unchanged and small.

    Returns
    -------
    list of Path
        The pictures written.
    """
    written = []
    for _, group in contexts(aggregation.cells) if len(aggregation.cells) else []:
        for block in disagreements(aggregation, group):
            done = group[(group["benchmark"] == block.benchmark) & (group["status"] == "done")]
            cell = done.iloc[0]
            if block.benchmark not in available_benchmarks():
                continue  # texts and the long-decode road have no questions with a picture
            settings = {} if cell["data"] == "mini" else {"revision": cell["version"]}
            source, benchmark = load_source(cell["data"], **settings), load_benchmark(block.benchmark)
            if cell["n"] > MOST or source.version(benchmark) != cell["version"]:
                continue
            wanted = {question.doc_id for question in block.questions}
            limit = None if cell["limit"] != cell["limit"] else int(cell["limit"])
            for task in build_tasks(benchmark, source, cell["prompt"], limit=limit):
                for doc in task.eval_docs:
                    if int(doc[ROW]) in wanted and (pictures := task.doc_to_visual(doc)):
                        picture = pictures[0].convert("RGB")
                        picture.thumbnail((SIDE, SIDE))
                        path = thumbnail_path(folder, block.benchmark, int(doc[ROW]))
                        with files.replacing(path) as temporary:
                            picture.save(temporary, quality=85)
                        written.append(path)
    return written
