"""The efficiency road: ``python run.py +experiment=efficiency`` measures time and memory, never accuracy.

Cells go into the same store as accuracy cells, with ``kind: efficiency`` and one row per output length under ``bench``
(see :mod:`corematching.efficiency.rows`). A finished row is not measured again. Rows for other hardware are predictions
and say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from corematching import build_method, compose
from corematching.cost.hardware import THIS
from corematching.cost.memory import keep_freed_memory
from corematching.cost.roofline import Hardware
from corematching.efficiency.ffn_ways import measured_ways
from corematching.efficiency.inputs import fixed_batch
from corematching.efficiency.kernels import calibration_of
from corematching.efficiency.offloaded import measure_offloaded
from corematching.efficiency.peaks import measure_peaks
from corematching.efficiency.rows import Measured, Protocol, measure, predicted_rows
from corematching.efficiency.table import print_rows, run_table
from corematching.engine.preflight import check_methods
from corematching.engine.trace import SampleTrace
from corematching.errors import UserError
from corematching.evaluation import asks, provenance
from corematching.evaluation.attempt import begun
from corematching.evaluation.banner import banner, small_note
from corematching.evaluation.cells import Cell
from corematching.evaluation.chosen import config_of, load_chosen, place_of
from corematching.evaluation.experiment import (
    Row,
    forced_since,
    method_identity,
    method_rows,
    model_identity,
    model_label,
)
from corematching.evaluation.publishing import outdated, publish_run
from corematching.evaluation.records import describe, new_record
from corematching.evaluation.settings import read_settings
from corematching.methods.base import Method
from corematching.models.families import family_of
from corematching.models.loading import model_path
from corematching.results import remote
from corematching.results.manifest import Manifest
from corematching.results.store import Store
from corematching.texts import neutral

VERSION = "3"
"""Of how rows are measured: rows of another version are not compared with these."""


def run(config: DictConfig) -> int:
    """Measure what the store lacks and print the table.

    Returns
    -------
    int
        Exit status: 0 all rows are there or left to another process that measures them, 1 some failed.

    Raises
    ------
    UserError
        For a wrong setting, or a method that does not fit the model.
    """
    settings = read_settings(config)
    bench = Bench(settings)
    for line in banner(settings, answers=False):
        print(line)
    pending = [row for row in bench.rows if not bench.is_done(row)]
    print(
        f"{bench.folder.name}: {len(bench.rows)} methods on {settings['model']['name']}, {len(pending)} to measure"
        f" -> {remote.shown(bench.folder)}"
    )
    if pending:
        bench.prepare(pending)
    for row in pending:
        name = f"{neutral(row.label)}{'' if row.keep is None else f' keep={row.keep}'}"
        with ExitStack() as claims:
            mine = all(claims.enter_context(bench.store.claim(cell.id)) for cell in bench.measured_cells(row))
            if not mine or bench.is_done(row):
                print(f"  {name}: {'done' if mine else 'being measured'} by another process")
                continue
            print(f"  {name} ...", flush=True)
            bench.measure(row)
    return bench.conclude(bool(pending))


class Bench:
    """One efficiency experiment: its settings, its store and, once something is to be measured, the model."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        values = dict(settings["efficiency"])
        for several in ("output_tokens", "batch"):
            values[several] = tuple(dict.fromkeys(values[several]))
        self.protocol = Protocol(**values)
        self.rows = tuple(method_rows(settings))
        self.identity = model_identity(settings["model"])
        self.methods = self._checked_methods()
        self.elsewhere = [Hardware(**card) for card in settings["hardware"] if card["name"] != THIS]
        _check_batch(self.protocol, self.elsewhere)
        self.on_gpu = torch.cuda.is_available() and not str(settings["model"]["device"]).startswith("cpu")
        self.machine = provenance.hardware() | {"threads": torch.get_num_threads(), "torch": torch.__version__}
        self.folder = asks.folder_of(settings)
        self.store = Store(self.folder)
        Manifest(asks.ask_of(settings), [[row.label, row.keep] for row in self.rows]).write(self.folder)
        self.since = forced_since(settings["force"])
        self.failed = 0

    def _checked_methods(self) -> dict[Row, Method]:
        """Every row's method; refuses, before anything is written, what does not fit the model."""
        chosen, methods = self.settings["model"], {row: method_of(row) for row in self.rows}
        check_methods(methods.values(), config_of(chosen), model_path(place_of(chosen)))
        return methods

    # ------------------------------------------------------------------------------------------------------- cells
    def cell(
        self, row: Row, tokens: int, regime: str = "resident", card: Hardware | None = None, batch: int = 1
    ) -> Cell:
        """The cell of a method's row; a prediction is for the whole model on a card."""
        protocol = self.protocol
        model = {k: v for k, v in self.identity.items() if k != "num_layers"} if card else self.identity
        config = {
            "kind": "efficiency",
            "model": model,
            **method_identity(row),
            "benchmark": {"name": "efficiency", "data": "synthetic", "version": VERSION, "limit": None},
            "prompt": f"{protocol.before} + {self._image()} + {protocol.after} tokens",
            "generation": {"max_new_tokens": tokens, "engine": protocol.engine, "repeats": protocol.repeats}
            | ({} if protocol.ffn == "auto" else {"ffn": protocol.ffn})
            | ({} if batch == 1 else {"batch": batch}),
            "seed": self.settings["seed"],
            "regime": regime,
            "hardware": self._prediction_of(card) if card else self.machine,
        }
        labels = {"model": model_label(model), "method": row.label, "keep": row.keep}
        return Cell.of(config, **labels, benchmark="efficiency", data="synthetic")

    def _image(self) -> str:
        size = self.settings["model"].get("image_size")
        return "image" if size is None else f"image of {size[0]} x {size[1]} pixels"

    def measured_cells(self, row: Row) -> list[Cell]:
        """The cells of a method that are timed on this machine."""
        resident = [cell for batch in self.protocol.batch for cell in self.resident_cells(row, batch)]
        limited = [_limited(card) for card in self.elsewhere if self.on_gpu]
        return resident + [
            self.cell(row, tokens, regime) for regime in limited for tokens in self.protocol.output_tokens
        ]

    def resident_cells(self, row: Row, batch: int) -> list[Cell]:
        """The cells of a method that are timed at a batch size with everything resident."""
        return [self.cell(row, tokens, batch=batch) for tokens in self.protocol.output_tokens]

    def cells(self, row: Row) -> list[Cell]:
        """Every cell of a method: measured, then predicted."""
        return self.measured_cells(row) + [
            self.cell(row, tokens, "predicted", card)
            for card in self.elsewhere
            for tokens in self.protocol.output_tokens
        ]

    def is_done(self, row: Row) -> bool:
        return self._are_done(self.cells(row))

    def _are_done(self, cells: Sequence[Cell]) -> bool:
        records = [self.store.read(cell.id) for cell in cells]
        return all(
            record is not None and record["status"] == "done" and begun(record) >= self.since for record in records
        )

    def _prediction_of(self, card: Hardware) -> dict[str, Any]:
        """What a prediction rests on: the card's figures, and the layers that were traced."""
        return {"predicted_for": asdict(card), "traced_layers": self.identity.get("num_layers")}

    # --------------------------------------------------------------------------------------------------- measuring
    def prepare(self, pending: list[Row]) -> None:
        """Load the model, measure the machine's peaks and the ways of computing chosen neurons."""
        keep_freed_memory()
        chosen = self.settings["model"]
        self.model, _ = load_chosen(chosen, self.identity["dtype"], self.settings["seed"])
        geometry = family_of(self.model.config).geometry(self.model.config)
        self.dense = build_method("dense")
        self.peaks = measure_peaks(self.model.device, self.model.dtype)
        print(
            f"  measured peaks: copy {self.peaks.copy_bandwidth / 1e9:.1f} GB/s, "
            f"read {self.peaks.read_bandwidth / 1e9:.1f} GB/s, matrix product {self.peaks.flops / 1e12:.3g} TFLOP/s"
        )
        self.known = calibration_of(self.model)
        depth = geometry.depth
        if depth < (chosen["layers"] or depth):
            print(f"  {depth} of {chosen['layers']} decoder layers: measured times are of the slice")
        if any("neurons" in method.acts_on for method in self.methods.values()):
            decoder: Any = family_of(self.model.config).decoder(self.model)
            print(f"  core neurons, keep 0.4: {measured_ways(decoder.layers[0].mlp, 0.4)}")
        if self.elsewhere and not self.on_gpu:
            names = ", ".join(card.name for card in self.elsewhere)
            print(f"  no GPU: what the memory of {names} allows is predicted, not run")

    def measure(self, row: Row) -> None:
        """Measure one method in every regime asked for, and store its cells."""
        started = datetime.now(UTC)
        method, protocol = self.methods[row], self.protocol
        try:
            for batch in protocol.batch:
                single = batch == 1 and bool(self.elsewhere)
                if not single and self._are_done(self.resident_cells(row, batch)):
                    continue
                inputs = self._prompts(batch)
                resident = measure(self.model, self.dense, method, inputs, protocol, self.peaks, self.known)
                self._write(row, resident, started, batch=batch)
                for card in self.elsewhere if single else ():
                    if self.on_gpu:
                        limited = measure_offloaded(self.model, method, inputs, protocol, self.peaks, card.memory)
                        self._write(row, limited, started, _limited(card))
                    self._write_predictions(row, resident, started, card)
        except Exception as error:  # whatever went wrong belongs to this method, and the others go on
            self.failed += 1
            print(neutral(f"  {row.label} failed: {type(error).__name__}: {error}"))
            for cell in self.cells(row):
                if (self.store.read(cell.id) or {}).get("status") != "done":
                    self._store(cell, started, {"status": "failed", "error": describe(error)})

    def _prompts(self, batch: int) -> dict[str, Tensor]:
        before, after, size = self.protocol.before, self.protocol.after, self.settings["model"].get("image_size")
        return fixed_batch(self.model, batch, before, after, size=size)

    def _write(self, row: Row, measured: Measured, started: datetime, regime: str = "resident", batch: int = 1) -> None:
        for tokens, bench in measured.rows.items():
            done = result(bench, measured.samples, self.model.config)
            self._store(self.cell(row, tokens, regime, batch=batch), started, done)

    def _write_predictions(self, row: Row, measured: Measured, started: datetime, card: Hardware) -> None:
        depth, lengths = self.settings["model"]["layers"] or 0, self.protocol.output_tokens
        dense = measured.pair.dense[-1].trace
        found = predicted_rows(self.model.config, measured.trace, dense, lengths, card, depth)
        for tokens, bench in found.rows.items():
            self._store(self.cell(row, tokens, "predicted", card), started, result(bench, [found.trace], found.config))

    def _store(self, cell: Cell, started: datetime, done: dict[str, Any]) -> None:
        seconds = (datetime.now(UTC) - started).total_seconds()
        peaks = {"bandwidth": self.peaks.bandwidth, "flops": self.peaks.flops}
        record = new_record(cell, "efficiency", started, seconds, done, hardware=self.machine, peaks=peaks)
        self.store.write(record)

    # ------------------------------------------------------------------------------------------------------- table
    def conclude(self, changed: bool) -> int:
        """Publish what changed, then write and print the table of this experiment's rows."""
        if self.settings["report"] and (changed or outdated(self.store)):
            publish_run(self.folder, print, lambda make: None)
        cells = [cell for row in self.rows for cell in self.cells(row)]
        show_table(self.store, cells, list(filter(None, [small_note(self.settings, answers=False)])))
        if self.failed:
            print(f"{self.failed} methods failed; tracebacks are in {self.store.cells}/<id>/cell.json")
        self.store.upload()
        return 1 if self.failed else 0


def result(bench: dict[str, Any], samples: Sequence[SampleTrace], config: Any) -> dict[str, Any]:
    """What a finished row, with the traces of its batch, adds to its record."""
    from corematching.answering.generator import Answer
    from corematching.evaluation.trace_summary import summarise

    tokens = bench["output_tokens"]
    summary = summarise([Answer("", tokens, sample.stopped_after(tokens - 1)) for sample in samples], config)
    return {"status": "done", "bench": bench, "trace": summary}


def show_table(store: Store, cells: Sequence[Cell], told: Sequence[str]) -> None:
    """Write and print the table of those cells that are done."""
    records = [record for record in (store.read(cell.id) for cell in cells) if record is not None]
    table = run_table([record for record in records if record["status"] == "done"], told)
    table.write(store.root)
    print_rows(table)
    print(f"table: {store.root / 'table.md'}, {store.root / 'table.csv'}")


def method_of(row: Row) -> Method:
    """The method of a line of the table.

    Raises
    ------
    UserError
        For a parameter out of range.
    """
    parameters = dict(row.parameters)
    second = parameters.pop("with", None)
    method = build_method(row.method, **parameters)
    if second is None:
        return method
    second = dict(second)
    return compose(method, build_method(second.pop("name"), **second))


def _check_batch(protocol: Protocol, cards: Sequence[Hardware]) -> None:
    if cards and 1 not in protocol.batch:
        raise UserError(
            f"batch={list(protocol.batch)} is not valid with hardware={cards[0].name}: rows of other hardware are of"
            " single prompts; add 1 to the batch sizes, or leave hardware out"
        )


def _limited(card: Hardware) -> str:
    return f"offloaded ({card.memory / 1e9:g} GB)"
