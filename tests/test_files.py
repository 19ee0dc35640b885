"""Files and caches on a file system that refuses: whole or not at all, and one line that says why."""

from __future__ import annotations

import errno
import os

import pytest

from corematching import files
from corematching.benchmarks import load_benchmark, load_source
from corematching.errors import UserError
from corematching.results import render
from corematching.results.table import METHOD, RunTable
from corematching.results.tables import Table


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "table.md"
    files.write(path, "one")
    files.write(path, "zwei €")
    assert path.read_text(encoding="utf-8") == "zwei €"
    assert [entry.name for entry in path.parent.iterdir()] == ["table.md"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask(), "as readable as any other file"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("step", ["sync", "os.replace", "Path.write_bytes"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = files.write(tmp_path / "table.md", "old")
    monkeypatch.setattr(f"corematching.files.{step}", full_disk)
    with pytest.raises(UserError, match=r"table\.md' \(No space left on device\)") as error:
        files.write(path, "new")
    assert "\n" not in str(error.value)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.md"]


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path):
    path = files.write(tmp_path / "figure.png", "old")

    def draw() -> None:
        with files.replacing(path) as temporary:
            assert temporary.suffix == ".png"
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw()
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_in_the_way_is_one_line(tmp_path):
    (tmp_path / "table.md").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "table.md", tmp_path / "file" / "table.md"):
        with pytest.raises(UserError, match="cannot write"):
            files.write(path, "x")


def test_text_that_is_no_unicode_is_written_escaped(tmp_path):
    assert files.write(tmp_path / "a", "x\udc80").read_text() == "x\\udc80"


def test_tables_are_written_so(tmp_path, monkeypatch):
    table = RunTable((METHOD,), (("dense",),), ())
    table.write(tmp_path)
    monkeypatch.setattr(files, "sync", full_disk)
    with pytest.raises(UserError, match="No space"):
        table.write(tmp_path)
    with pytest.raises(UserError, match="No space"):
        render.write([Table("t", "title", "caption", (), ())], tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["table.csv", "table.md"]


@pytest.mark.parametrize("how", ["a file in its place", "full"])
def test_an_unusable_cache_folder_is_one_line(tmp_path, monkeypatch, how):
    cache = tmp_path / "cache"
    monkeypatch.setenv("CM_CACHE", str(cache))
    if how == "full":
        monkeypatch.setattr("corematching.benchmarks.mini.files.os.rename", full_disk)
    else:
        cache.write_text("")
    with pytest.raises(UserError, match=r"set CM_CACHE to a folder") as error:
        load_source("mini", n=4).version(load_benchmark("gqa"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("manifest", ["[]", '{"files": 5}', '{"files": {}}', "[" * 100_000, '{"files": {"a": 1}}'])
def test_a_cache_with_a_malformed_manifest_is_made_again(tmp_path, monkeypatch, manifest):
    monkeypatch.setenv("CM_CACHE", str(tmp_path))
    source, benchmark = load_source("mini", n=4), load_benchmark("gqa")
    version = source.version(benchmark)
    (path,) = tmp_path.rglob("manifest.json")
    path.write_text(manifest)
    assert source.version(benchmark) == version
