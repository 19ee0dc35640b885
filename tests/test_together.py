"""Cells answered together: the same records as one by one, failures and resuming cell by cell, less work."""

import shutil
from types import SimpleNamespace

import pytest
from small_llava import save_small_llava

from corematching import cli
from corematching.answering.generator import Generator
from corematching.answering.prompts import Question
from corematching.evaluation.attempt import companies
from corematching.evaluation.cells import Cell
from corematching.evaluation.sheet import Sheet
from corematching.results.store import Store


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Command-line words of a small real sweep."""
    return [
        *(
            "name=quickstart",
            "methods=[dense,random,visionzip,fastv,{name: core_neurons, keep: 0.4}]",
            "keep=[16]",
            "benchmarks=[gqa]",
        ),
        *("data=mini", "data.n=8", "limit=6", "report=false", "tracking=none", "model=tiny", "seed=3"),
        *("generation.max_new_tokens=3", "model.visual_tokens=64"),
        f"model.path={save_small_llava(tmp_path_factory.mktemp('model'))}",
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def run(words, cache, tmp_path, monkeypatch):
    """Run the sweep into a folder; returns its exit status, its records and its rows, both by method."""
    monkeypatch.setenv("CM_CACHE", cache)

    def run(folder, *more):
        status = cli.main([*words, f"results_dir={tmp_path / folder}", *more])
        store = Store(tmp_path / folder / "quickstart")
        records = {record["labels"]["method"]: record for record in store.records()}
        done = [name for name, record in records.items() if record["status"] == "done"]
        return status, records, {name: store.samples(records[name]["id"]) for name in done}

    return run


def test_cells_are_stored_as_if_run_alone(run, monkeypatch):
    towers = []

    def counted(self, batch, method, sharing, generate=Generator._generate):
        known = {"features", "tower"} & set(sharing.memory)
        answers = generate(self, batch, method, sharing)
        towers.append(not known)
        return answers

    monkeypatch.setattr(Generator, "_generate", counted)
    status, alone, alone_rows = run("alone", "together=1")
    assert (status, len(alone), sum(towers)) == (0, 5, 5)
    towers.clear()
    status, records, rows = run("together")
    assert status == 0
    assert sum(towers) == 1, "the vision tower ran again"
    for name, record in records.items():
        apart = ("timing", "provenance", "checksums")
        own, other = ({k: v for k, v in one.items() if k not in apart} for one in (record, alone[name]))
        assert own == other
        assert rows[name].equals(alone_rows[name])
        assert record["timing"]["cells_together"] == 5
        assert alone[name]["timing"]["cells_together"] == 1
        assert 0 < record["timing"]["model_seconds"] <= record["timing"]["seconds"]
    # Shares follow from the work that each would be alone.
    work = {name: record["timing"]["model_seconds"] for name, record in records.items()}
    flops = {name: record["trace"]["flops"]["total"] for name, record in records.items()}
    assert work["visionzip"] / work["dense"] == pytest.approx(flops["visionzip"] / flops["dense"])


def test_a_method_that_fails_fails_its_own_cell_and_resumes_alone(run, monkeypatch, tmp_path):
    def broken(self, batch, method, sharing, generate=Generator._generate):
        if method.name == "visionzip":
            raise ArithmeticError("not today")
        return generate(self, batch, method, sharing)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "_generate", broken)
        status, records, _ = run("results")
    assert status == 1
    assert {name for name, record in records.items() if record["status"] == "failed"} == {"visionzip"}
    assert records["visionzip"]["error"]["message"] == "not today"
    cells = tmp_path / "results/quickstart/cells"
    shutil.rmtree(cells / records["fastv"]["id"])
    before = {folder.name: (folder / "cell.json").stat().st_mtime_ns for folder in cells.iterdir()}
    status, again, _ = run("results")
    assert status == 0
    after = {folder.name: (folder / "cell.json").stat().st_mtime_ns for folder in cells.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {
        records[name]["id"] for name in ("visionzip", "fastv")
    }
    assert again["fastv"]["trace"] == records["fastv"]["trace"]


def test_an_interrupt_while_answering_together_leaves_no_claim(run, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "_generate", interrupted)
        assert run("results")[0] == 130
    assert not list((tmp_path / "results/quickstart/claims").iterdir())
    assert run("results")[0] == 0


@pytest.mark.slow
def test_workers_without_a_cell_share_its_questions(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    apart = ("methods=[fastv]", "controls=false")
    _, alone, alone_rows = run("alone", *apart)
    status, records, rows = run("shards", *apart, "executor=processes", "executor.workers=3")
    assert status == 0
    assert records["fastv"]["trace"] == alone["fastv"]["trace"]
    assert records["fastv"]["score"] == alone["fastv"]["score"]
    assert rows["fastv"].equals(alone_rows["fastv"])
    assert not list((tmp_path / "shards/quickstart/shards").iterdir())


class _Counting:
    """Stands in for a generator: answers with the method's name and a counter."""

    def __init__(self, whole=None):
        self.calls, self.whole = [], whole
        self.model = None

    def answer(self, questions, method, on_done):
        self.calls.append(method)
        return [f"{method} {len(self.calls)}"] * len(questions)

    def answer_together(self, questions, methods, on_done):
        raise self.whole


@pytest.mark.parametrize("settings", [{"do_sample": True, "temperature": 0.7}, {}])
def test_what_cannot_be_answered_together_is_asked_one_by_one(settings):
    generator = _Counting(whole=ValueError("a picture is broken"))
    questions = [Question("What?", list, dict(settings))]
    sheet = Sheet(generator, ["a", "b"])
    assert [sheet.column(number)(questions, print)[0] for number in (0, 1)] == [["a 1"], ["b 2"]]
    assert sheet.column(0)(questions, print)[1].cells == 1
    assert generator.calls == ["a", "b", "a"]


def test_a_sheet_holds_what_was_answered_together_until_it_is_read():
    generator = _Counting()
    answers = [SimpleNamespace(trace=None)]
    generator.answer_together = lambda questions, methods, on_done: [answers, ValueError("no such layer"), answers]
    generator.model = SimpleNamespace(config=None)
    sheet = Sheet(generator, ["a", "b", "c"])
    assert [sheet.holds(number) for number in range(3)] == [False] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corematching.evaluation.sheet.flops", lambda config, traces: SimpleNamespace(total=1.0))
        sheet.column(0)([Question("What?", list, {})], print)
    assert [sheet.holds(number) for number in range(3)] == [False, False, True]


def test_companies_differ_in_their_methods_only():
    cells = [
        Cell.of({"method": {"name": method}, "benchmark": {"name": benchmark}, "seed": 0})
        for method in "abc"
        for benchmark in "xy"
    ]
    parts = list(companies(cells, 2))
    assert sorted(map(len, parts)) == [1, 1, 2, 2]
    assert all(len({cell.config["benchmark"]["name"] for cell in part}) == 1 for part in parts)
    assert sorted(cell.id for part in parts for cell in part) == sorted(cell.id for cell in cells)
