"""Tables on terminals and in logs: no number is ever cut, whatever the width."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from rich.cells import cell_len

from corematching.efficiency.table import run_table
from corematching.results.table import build_table
from corematching.results.terminal import lay_out, lines_of

BENCHMARKS = ["vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "seedbench", "mmvet"]
LABELS = ["dense", "random (layer 2)", "score: last-token co-activation with a long name", "核心神经元 核心神经元"]
WIDTHS = (60, 80, 120, 200)


def records(benchmarks=BENCHMARKS):
    """Four methods, some with two seeds, every number different."""
    made, number = [], 0
    for label in LABELS:
        for benchmark in benchmarks:
            for seed in (0, 1) if "random" in label else (0,):
                number += 1
                name = "dense" if label == "dense" else "fastv"
                made.append(
                    {
                        "labels": {"method": label, "keep": None if name == "dense" else 64, "benchmark": benchmark},
                        "config": {"method": {"name": name, "seed": seed}},
                        "status": "done",
                        "score": {"value": 10.1 + number, "note": ""},
                        "trace": {
                            "visual_tokens_per_layer": 100.0 + number,
                            "kv_bytes": 1e6 * number,
                            "flops": {"total": 1e9 * (1234 + number)},
                            "generated_tokens": 2.0,
                            "capped_answers": 4 if benchmark == "mmbench" and label == LABELS[2] else 0,
                            "ended_answers": 4 if benchmark == "mmbench" and label == LABELS[2] else 8,
                            "cap": 1024,
                        },
                    }
                )
    return made


def efficiency_records():
    made = []
    for place, (name, keep) in enumerate([("dense", None), ("core_neurons", 0.4)]):
        bench = {
            "regime": "offloaded (12 GB)",
            "predicted": False,
            "engine": "compiled",
            "dense_engine": "eager",
            "output_tokens": 128,
            "prefill_ms": 12345.6 + place,
            "prefill_ms_iqr": 3.2,
            "decode_ms_per_token": 123.45 + place,
            "end_to_end_ms": 98765.4 + place,
            "paired_speedup": 1.25 + place,
            "paired_speedup_iqr": 0.02,
            "peak_memory_bytes": 13.37e9,
            "kv_bytes": 31.4e6,
            "repeats": 10,
        }
        labels = {"method": name, "keep": keep, "model": "m"}
        made.append({"labels": labels, "config": {"method": {"name": name}}, "bench": bench})
    return made


def tables():
    return {"accuracy": build_table(records(), BENCHMARKS, []), "efficiency": run_table(efficiency_records())}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["accuracy", "efficiency"])
def test_every_number_is_whole_at_every_width(kind, width):
    table = tables()[kind]
    layout = lay_out(table.columns, table.rows, width)
    lines = lines_of(table, layout)
    assert max(map(cell_len, lines)) <= width
    shown = {place for block in layout.blocks for place in block}
    numbers = [place for place, column in enumerate(table.columns) if column.role != "label"]
    assert {table.columns[place].role for place in set(numbers) - shown} <= {"cost"}
    words = "\n".join(lines)
    for row in table.rows:
        for place in set(numbers) & shown:
            assert row[place] in words
    # Each block repeats what its numbers belong to.
    labels = [place for place, column in enumerate(table.columns) if column.role == "label"]
    assert all(list(block[: len(labels)]) == labels for block in layout.blocks)


def test_costs_go_before_benchmarks_part():
    table = build_table(records(BENCHMARKS[:3]), BENCHMARKS[:3], [])
    wide, narrower, narrow = (lay_out(table.columns, table.rows, width) for width in (200, 100, 60))
    assert (len(wide.blocks), wide.dropped) == (1, ())
    assert len(narrower.blocks) == 1
    assert narrower.dropped
    assert set(narrower.dropped) <= {"tokens/layer", "KV MB", "GFLOPs"}
    assert len(narrow.blocks) > 1
    assert len(narrow.dropped) == 3


def test_a_log_has_no_edge():
    table = build_table(records(), BENCHMARKS, [])
    assert lay_out(table.columns, table.rows, None).blocks == (tuple(range(len(table.columns))),)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import test_terminal
from rich.console import Console
from corematching.results.terminal import show
for table in test_terminal.tables().values():
    show(table, Console(highlight=False))
"""


def printed(width):
    """What a program prints on a pseudo-terminal of so many columns; in a pipe for None."""
    words = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "NO_COLOR": "1"}
    environment.pop("COLUMNS", None)
    if width is None:
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    process = subprocess.Popen(words, env=environment, stdout=slave, stderr=slave, stdin=slave)
    os.close(slave)
    chunks = []
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux says EIO at the end
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(master)
    assert process.wait() == 0, b"".join(chunks).decode()
    return b"".join(chunks).decode().replace("\r\n", "\n")


@pytest.mark.parametrize("width", [*WIDTHS, None])
def test_a_real_terminal_shows_all_scores(width):
    out = printed(width)
    assert "…" not in out
    for table in tables().values():
        for row in table.rows:
            for text, column in zip(row, table.columns, strict=True):
                if column.role == "number":
                    assert text in out
    assert "WARNING: Answers that ran into the cap" in out
    assert "4 of 8 (cap 1024)" in out
    assert "WARNING: offloaded (12 GB)" in out, "dense against itself is off by 25 %"
    assert "98766.4" in out


def test_seeds_share_a_line_with_their_spread():
    table = build_table(records(["gqa"]), ["gqa"], [])
    row = next(row for row in table.rows if row[0] == "random (layer 2)")
    assert row[2] == "12.6 ±0.7"  # 12.1 and 13.1
    assert any("over seeds: random (layer 2) (2)" in note for note in table.notes)
    assert len(table.rows) == len(LABELS)
