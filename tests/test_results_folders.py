"""Two folders' differences, cell by cell."""

import numpy as np
import pytest
from synthetic_store import cell_config, cell_record, samples_table, write_cell

from corematching.commands import compare_command
from corematching.errors import UserError
from corematching.results.folders import compare_folders


def write(folder, method, keep, scores, *, tokens=16, doc_offset=0, answers=None, **options):
    config = {**cell_config(method, keep, "gqa", len(scores), **options), "generation": {"max_new_tokens": tokens}}
    table = samples_table(np.asarray(scores, dtype=float))
    table = table.set_column(0, "doc_id", [np.arange(len(scores)) + doc_offset])
    words = [str(score) for score in scores] if answers is None else answers
    table = table.set_column(table.column_names.index("prediction"), "prediction", [words])
    write_cell(folder, cell_record(config, value=100 * float(np.mean(scores)), n=len(scores)), table)


def texts(table):
    return [[entry.text for entry in row.entries] for row in table.rows]


def test_differences_with_intervals_and_tests(tmp_path):
    right = np.repeat([1, 0], [40, 20])
    fewer = np.where(np.arange(60) < 12, 0, right)
    for folder, scores, tokens in (("a", right, 16), ("b", fewer, 32)):
        write(tmp_path / folder, "dense", None, right, tokens=tokens)
        write(tmp_path / folder, "fastv", 64, scores, tokens=tokens)
    write(tmp_path / "a", "random", 64, right)
    table = compare_folders(tmp_path / "a", tmp_path / "b")
    dense, fastv = texts(table)
    assert dense[:6] == ["GQA", "dense", "all", "66.7", "66.7", "0.0"]
    assert fastv[:6] == ["GQA", "fastv", "64", "66.7", "46.7", "-20.0"]
    low, high = (float(bound) for bound in fastv[6].split(" to "))
    assert -35 < low < -20 < high < 0
    assert fastv[7:9] == ["12", "0"]
    assert float(fastv[9]) == pytest.approx(2 * 0.5**12, rel=0.02)
    assert float(fastv[10]) == pytest.approx(4 * 0.5**12, rel=0.02)
    assert any("generation.max_new_tokens (16, 32)" in note for note in table.notes)
    assert "Only in a: 1 cells (random 64)." in table.notes


def test_other_questions_are_not_paired(tmp_path):
    write(tmp_path / "a", "dense", None, [1, 0, 1, 0])
    write(tmp_path / "b", "dense", None, [1, 0, 1, 1], tokens=32, doc_offset=7)
    (row,) = compare_folders(tmp_path / "a", tmp_path / "b").rows
    assert row.entries[5].text == "25.0"
    assert "other questions" in row.entries[6].reason


def test_answers_that_read_differently_are_counted_right_or_wrong(tmp_path):
    write(tmp_path / "a", "dense", None, [1, 0, 1, 0], answers=["yes", "cat", "no", "dog"])
    write(tmp_path / "b", "dense", None, [1, 0, 1, 0], tokens=32, answers=["yes", "cow", "no", "dog"])
    (row,) = texts(compare_folders(tmp_path / "a", tmp_path / "b"))
    assert (row[5], row[11]) == ("0.0", "25.0")


def test_two_models_are_compared_and_named(tmp_path):
    for model in ("tiny", "other"):
        write(tmp_path / model, "dense", None, [1, 0, 1, 0], model=model)
    table = compare_folders(tmp_path / "tiny", tmp_path / "other")
    assert "model: tiny in tiny, other in other." in table.notes
    write(tmp_path / "third", "fastv", 64, [1, 0, 1, 0])
    with pytest.raises(UserError, match="no cell in common"):
        compare_folders(tmp_path / "tiny", tmp_path / "third")


def test_command_line(tmp_path, capsys):
    for folder, tokens in (("a", 16), ("b", 32)):
        write(tmp_path / folder, "dense", None, [1, 0, 1, 0], tokens=tokens)
    assert compare_command([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]) == 0
    assert "| GQA | dense | all | 50.0 | 50.0 | 0.0 |" in capsys.readouterr().out
    assert (tmp_path / "out" / "comparison.csv").is_file()
    assert compare_command([str(tmp_path / "a"), str(tmp_path / "nowhere")]) == 2
