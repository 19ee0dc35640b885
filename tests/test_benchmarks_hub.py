"""The Hub road for real: a local server that speaks the Hub's protocol, and the programs as users run them."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub

from corematching.benchmarks.mini.writers import write_mini

ROOT = Path(__file__).parent.parent
SHARD = "adversarial-00000-of-00001.parquet"
READ_ROWS = """
from corematching.benchmarks import load_benchmark, load_source
from corematching.benchmarks.rows import load_rows
benchmark, source = load_benchmark("pope"), load_source("hub")
for part in benchmark.parts:
    rows = load_rows(benchmark, part, source.root(benchmark))
    print(part.split, len(rows), rows[0]["image"].size, source.version(benchmark))
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repositories")
    write_mini(root / "lmms-lab-encoder", 12, 0, ["POPE", "GQA"])
    return root


@pytest.fixture
def hub(repositories: Path):
    server = FakeHub(repositories)
    yield server
    server.close()


def run(hub: FakeHub, home: Path, *command: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "CM_CACHE": str(home / "cm"), "COLUMNS": "200"}
    env |= {"HF_HUB_OFFLINE": "1" if offline else "0", "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def download(hub: FakeHub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(hub, home, "scripts/download.py", *arguments)


def test_dry_run_says_the_need_and_fetches_nothing(hub: FakeHub, tmp_path: Path) -> None:
    done = download(hub, tmp_path, "--benchmarks", "pope", "gqa", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "dataset lmms-lab-encoder/POPE @ c0ffee00: 3 files" in done.stdout
    assert "dataset lmms-lab-encoder/GQA @ c0ffee00: 2 files" in done.stdout
    assert "disk needed:" in done.stdout
    assert hub.contents() == []


def test_download_then_offline_run(hub: FakeHub, tmp_path: Path) -> None:
    done = download(hub, tmp_path, "--benchmarks", "pope")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("disk needed:") < done.stdout.index("done:")
    assert sorted(name for name, _ in hub.contents()) == [
        SHARD,
        "popular-00000-of-00001.parquet",
        "random-00000-of-00001.parquet",
    ]
    again = download(hub, tmp_path, "--benchmarks", "pope", "--verify")
    assert "all cached files are intact" in again.stdout
    assert "complete" in again.stdout
    assert len(hub.contents()) == 3, "what is there was fetched again"
    hub.requests.clear()
    read = run(hub, tmp_path, "-c", READ_ROWS, offline=True)
    assert read.returncode == 0, read.stderr
    assert read.stdout.splitlines()[0] == f"adversarial 4 (336, 336) {COMMIT}"
    assert hub.requests == [], "an offline run asked the network"


def test_broken_transfer_resumes_within_a_run(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut = {SHARD: 50_000}
    done = download(hub, tmp_path, "--benchmarks", "pope")
    assert done.returncode == 0, done.stderr
    assert [span for name, span in hub.contents() if name == SHARD] == [None, "bytes=50000-"]


def test_failed_run_is_continued_by_the_next(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut, hub.cut_times = {SHARD: 10_000}, 5
    failed = download(hub, tmp_path, "--benchmarks", "pope")
    assert failed.returncode == 2
    (line,) = failed.stderr.splitlines()
    assert SHARD in line
    assert "run the same command again" in line
    hub.requests.clear()
    done = download(hub, tmp_path, "--benchmarks", "pope")
    assert done.returncode == 0, done.stderr
    assert [span for name, span in hub.contents() if name == SHARD] == ["bytes=50000-"]


@pytest.mark.parametrize("whole", [True, False])
def test_partial_file_of_full_length_is_judged_by_its_sum(
    hub: FakeHub, repositories: Path, tmp_path: Path, whole: bool
) -> None:
    """A run that was killed after the last byte; with the right bytes nothing is fetched again."""
    data = (repositories / "lmms-lab-encoder" / "POPE" / "Full" / SHARD).read_bytes()
    blobs = tmp_path / "hub" / "datasets--lmms-lab-encoder--POPE" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(data).hexdigest()}.part").write_bytes(data if whole else data[::-1])
    done = download(hub, tmp_path, "--benchmarks", "pope")
    assert done.returncode == 0, done.stderr
    assert [span for name, span in hub.contents() if name == SHARD] == ([] if whole else [None])


def test_connected_run_fetches_what_it_needs_and_says_so(hub: FakeHub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "-c", READ_ROWS)
    assert done.returncode == 0, done.stderr
    assert re.search(r"fetching lmms-lab-encoder/POPE: \d\.\d MB, once", done.stderr)
    assert len(hub.contents()) == 3


def test_damaged_transfer_and_damaged_cache_are_noticed(hub: FakeHub, tmp_path: Path) -> None:
    hub.spoil = {SHARD}
    assert download(hub, tmp_path, "--benchmarks", "pope").returncode == 0
    assert [span for name, span in hub.contents() if name == SHARD] == [None, None]
    blob = (next(tmp_path.rglob(f"snapshots/*/Full/{SHARD}"))).resolve()
    blob.write_bytes(b"x" * blob.stat().st_size)
    done = download(hub, tmp_path, "--benchmarks", "pope", "--verify")
    assert f"damaged, removed: lmms-lab-encoder/POPE/Full/{SHARD}" in done.stdout
    assert "all cached files are intact" in download(hub, tmp_path, "--benchmarks", "pope", "--verify").stdout


def test_models_come_without_duplicate_formats(hub: FakeHub, repositories: Path, tmp_path: Path) -> None:
    folder = repositories / "llava-hf" / "llava-1.5-7b-hf"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "model-00001-of-00001.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(name.encode() * 100)
    hub.cut = {"config.json": 500}  # kept in git, not in LFS: another kind of checksum
    done = download(hub, tmp_path, "--models", "llava_1_5_7b")
    assert done.returncode == 0, done.stderr
    assert "model llava-hf/llava-1.5-7b-hf @ c0ffee00: 3 files" in done.stdout
    assert [span for name, span in hub.contents() if name == "config.json"] == [None, "bytes=500-"]
    assert {name for name, _ in hub.contents()} == {"config.json", "tokenizer.json", "model-00001-of-00001.safetensors"}
    snapshot = tmp_path / "hub" / "models--llava-hf--llava-1.5-7b-hf" / "snapshots" / COMMIT
    assert (snapshot / "config.json").read_bytes() == b"config.json" * 100


def test_missing_dataset_offline_is_one_line_that_says_what_to_run(hub: FakeHub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "-c", READ_ROWS, offline=True)
    assert done.stderr.splitlines()[-1].endswith(
        "dataset lmms-lab-encoder/POPE is not in the cache and HF_HUB_OFFLINE is set; "
        "on a connected machine run: python scripts/download.py --benchmarks pope"
    )
    assert hub.requests == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--benchmarks", "gqqa"], "unknown benchmark 'gqqa'; valid benchmarks: vqav2, gqa"),
        (["--models", "tiny"], "unknown model 'tiny'; models on the Hub: internvl3_8b, llava_1_5_13b"),
        (["--benchmarks", "mmvet"], "dataset lmms-lab-encoder/MMVet does not exist on the Hub"),
        ([], "nothing to fetch"),
    ],
)
def test_wrong_input_is_one_line(hub: FakeHub, tmp_path: Path, arguments: list[str], told: str) -> None:
    done = download(hub, tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {told}")
    assert len(done.stderr.splitlines()) == 1
