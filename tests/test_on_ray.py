"""``executor=ray`` on a real Ray cluster of two local nodes: the same bytes as one process, whoever dies."""

import os
import signal
import sys
import threading

import pytest
from ray_stand_ins import Deadly, Quick, chaos_stand_in
from small_llava import save_small_llava

from corematching import cli
from corematching.evaluation import evaluator, on_ray
from corematching.results.store import Store

ray = pytest.importorskip("ray")

CELLS = ["methods=[dense,random,fastv]", "keep=[16]", "limit=6", "data.n=8", "data=mini"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Command-line words of a small run."""
    checkpoint = save_small_llava(tmp_path_factory.mktemp("model"))
    small = [f"model.path={checkpoint}", "model.visual_tokens=64", "generation.max_new_tokens=3"]
    return [*CELLS, *small, "model=tiny", "tracking=none", "report=false", "name=run", "together=2"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def quick(words, cache, tmp_path_factory):
    """Words of a run of six cells whose worker has no model, and the folder of such a run in this process."""
    folder, words = tmp_path_factory.mktemp("quick"), [*words, "benchmarks=[gqa,pope]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "Evaluator", chaos_stand_in.Evaluator)
        patch.setattr(on_ray, "Worker", Quick)
        assert cli.main([*words, f"results_dir={folder}"]) == 0
        yield words, folder / "run"


@pytest.fixture(scope="module")
def cluster(cache):
    """Two nodes on this machine, with one CPU each."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    found = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    found.add_node(**node)
    ray.init(
        address=found.address,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
    )
    yield found
    ray.shutdown()
    found.shutdown()


def same(folder, expected) -> None:
    """Tables and sample rows are byte for byte those of one process; every cell was published once."""
    assert (folder / "table.md").read_bytes() == (expected / "table.md").read_bytes()
    assert (folder / "table.csv").read_bytes() == (expected / "table.csv").read_bytes()
    cells = sorted(path.name for path in (expected / "cells").iterdir())
    assert sorted(path.name for path in (folder / "cells").iterdir()) == cells
    for cell in cells:
        one, other = (place / "cells" / cell / "samples.parquet" for place in (folder, expected))
        assert one.read_bytes() == other.read_bytes()
    for left in ("claims", "staging"):
        assert list((folder / left).iterdir()) == []


def test_a_cluster_that_is_not_there_is_one_line(words, cache, tmp_path, monkeypatch, capsys):
    def nowhere(**options):  # the real one looks for other clusters of this machine, and waits for those of yesterday
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", nowhere)
    assert cli.main([*words, f"results_dir={tmp_path}", "executor=ray", "executor.address=auto"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: executor.address=auto is not valid here (Could not find any running Ray instance")


def test_without_the_extra_one_line_says_what_to_install(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main([*words, f"results_dir={tmp_path}", "executor=ray"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: executor=ray needs Ray")
    assert "pip install 'corematching-bench[ray]'" in line


@pytest.mark.slow
def test_two_nodes_give_the_bytes_of_one_process(words, cluster, tmp_path, capsys):
    words = [*words, "benchmarks=[gqa]"]
    assert cli.main([*words, f"results_dir={tmp_path / 'local'}"]) == 0
    assert cli.main([*words, f"results_dir={tmp_path / 'ray'}", "executor=ray"]) == 0
    same(tmp_path / "ray/run", tmp_path / "local/run")
    assert "2 workers on Ray, CPU only each" in capsys.readouterr().out


@pytest.mark.slow
def test_a_worker_that_is_killed_is_named_and_changes_nothing(quick, cluster, tmp_path, monkeypatch, capsys):
    words, expected = quick
    killed, send = [], on_ray.Fleet._send

    def then_kill(self, seat):
        send(self, seat)
        if seat.company and not killed:
            killed.append(seat.where)
            os.kill(seat.where["pid"], signal.SIGKILL)

    monkeypatch.setattr(on_ray.Fleet, "_send", then_kill)
    assert cli.main([*words, f"results_dir={tmp_path}", "executor=ray"]) == 0
    same(tmp_path / "run", expected)
    out = capsys.readouterr().out
    (told,) = [line for line in out.splitlines() if line.startswith("worker") and " died (" in line]
    assert f"died (process {killed[0]['pid']} on" in told
    assert f"{killed[0]['pid']}.err" in told


@pytest.mark.slow
def test_a_cell_that_kills_its_workers_fails_and_the_others_do_not(quick, cluster, tmp_path, monkeypatch):
    words, _ = quick
    monkeypatch.setenv("CM_TEST_KILLER", "random")
    monkeypatch.setattr(on_ray, "Worker", Deadly)
    assert cli.main([*words, f"results_dir={tmp_path}", "executor=ray", "executor.tries=2"]) == 1
    records = list(Store(tmp_path / "run").records())
    failed = {record["labels"]["method"] for record in records if record["status"] == "failed"}
    assert (len(records), failed) == (6, {"random"})
    (message,) = {record["error"]["message"].split(":")[0] for record in records if record["status"] == "failed"}
    assert message == "2 workers died over this cell"


@pytest.mark.slow
def test_a_stopped_run_stores_what_is_done_and_leaves_no_claim(quick, cluster, tmp_path, monkeypatch, capsys):
    words, expected = quick
    send = on_ray.Fleet._send

    def then_interrupt(self, seat):
        send(self, seat)
        if seat.company and not hasattr(self, "interrupted"):
            self.interrupted = True
            threading.Timer(0.45, os.kill, (os.getpid(), signal.SIGTERM)).start()

    with monkeypatch.context() as patch:
        patch.setattr(on_ray.Fleet, "_send", then_interrupt)
        assert cli.main([*words, f"results_dir={tmp_path}", "executor=ray"]) == 130
    assert "run the same command again" in capsys.readouterr().out
    assert list((tmp_path / "run/claims").iterdir()) == []
    stored = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/cells").iterdir()}
    assert len(stored) < 6
    assert cli.main([*words, f"results_dir={tmp_path}", "executor=ray"]) == 0
    same(tmp_path / "run", expected)
    assert stored.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/cells").iterdir()}.items()
