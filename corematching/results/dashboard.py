"""What Weights & Biases shows of an experiment: media to log with a run, and a workspace to look at runs with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import pandas as pd
from PIL import Image

from corematching.benchmarks.spec import load_benchmark
from corematching.results.accuracy import contexts
from corematching.results.aggregate import Aggregation
from corematching.results.efficiency_figures import efficiency_figures
from corematching.results.figures import all_figures, pareto_points, png
from corematching.results.tables import budget
from corematching.results.titles import benchmark_order

#: Name of the logged table behind the Pareto panel, and its columns.
PARETO = "pareto"
PARETO_COLUMNS = ("method", "keep", "% of dense", "GFLOPs", "visual tokens per layer", "ms end to end")
SAMPLE_COLUMNS = ("benchmark", "method", "keep", "doc_id", "prompt", "prediction", "target", "score", "retained_tokens")
SAMPLES_PER_CELL = 20


def media(aggregation: Aggregation) -> dict[str, Any]:
    """Tables and figures of an experiment as wandb objects, by name (for ``Tracker.log_media``).

    ``tables/<name>`` are the paper's tables, :data:`PARETO` the points behind the Pareto panel, ``samples`` the first
    answers of every cell, ``figures/<name>`` the figures.
    """
    import wandb

    made: dict[str, Any] = {}
    for table in aggregation.tables:
        rows = [[entry.text + entry.spread for entry in row.entries] for row in table.rows]
        made[f"tables/{table.name}"] = wandb.Table(columns=[column.title for column in table.columns], data=rows)
    for suffix, group in contexts(aggregation.cells) if len(aggregation.cells) else []:
        made[PARETO + suffix] = wandb.Table(dataframe=pareto_frame(group, aggregation.efficiency))
        for name, figure in all_figures(group, aggregation.efficiency).items():
            made[f"figures/{name}{suffix}"] = wandb.Image(Image.open(BytesIO(png(figure))))
    for name, figure in efficiency_figures(aggregation.efficiency).items():
        made[f"figures/{name}"] = wandb.Image(Image.open(BytesIO(png(figure))))
    made["samples"] = wandb.Table(dataframe=sample_frame(aggregation))
    return made


def pareto_frame(cells: pd.DataFrame, efficiency: pd.DataFrame) -> pd.DataFrame:
    """The points of the Pareto plot, with columns :data:`PARETO_COLUMNS`."""
    points = pareto_points(cells, efficiency)
    points = points.assign(keep=[budget(keep) for keep in points["keep"]], flops=points["flops"] / 1e9)
    frame = points[["method", "keep", "share", "flops", "tokens", "milliseconds"]]
    return frame.set_axis(list(PARETO_COLUMNS), axis=1)


def sample_frame(aggregation: Aggregation, count: int = SAMPLES_PER_CELL) -> pd.DataFrame:
    """The first answers of every finished cell, with columns :data:`SAMPLE_COLUMNS`."""
    frames = [pd.DataFrame(columns=list(SAMPLE_COLUMNS))]
    for cell in aggregation.cells[aggregation.cells["status"] == "done"].itertuples():
        table = aggregation.results.samples(cell.folder, SAMPLE_COLUMNS[3:])
        if table is not None:
            labels = {"benchmark": cell.benchmark, "method": cell.method, "keep": budget(cell.keep)}
            frames.append(table.slice(0, count).to_pandas().assign(**labels)[list(SAMPLE_COLUMNS)])
    return pd.concat(frames, ignore_index=True)


def workspace(entity: str, project: str, benchmarks: Sequence[str], name: str = "CoreMatching-Bench") -> Any:
    """A wandb workspace: Pareto, one panel per benchmark over keep, what really ran, tables and figures.

    Parameters
    ----------
    entity, project
        Where it will live.
    benchmarks
        Names of benchmarks that get a panel.
    name
        Of the view.

    Returns
    -------
    wandb_workspaces.workspaces.Workspace
        Not saved; ``save()`` needs a network and a login.
    """
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    def over_keep(heading: str, pattern: str) -> Any:
        return panels.LinePlot(title=heading, x="keep", metric_regex=pattern, title_x="keep", plot_type="line")

    pareto = panels.CustomChart(
        query={"summaryTable": {"tableKey": PARETO}},
        chart_name="wandb/scatter/v0",
        chart_fields={"x": "GFLOPs", "y": "% of dense"},
        chart_strings={"title": "% of dense accuracy against GFLOPs per question"},
    )
    traced = {
        "visual tokens per layer": "visual_tokens_per_layer",
        "KV cache bytes": "kv_bytes",
        "prefill FLOPs": "prefill_flops",
        "failed cells": "failed",
    }
    known = [load_benchmark(one) for one in benchmark_order(benchmarks)]
    scores = [over_keep(one.title, rf"^{one.name}/[^/]+/{re.escape(one.metric.name)}$") for one in known]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            workspaces.Section(name="Trade-off", panels=[pareto], is_open=True),
            workspaces.Section(name="Score over keep", panels=scores, is_open=True),
            workspaces.Section(
                name="What really ran",
                panels=[over_keep(heading, rf"^[^/]+/[^/]+/{metric}$") for heading, metric in traced.items()],
            ),
            workspaces.Section(
                name="Figures", panels=[panels.MediaBrowser(title="figures", media_keys=["figures/*"], num_columns=2)]
            ),
        ],
    )
