"""The mini suite's files: deterministic, in the real schemas, balanced against guessing."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from corematching.benchmarks import BENCHMARKS, load_benchmark
from corematching.benchmarks.mini.files import intact
from corematching.benchmarks.mini.writers import WRITERS, write_mini
from corematching.benchmarks.rows import load_rows
from corematching.errors import UserError

N = 40


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("suite")
    write_mini(root, N, 0)
    return root


def rows_of(suite: Path, file: str) -> list[dict]:
    table = pq.read_table(suite / file)
    return table.drop_columns([name for name in ("image",) if name in table.column_names]).to_pylist()


@pytest.mark.parametrize("name", [*BENCHMARKS, "mmbench_cn", "vqav2_test"])
def test_every_benchmark_reads_its_files(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("CM_CACHE", str(tmp_path))
    benchmark = load_benchmark(name)
    parts = [load_rows(benchmark, part, suite / benchmark.folder) for part in benchmark.parts]
    assert N <= sum(map(len, parts)) <= N + 3 * len(parts)


def test_writing_twice_gives_the_same_bytes(suite: Path, tmp_path: Path) -> None:
    for folder in ("POPE", "SEED-Bench"):
        write_mini(tmp_path, N, 0, [folder])
        assert (tmp_path / folder / "manifest.json").read_text() == (suite / folder / "manifest.json").read_text()
    write_mini(tmp_path / "other", N, 1, ["POPE"])
    content = [
        json.loads((root / "POPE" / "manifest.json").read_text())["content"] for root in (suite, tmp_path / "other")
    ]
    assert content[0] != content[1]


def test_writing_over_other_contents_replaces_them(tmp_path: Path) -> None:
    for n in (12, 6):
        write_mini(tmp_path, n, 0, ["POPE"])
        assert len(rows_of(tmp_path, "POPE/data/test-00000-of-00001.parquet")) == n
    assert [path.name for path in tmp_path.iterdir()] == ["POPE"], "scratch folders were left behind"


def test_two_writers_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: write_mini(tmp_path, 6, 0, ["POPE"]), range(2)))
    assert intact(tmp_path / "POPE")
    assert [path.name for path in tmp_path.iterdir()] == ["POPE"]


def test_unknown_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the mini suite has no dataset 'COCO'; it has VQAv2, GQA"):
        write_mini(tmp_path, 4, 0, ["COCO"])


def test_gqa_questions_point_to_their_images(suite: Path) -> None:
    questions = rows_of(suite, "GQA/testdev_balanced_instructions/testdev-00000-of-00001.parquet")
    images = rows_of(suite, "GQA/testdev_balanced_images/testdev-00000-of-00001.parquet")
    assert {row["imageId"] for row in questions} == {row["id"] for row in images}


def test_images_are_asked_about_as_often_as_wanted(tmp_path: Path) -> None:
    write_mini(tmp_path, 60, 0, ["GQA"], per_image=20)
    questions = rows_of(tmp_path, "GQA/testdev_balanced_instructions/testdev-00000-of-00001.parquet")
    about = Counter(row["imageId"] for row in questions)
    assert list(about.values()) == [20, 20, 20]
    assert len({(row["imageId"], row["question"]) for row in questions}) == 60


def test_ten_annotators_agree_enough(suite: Path) -> None:
    for row in rows_of(suite, "VQAv2/data/validation-00000-of-00001.parquet"):
        assert sorted(answer["answer_id"] for answer in row["answers"]) == list(range(1, 11))
        assert [answer["answer"] for answer in row["answers"]].count(row["multiple_choice_answer"]) >= 7
    for row in rows_of(suite, "VizWiz-VQA/data/val-00000-of-00001.parquet"):
        assert len(row["answers"]) == 10
    assert all(row["answers"] is None for row in rows_of(suite, "VQAv2/data/test-00000-of-00001.parquet"))


def test_vizwiz_has_unanswerable_questions(suite: Path) -> None:
    kinds = Counter(row["category"] for row in rows_of(suite, "VizWiz-VQA/data/val-00000-of-00001.parquet"))
    assert 0.1 * N <= kinds["unanswerable"] <= 0.6 * N


def test_textvqa_answer_is_among_the_ocr_tokens(suite: Path) -> None:
    for row in rows_of(suite, "textvqa/data/validation-00000-of-00001.parquet"):
        answer = Counter(row["answers"]).most_common(1)[0][0]
        assert answer in row["ocr_tokens"] or row["question"].startswith("What color")


def test_pope_subsets_are_balanced(suite: Path) -> None:
    for subset in ("adversarial", "popular", "random"):
        rows = rows_of(suite, f"POPE/Full/{subset}-00000-of-00001.parquet")
        assert {row["category"] for row in rows} == {subset}
        assert Counter(row["answer"] for row in rows) == {"yes": len(rows) / 2, "no": len(rows) / 2}


def test_mme_has_pairs_over_fourteen_subtasks(suite: Path) -> None:
    rows = rows_of(suite, "MME/data/test-00000-of-00001.parquet")
    pairs = Counter((row["category"], row["question_id"]) for row in rows)
    assert set(pairs.values()) == {2}
    assert len({category for category, _ in pairs}) == 14
    for key in pairs:
        answers = [row["answer"] for row in rows if (row["category"], row["question_id"]) == key]
        assert sorted(answers) == ["No", "Yes"]
    assert all(row["question"].endswith(" Please answer yes or no.") for row in rows)


def test_mmbench_rotations_move_the_answer_with_its_option(suite: Path) -> None:
    for language in ("en", "cn"):
        rows = rows_of(suite, f"MMBench/{language}/dev-00000-of-00001.parquet")
        groups: dict[int, list[dict]] = {}
        for row in rows:
            groups.setdefault(row["index"] % 1_000_000, []).append(row)
        for group in groups.values():
            assert len({row[row["answer"]] for row in group}) == 1, "a rotation changed the right option"
            assert len({row["answer"] for row in group}) == len(group), "a letter was right twice"


def test_seedbench_videos_have_several_frames(suite: Path) -> None:
    table = pq.read_table(suite / "SEED-Bench/data/test-00000-of-00001.parquet").to_pylist()
    frames = {row["data_type"]: len(row["image"]) for row in table}
    assert frames == {"image": 1, "video": 3}
    for row in table:
        assert len({row[f"choice_{letter}"] for letter in "abcd"}) == 4


def test_mmvet_names_key_phrases_and_capabilities(suite: Path) -> None:
    rows = rows_of(suite, "MMVet/data/test-00000-of-00001.parquet")
    assert any("<AND>" in row["answer"] for row in rows)
    assert {name for row in rows for name in row["capability"].split(",")} <= {
        "rec",
        "ocr",
        "know",
        "gen",
        "spat",
        "math",
    }


def test_no_scene_serves_two_datasets(suite: Path) -> None:
    """Images are compared by their bytes over all datasets."""
    seen: dict[bytes, str] = {}
    for folder in WRITERS:
        for file in sorted((suite / folder).rglob("*.parquet")):
            if "image" not in pq.read_schema(file).names:
                continue
            for value in pq.read_table(file, columns=["image"])["image"].to_pylist():
                for image in value if isinstance(value, list) else [value]:
                    assert seen.setdefault(image["bytes"], folder) == folder
