"""Answers side by side: marks, scores, thumbnails, and answers that run away; columns that say one thing."""

import numpy as np
import pytest
from PIL import Image
from synthetic_store import cell_config, cell_record, samples_table, write_cell, write_store

from corematching.inspection import thumbnails
from corematching.results.aggregate import aggregate
from corematching.results.answers import LONGEST, disagreements, shortened
from corematching.results.overlays import thumbnail_path
from corematching.results.report import write_report
from corematching.results.tables import Column, Row, Table, number, without_constants, word


@pytest.fixture
def experiment(tmp_path):
    """Dense is always right; a second method partly, and its answer to the last question never ends."""
    dense = samples_table(np.ones(4))
    partly = samples_table(np.array([1.0, 0.3, 0.0, 0.0]))
    place = partly.schema.get_field_index("prediction")
    partly = partly.set_column(place, "prediction", [["yes", "some", "yes", "A " * 1024]])
    write_cell(tmp_path / "e", cell_record(cell_config("dense", None, "gqa", 4), value=100.0, n=4), dense)
    write_cell(tmp_path / "e", cell_record(cell_config("fastv", 64, "gqa", 4), value=32.5, n=4), partly)
    return tmp_path / "e"


def test_answers_have_scores_and_marks(experiment):
    aggregation = aggregate([experiment])
    (block,) = disagreements(aggregation, aggregation.cells)
    assert block.labels == ("dense", "fastv · 64")
    given = [question.answers[1] for question in block.questions]
    assert [(one.mark, one.score) for one in given] == [("◐", "0.3"), ("✗", "0"), ("✗", "0")]
    assert {question.answers[0].mark for question in block.questions} == {"✓"}
    assert given[-1].whole == "A " * 1024
    assert given[-1].text.endswith("… (2,048 letters)")


def test_short_texts_stay_whole():
    assert shortened("x" * LONGEST) == "x" * LONGEST


def test_thumbnails_stand_beside_answers_where_they_were_recorded(experiment):
    report = experiment / "report.html"
    without = write_report(aggregate([experiment]), report, experiment / "overlays").read_text(encoding="utf-8")
    assert "data:image/jpeg" not in without
    path = thumbnail_path(experiment / "overlays", "gqa", 2)
    path.parent.mkdir(parents=True)
    Image.new("RGB", (20, 10), "red").save(path)
    page = write_report(aggregate([experiment]), report, experiment / "overlays").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == 1
    assert 'alt="image of question 2"' in page


def test_thumbnails_are_those_of_the_questions_shown(experiment, monkeypatch):
    class Task:
        def __init__(self):
            self.eval_docs = [{thumbnails.ROW: row, "picture": Image.new("L", (600, 300 + row))} for row in range(9)]

        def doc_to_visual(self, doc):
            return [doc["picture"]]

    source = type("Source", (), {"version": lambda self, benchmark: "v1"})
    monkeypatch.setattr(thumbnails, "load_source", lambda *_, **__: source())
    monkeypatch.setattr(thumbnails, "build_tasks", lambda *_, **__: [Task()])
    written = thumbnails.record_thumbnails(aggregate([experiment]), experiment / "overlays")
    assert sorted(path.name for path in written) == ["gqa-1.jpg", "gqa-2.jpg", "gqa-3.jpg"]
    with Image.open(written[0]) as picture:
        assert max(picture.size) == thumbnails.SIDE


def test_changed_data_gets_no_thumbnails(tmp_path):
    folder = write_store(tmp_path, methods=("dense", "fastv"), benchmarks=("gqa",), n=20)
    assert thumbnails.record_thumbnails(aggregate([folder]), folder / "overlays") == []


def test_columns_that_say_one_thing_go_to_the_caption():
    columns = (
        *(Column("model", "Model", numeric=False), Column("method", "Method", numeric=False)),
        *(Column("pairs", "Pairs"), Column("speed", "Speed", "higher")),
    )
    rows = tuple(Row((word("tiny"), word("fastv"), number(3, 0), number(1.0))) for _ in range(2))
    table = without_constants(Table("t", "T", "Caption.", columns, rows))
    assert [column.key for column in table.columns] == ["method", "pairs", "speed"]
    assert [len(row.entries) for row in table.rows] == [3, 3]
    assert table.caption == "Caption. In every row: Model tiny."
    single = Table("t", "T", "Caption.", columns, rows[:1])
    assert without_constants(single) is single
