"""Rows: bad data is told in one line, limits keep together what is scored together, old caches are never read."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corematching.benchmarks import DataSource, load_benchmark, load_source
from corematching.benchmarks.mini.writers import write_mini
from corematching.benchmarks.rows import load_images, load_rows
from corematching.benchmarks.spec import ROW
from corematching.errors import UserError

datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("suite")
    write_mini(root, 56, 0, ["POPE", "MME", "MMBench", "VQAv2", "GQA", "SEED-Bench"])
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CM_CACHE", str(tmp_path / "cache"))


def load(name: str, root: Path, limit: int | None = None, part: int = 0):
    benchmark = load_benchmark(name)
    return load_rows(benchmark, benchmark.parts[part], root, limit)


def damaged(suite: Path, tmp_path: Path, file: str, change) -> Path:
    """A copy of one file with its table changed; returns the dataset folder."""
    table = change(pq.read_table(suite / file))
    target = tmp_path / file
    target.parent.mkdir(parents=True)
    pq.write_table(table, target)
    return tmp_path / Path(file).parts[0]


def set_value(column: str, row: int, value):
    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[row] = value
        field = table.schema.field(column)
        return table.set_column(table.column_names.index(column), field, pa.array(values, field.type))

    return change


def broken_text(column: str, row: int):
    """Bytes that are no UTF-8, as a damaged file has them in a column of texts."""

    def change(table: pa.Table) -> pa.Table:
        values = [text.encode() for text in table[column].to_pylist()]
        values[row] = b"\xff\xfe"
        texts = pa.array(values, pa.binary()).view(pa.string())
        return table.set_column(table.column_names.index(column), table.schema.field(column), texts)

    return change


POPE = "POPE/Full/adversarial-00000-of-00001.parquet"
MME = "MME/data/test-00000-of-00001.parquet"
VQA = "VQAv2/data/validation-00000-of-00001.parquet"


@pytest.mark.parametrize(
    ("name", "file", "change", "told"),
    [
        ("pope", POPE, lambda t: t.drop_columns("answer"), "split adversarial: column answer is missing; the columns"),
        ("pope", POPE, lambda t: t.slice(0, 0), "split adversarial: no rows"),
        ("pope", POPE, set_value("answer", 3, "maybe"), "row 3, column answer: 'maybe' is not one of yes, no"),
        ("pope", POPE, set_value("question", 5, None), "row 5, column question: no value"),
        ("pope", POPE, broken_text("question", 4), "row 4, column question: the text is not UTF-8"),
        ("vqav2", VQA, set_value("answers", 2, [None]), "row 2, column answers: one of its values is missing"),
        (
            "pope",
            POPE,
            lambda t: t.set_column(t.column_names.index("answer"), "answer", pa.array(range(len(t)))),
            "column answer: expected text, found int64",
        ),
        (
            "mme",
            MME,
            lambda t: t.slice(1),
            "row 0, column question_id: existence/existence/000001.png has 1 question(s)",
        ),
        (
            "vqav2",
            VQA,
            lambda t: t.set_column(
                t.column_names.index("answers"), "answers", pa.array([[{"answer": "red"}] * 10] * len(t))
            ),
            "column answers: expected records with answer, answer_id, found list",
        ),
    ],
)
def test_bad_data_is_one_line(suite: Path, tmp_path: Path, name: str, file: str, change, told: str) -> None:
    with pytest.raises(UserError) as error:
        load(name, damaged(suite, tmp_path, file, change))
    assert told in str(error.value)
    assert "lmms-lab-encoder/" in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_image_names_its_row_in_the_whole_split(suite: Path, tmp_path: Path) -> None:
    broken = damaged(suite, tmp_path, POPE, set_value("image", 7, {"bytes": b"not an image", "path": None}))
    rows = load("pope", broken, limit=10)
    assert rows[6]["image"].size == (336, 336)
    with pytest.raises(UserError, match=r"split adversarial, row 7, column image: the image cannot be decoded$"):
        rows[7]


def test_truncated_image_in_a_list_is_found(suite: Path, tmp_path: Path) -> None:
    file = "SEED-Bench/data/test-00000-of-00001.parquet"
    whole = pq.read_table(suite / file)["image"][9].as_py()
    cut = [*whole[:-1], {"bytes": whole[-1]["bytes"][:500], "path": None}]
    rows = load("seedbench", damaged(suite, tmp_path, file, set_value("image", 9, cut)))
    with pytest.raises(UserError, match=r"row 9, column image: the image cannot be decoded$"):
        rows[9]


def test_unreadable_and_missing_files(suite: Path, tmp_path: Path) -> None:
    file = tmp_path / POPE
    file.parent.mkdir(parents=True)
    file.write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match=r"adversarial-00000-of-00001.parquet is not a readable parquet file"):
        load("pope", tmp_path / "POPE")
    with pytest.raises(UserError, match=r"split popular: no file matches Full/popular-\*.parquet"):
        load("pope", tmp_path / "POPE", part=1)


def test_rewritten_file_is_read_anew(suite: Path, tmp_path: Path) -> None:
    """The trap: datasets' own cache gave the old rows for a rewritten folder, or for one with the same name."""
    root = damaged(suite, tmp_path, POPE, lambda table: table.slice(0, 4))
    assert len(load("pope", root)) == 4
    (tmp_path / POPE).unlink()
    pq.write_table(pq.read_table(suite / POPE).slice(0, 6), tmp_path / POPE)
    assert len(load("pope", root)) == 6
    assert len(load("pope", suite / "POPE")) == 20


def test_limit_keeps_mme_pairs_and_sees_every_subtask(suite: Path) -> None:
    rows = load("mme", suite / "MME", limit=27)
    assert len(rows) == 28
    assert len(set(rows["category"])) == 14
    ids = list(rows["question_id"])
    assert all(ids.count(name) == 2 for name in ids)


def test_limit_keeps_mmbench_rotations(suite: Path) -> None:
    indices = list(load("mmbench", suite / "MMBench", limit=10)["index"])
    assert len(indices) == 12
    questions = [index % 1_000_000 for index in indices]
    assert all(questions.count(question) == 4 for question in questions)


def test_limit_reads_only_the_shards_it_needs(suite: Path, tmp_path: Path) -> None:
    table = pq.read_table(suite / POPE)
    for shard in range(4):
        file = tmp_path / "POPE" / "Full" / f"adversarial-0000{shard}-of-00004.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(5 * shard, 5), file)
    rows = load("pope", tmp_path / "POPE", limit=6)
    assert list(rows["question"]) == table["question"].to_pylist()[:6]
    assert list(rows[ROW]) == list(range(6))
    assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.arrow")) < 1.4 * table.slice(0, 10).nbytes
    assert list(load("pope", tmp_path / "POPE")["question"]) == table["question"].to_pylist()


def test_gqa_images_are_found_by_id(suite: Path) -> None:
    benchmark = load_benchmark("gqa")
    images, row_of = load_images(benchmark, benchmark.images, suite / "GQA")
    assert len(images) == len(row_of) == 28
    assert images[row_of["n000000"]]["image"].size == (336, 336)


def test_sources_refuse_what_they_cannot_do() -> None:
    for call, told in [
        (lambda: load_source("imagenet"), "unknown data 'imagenet'; valid data: mini, hub"),
        (
            lambda: load_source("mini", size=3),
            "unknown data parameter 'size' for mini; valid parameters: name, n, seed",
        ),
        (lambda: load_source("mini", n=0), "data.n=0 is not usable"),
        (lambda: DataSource("mini", n="many"), "data.n='many' is not usable"),
        (lambda: load_benchmark("gqqa"), "unknown benchmark 'gqqa'; valid benchmarks: vqav2, gqa"),
        (
            lambda: load_benchmark("gqa").prompt("chat"),
            "unknown prompt 'chat' for benchmark gqa; valid prompts: llava15",
        ),
    ]:
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value).startswith(told)


def test_mini_source_repairs_damage_and_keeps_its_version(tmp_path: Path) -> None:
    source, benchmark = load_source("mini", n=6), load_benchmark("pope")
    root = source.root(benchmark)
    version = source.version(benchmark)
    file = root / "Full" / "random-00000-of-00001.parquet"
    good = file.read_bytes()
    stamp = (root / "manifest.json").stat().st_mtime_ns
    assert source.root(benchmark) == root
    assert (root / "manifest.json").stat().st_mtime_ns == stamp, "intact data was written again"
    file.write_bytes(good[:-100])
    assert source.root(benchmark) == root
    assert file.read_bytes() == good
    assert source.version(benchmark) == version
    assert load_source("mini", n=6, seed=1).version(benchmark) != version
    assert load_source("mini", n=12).root(benchmark) != root
    assert json.loads((root / "manifest.json").read_text())["files"]["Full/random-00000-of-00001.parquet"]["rows"] == 2
