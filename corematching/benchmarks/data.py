"""Where the rows of a benchmark come from: the bundled mini suite or the Hugging Face Hub.

Both end in the same thing, a local folder of parquet files laid out like the dataset repository, so that everything
after this module is one code path.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from corematching.benchmarks.spec import CONF_DIR, Benchmark
from corematching.errors import UserError

SOURCES = ("mini", "hub")


@dataclass(frozen=True)
class DataSource:
    """A place that holds all benchmarks.

    Parameters
    ----------
    name
        ``"mini"`` (drawn scenes, generated on first use) or ``"hub"`` (the real datasets).
    n, seed
        Mini only: questions per benchmark, and the generator's seed.
    revision
        Hub only: branch, tag or commit; None means ``main``.
    per_image
        Mini only: questions about each image; None leaves it to the dataset.
    """

    name: str
    n: int = 300
    seed: int = 0
    revision: str | None = None
    per_image: int | None = None

    def __post_init__(self) -> None:
        if self.name not in SOURCES:
            raise UserError(f"unknown data {self.name!r}; valid data: {', '.join(SOURCES)}")
        if self.name == "mini" and (not isinstance(self.n, int) or self.n < 2):
            raise UserError(f"data.n={self.n!r} is not usable; the mini suite needs a whole number of at least 2")

    def root(self, benchmark: Benchmark) -> Path:
        """Local folder with the benchmark's dataset repository; generates or fetches what is missing.

        Raises
        ------
        UserError
            If the dataset is not in the cache and cannot be fetched; the message says what to run.
        """
        if self.name == "mini":
            from corematching.benchmarks.mini.writers import ensure_mini

            return ensure_mini(benchmark.folder, self.n, self.seed, self.per_image) / benchmark.folder
        from corematching.benchmarks.hub import dataset_folder

        return dataset_folder(benchmark, self.revision)

    def version(self, benchmark: Benchmark) -> str:
        """What names the data in a cell's identity: the mini suite's content checksum or the Hub's commit."""
        if self.name == "mini":
            from corematching.benchmarks.mini.writers import content_version

            return content_version(benchmark.folder, self.n, self.seed, self.per_image)
        return self.root(benchmark).name

    def version_at_hand(self, benchmark: Benchmark) -> str | None:
        """What `version` would say if the data is on this machine already; None if it is not."""
        if self.name == "mini":
            from corematching.benchmarks.mini.writers import version_at_hand

            return version_at_hand(benchmark.folder, self.n, self.seed, self.per_image)
        from corematching.benchmarks.hub import cached, dataset_repo

        folder = cached(dataset_repo(benchmark, self.revision))
        return folder.name if folder else None


def load_source(name: str, **settings: object) -> DataSource:
    """Build the source described by ``conf/data/<name>.yaml``, with `settings` on top.

    Raises
    ------
    UserError
        If the name or a setting is unknown; the message names the valid ones.
    """
    path = CONF_DIR / "data" / f"{name}.yaml"
    if name not in SOURCES or not path.is_file():
        raise UserError(f"unknown data {name!r}; valid data: {', '.join(SOURCES)}")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if unknown := sorted(set(settings) - set(values)):
        raise UserError(f"unknown data parameter {unknown[0]!r} for {name}; valid parameters: {', '.join(values)}")
    return DataSource(**{**values, **settings})
