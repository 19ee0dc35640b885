"""Results on an object store: whole cells or none there, nothing lost when it refuses, damage told and made good.

A real S3 server (moto's) runs in a thread; faults are put between it and the program.
"""

import json
import warnings

import pytest
from synthetic_store import cell_config, cell_record
from test_store import CELL, SAMPLES, record

from corematching import cli
from corematching.commands import aggregate_command
from corematching.errors import UserError
from corematching.results import remote
from corematching.results.remote import Remote
from corematching.results.store import Store

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("s3fs")


@pytest.fixture(scope="module")
def server():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    server.stop()


@pytest.fixture
def url(server, tmp_path, monkeypatch):
    """An experiment's URL on an empty S3 bucket."""
    import s3fs

    for name, value in (
        ("AWS_ENDPOINT_URL", server),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("CM_CACHE", str(tmp_path / "cache")),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{abs(hash(tmp_path)):x}"
    s3fs.S3FileSystem().mkdir(bucket)
    yield f"s3://{bucket}/results/run"
    s3fs.S3FileSystem.clear_instance_cache()


def another_machine(monkeypatch, tmp_path, name: str = "other") -> None:
    """From here on, the cache is an empty one."""
    monkeypatch.setenv("CM_CACHE", str(tmp_path / name))


def there(url: str) -> dict[str, bytes]:
    file_system, root = fsspec.core.url_to_fs(url)
    file_system.invalidate_cache()
    return {path[len(root) + 1 :]: file_system.cat_file(path) for path in file_system.find(root)}


def broken(monkeypatch, url: str, method: str, times: int, after: int = 0, cut: bool = False):
    """The remote file system's method fails so many times, after some calls; or writes half of what it should."""
    file_system = fsspec.core.url_to_fs(url)[0]
    kept, calls = getattr(file_system, method), []

    def fault(path, *given, **named):
        calls.append(path)
        if not after < len(calls) <= after + times:
            return kept(path, *given, **named)
        if cut:
            return kept(path, given[0][: len(given[0]) // 2])
        raise OSError("the connection was lost")

    monkeypatch.setattr(file_system, method, fault)
    return calls


def test_a_stored_cell_is_read_on_another_machine(url, tmp_path, monkeypatch):
    Store(remote.local(url)).write(record(), SAMPLES)
    assert sorted(there(url)) == [f"cells/{CELL.id}/cell.json", f"cells/{CELL.id}/samples.parquet"]
    another_machine(monkeypatch, tmp_path)
    store = Store(remote.local(url))
    assert store.read(CELL.id)["status"] == "done"
    assert store.samples(CELL.id).equals(SAMPLES)
    assert remote.shown(store.root) == url


def test_what_is_there_is_fetched_once_and_again_when_it_changes(url, tmp_path, monkeypatch):
    store = Store(remote.local(url))
    store.write(record(status="failed", error={"type": "E", "message": "", "traceback": ""}))
    ours = tmp_path / "cache"
    another_machine(monkeypatch, tmp_path)
    assert Store(remote.local(url)).read(CELL.id)["status"] == "failed"
    fetched = broken(monkeypatch, url, "get", times=0)
    remote.local(url)
    assert fetched == []
    monkeypatch.setenv("CM_CACHE", str(ours))
    store.write(record(), SAMPLES)
    another_machine(monkeypatch, tmp_path)
    assert Store(remote.local(url)).read(CELL.id)["status"] == "done"
    assert len(fetched) == 1


@pytest.mark.parametrize("after", range(4))
def test_nothing_half_is_visible_wherever_an_upload_breaks(url, tmp_path, monkeypatch, after):
    """A cell replaces another one; every step of it is where the connection goes for good."""
    store = Store(remote.local(url))
    store.write(record(status="not_scored"), SAMPLES)
    method = ("rm_file", "pipe_file", "pipe_file", "info")[after]
    with monkeypatch.context() as patch:
        broken(patch, url, method, times=99, after=(0, 0, 1, 0)[after])
        with pytest.warns(UserWarning, match="the connection was lost.*uploaded later"):
            store.write(record(), SAMPLES)
        assert store.read(CELL.id)["status"] == "done"
        with pytest.raises(UserError, match=r"connection was lost.*all results are in .*same command uploads"):
            Store(store.root).upload()
    ours = tmp_path / "cache"
    another_machine(monkeypatch, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # neither cut nor mixed cells
        found = Store(remote.local(url)).read(CELL.id)
    assert found is None or found["status"] == "not_scored"
    monkeypatch.setenv("CM_CACHE", str(ours))
    Store(remote.local(url)).upload()
    another_machine(monkeypatch, tmp_path, "third")
    assert Store(remote.local(url)).read(CELL.id)["status"] == "done"


@pytest.mark.parametrize("cut", [False, True])
def test_what_fails_for_a_moment_is_tried_again(url, monkeypatch, cut):
    broken(monkeypatch, url, "pipe_file", times=2, cut=cut)
    store = Store(remote.local(url))
    store.write(record(), SAMPLES)
    assert there(url)[f"cells/{CELL.id}/cell.json"] == (store.cells / CELL.id / "cell.json").read_bytes()


@pytest.mark.parametrize("name", ["cell.json", "samples.parquet"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:9] + b"?" + data[10:]])
def test_damaged_objects_are_named_and_made_good(url, tmp_path, monkeypatch, name, damage):
    ours = Store(remote.local(url))
    ours.write(record(), SAMPLES)
    path = f"{url}/cells/{CELL.id}/{name}"
    file_system, root = fsspec.core.url_to_fs(path)
    intact = file_system.cat_file(root)
    file_system.pipe_file(root, damage(intact))
    remote.local(url)
    assert ours.read(CELL.id)["status"] == "done", "it does not replace an intact one"
    cache = tmp_path / "cache"
    another_machine(monkeypatch, tmp_path)
    store = Store(remote.local(url))
    with pytest.warns(UserWarning, match=f"skipping cell .*{CELL.id}"):
        assert store.read(CELL.id) is None
    monkeypatch.setenv("CM_CACHE", str(cache))
    ours.upload()
    assert there(url)[f"cells/{CELL.id}/{name}"] == intact


@pytest.mark.parametrize("place", ["mirror", "staging"])
def test_a_full_disk_while_fetching_is_one_line(url, tmp_path, monkeypatch, place):
    Store(remote.local(url)).write(record(), SAMPLES)
    another_machine(monkeypatch, tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    target = "corematching.files.Path.write_bytes" if place == "mirror" else "corematching.results.remote.Path.mkdir"
    monkeypatch.setattr(target, full)
    with pytest.raises(UserError, match="No space left on device") as error:
        remote.local(url)
    assert "\n" not in str(error.value)


def test_a_run_and_its_tables_work_on_a_url(url, tmp_path, monkeypatch, capsys):
    for keep in (64, 32):
        config = cell_config("fastv", keep, "gqa", 2)
        store = Store(remote.local(url))
        store.write(cell_record(config, value=50.0, n=2), SAMPLES)
    another_machine(monkeypatch, tmp_path)
    assert aggregate_command([url, "--no-figures"]) == 0
    assert "tables/statistics.csv" in there(url)
    store.upload()
    assert len([path for path in there(url) if path.endswith("cell.json")]) == 2


def test_the_program_stores_and_resumes_remotely(url, tmp_path, monkeypatch, capsys):
    from test_runner import GRID, FakeBench

    from corematching.evaluation import evaluator, provenance

    monkeypatch.setattr(evaluator, "Evaluator", FakeBench)
    monkeypatch.setattr(provenance, "model_revision", lambda model: "revision")
    monkeypatch.setattr("corematching.benchmarks.data.DataSource.version", lambda self, benchmark: "version")
    monkeypatch.setattr(FakeBench, "evaluated", [])
    words = [*GRID, "tracking=none", "report=false", f"results_dir={url.rpartition('/')[0]}"]
    assert cli.main(words) == 0
    assert len(FakeBench.evaluated) == 10
    run = url.replace("/run", "/quickstart")
    assert f"table: {run}/table.md" in capsys.readouterr().out
    first = there(run)
    assert {"table.md", "table.csv", "experiment.json"} < set(first)
    assert not [path for path in first if path.startswith(("claims", "staging", "."))]
    another_machine(monkeypatch, tmp_path)
    assert cli.main(words) == 0
    assert len(FakeBench.evaluated) == 10, "all was fetched"
    assert there(run) == first


def test_predictions_arrive_with_what_names_and_shows_them(url):
    words = ["+experiment=paper_hardware", "model=tiny", "hardware=titan_xp", "methods=[dense]", "keep=[]"]
    assert cli.main([*words, "report=false", f"results_dir={url.rpartition('/')[0]}"]) == 0
    found = there(url.replace("/run", "/paper_hardware"))
    assert {"table.md", "table.csv", "experiment.json"} < set(found)
    assert any(path.endswith("/cell.json") for path in found)


def test_what_cannot_be_reached_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CM_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for place, why in (("nowhere://x/y", "s3://bucket/folder"), ("gs://bucket/x", "gcsfs")):
        assert cli.main([f"results_dir={place}", "data.n=8", "tracking=none"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: results_dir=")
        assert why in line


def test_without_the_extra_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("CM_CACHE", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(UserError, match=r"pip install 'corematching-bench\[s3\]'"):
        Remote("s3://bucket/run", tmp_path)


def test_an_index_that_is_damaged_costs_a_fetch(url, tmp_path, monkeypatch):
    store = Store(remote.local(url))
    store.write(record(), SAMPLES)
    store.upload()
    index = store.root / ".fetched.json"
    assert json.loads(index.read_text()).keys() == {CELL.id}
    for content in ("{", "[]", "[" * 5000):
        index.write_text(content)
        assert Store(remote.local(url)).read(CELL.id)["status"] == "done"
