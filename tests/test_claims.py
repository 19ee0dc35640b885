"""Claims: one holder at a time, also between hosts without file locks; what a dead holder leaves is taken over."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from corematching.errors import UserError
from corematching.results import claims
from corematching.results.claims import Claims

ON_A_HOST = """
import fcntl, json, sys, time
from corematching.results import claims

def no_locks(*_):
    raise OSError(95, "Operation not supported")

fcntl.flock = fcntl.lockf = no_locks
host, folder, log, cells, seconds = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5])
claims.this_host = lambda: host
claims.BEAT, claims.EXPIRY = 0.05, 1.0
mine = claims.Claims(claims.Path(folder))
left = [f"cell{number}" for number in range(cells)]
deadline = time.monotonic() + 40
while left and time.monotonic() < deadline:
    for name in list(left):
        done = claims.Path(log) / name
        with mine.claim(name) as held:
            if not held:
                continue
            left.remove(name)
            if not done.exists():
                print(name, flush=True)
                time.sleep(seconds)
                done.touch()
    time.sleep(0.01)
"""


def on_host(host: str, folder, log, cells: int, seconds: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", ON_A_HOST, host, str(folder), str(log), str(cells), str(seconds)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "claims").mkdir()
    return tmp_path / "claims"


def elsewhere(monkeypatch, host: str = "another host"):
    monkeypatch.setattr(claims, "this_host", lambda: host)


def test_two_hosts_without_locks_share_cells_and_take_over_a_dead_hosts(folder, tmp_path):
    """Every cell is computed once; but the one that the killed host had in hand, which is computed again."""
    log = tmp_path / "done"
    log.mkdir()
    killed = on_host("a", folder, log, 4, 60.0)
    in_hand = killed.stdout.readline().strip()
    killed.kill()
    killed.wait()
    hosts = [on_host(host, folder, log, 12, 0.05) for host in ("b", "b", "c")]
    printed = [host.communicate(timeout=60)[0].split() for host in hosts]
    killed.stdout.close()
    counts = Counter(name for lines in printed for name in lines)
    assert counts == Counter({f"cell{number}": 1 for number in range(12)})
    assert in_hand in counts
    assert list(folder.iterdir()) == []


def test_a_process_of_this_host_that_is_gone_holds_nothing(folder):
    name = claims.this_host()
    dead = on_host(name, folder, folder, 1, 60.0)
    dead.stdout.readline()
    assert Claims(folder).holder("cell0").pid == dead.pid
    with Claims(folder).claim("cell0") as mine:
        assert not mine
    dead.kill()
    dead.wait()
    dead.stdout.close()
    with Claims(folder).claim("cell0") as mine:
        assert mine, "at once: nobody waits for a lease of a dead process to expire"


def test_a_number_that_another_process_has_now_is_not_the_holder(folder, monkeypatch):
    holder = Claims(folder).claim("cell")
    assert holder.__enter__()
    (lease,) = folder.iterdir()
    text = lease.read_text()
    started = claims._this_process().started
    lease.write_text(text.replace(str(started), str(started - 1)))
    with Claims(folder).claim("cell") as mine:
        assert mine
    holder.__exit__(None, None, None)


@pytest.mark.parametrize("skew", [-86_400.0, 0.0, 86_400.0])
def test_another_hosts_lease_lasts_as_long_as_it_is_touched_whatever_its_clock_says(folder, monkeypatch, skew):
    monkeypatch.setattr(claims, "EXPIRY", 0.3)
    holder = Claims(folder).claim("cell")
    assert holder.__enter__()
    (lease,) = folder.iterdir()
    elsewhere(monkeypatch)
    watcher = Claims(folder)
    for beat in range(5):  # 0.5 s in all
        os.utime(lease, (time.time() + skew + beat,) * 2)
        with watcher.claim("cell") as mine:
            assert not mine
        time.sleep(0.1)
    time.sleep(0.3)
    with watcher.claim("cell") as mine:
        assert mine
    assert list(folder.iterdir()) == []


def test_a_holder_touches_its_leases(folder, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.02)
    own = Claims(folder)
    with own.claim("one"), own.claim("two"):
        before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        deadline = time.monotonic() + 10
        while any(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items()):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_of_many_that_take_over_one_wins(folder, monkeypatch):
    monkeypatch.setattr(claims, "EXPIRY", 0.0)
    holder = Claims(folder).claim("cell")
    assert holder.__enter__()
    elsewhere(monkeypatch)
    watchers = [Claims(folder) for _ in range(8)]
    for watcher in watchers:
        assert watcher._acquire("cell") is None, "seen for the first time"
    start, won = threading.Barrier(len(watchers)), []

    def race(watcher):
        newest = watcher._leases("cell")
        watcher._leases = lambda name, first=[newest]: first.pop() if first else Claims._leases(watcher, name)
        start.wait()
        won.append(watcher._acquire("cell"))

    threads = [threading.Thread(target=race, args=(watcher,)) for watcher in watchers]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sum(lease is not None for lease in won) == 1


def test_a_listing_that_was_old_is_found_out(folder, monkeypatch):
    """The claimer's first look misses a lease of a later generation."""
    elsewhere(monkeypatch)
    (folder / "cell.5.lease").write_text("")
    late = Claims(folder)
    late._leases = lambda name, first=[{}]: first.pop() if first else Claims._leases(late, name)
    with late.claim("cell") as mine:
        assert not mine
    assert [path.name for path in folder.iterdir()] == ["cell.5.lease"]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"host": 1}', "\x00" * 50, "[" * 5000])
def test_a_damaged_lease_holds_until_it_expires(folder, monkeypatch, content):
    (folder / "cell.1.lease").write_text(content)
    own = Claims(folder)
    assert own.holder("cell") is None
    with own.claim("cell") as mine:
        assert not mine
    monkeypatch.setattr(claims, "EXPIRY", 0.0)
    with own.claim("cell") as mine:
        assert mine


def test_a_full_disk_does_not_stop_a_claim_and_a_read_only_one_is_a_line(folder, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("corematching.results.claims.os.write", refuse)
    with Claims(folder).claim("cell") as mine:
        assert mine
        assert Claims(folder).holder("cell") is None
    monkeypatch.setattr("corematching.results.claims.os.open", refuse)
    with pytest.raises(UserError, match=r"^cannot reserve .*No space left.*run the same command again"):
        Claims(folder).claim("cell").__enter__()
