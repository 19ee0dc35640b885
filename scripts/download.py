"""Fetch models and datasets from the Hugging Face Hub, so that machines without a network can run the benchmarks.

    python scripts/download.py --benchmarks all --models llava_1_5_7b
    python scripts/download.py --benchmarks gqa pope --dry-run

Files go to the Hub's cache (HF_HOME). Interrupted transfers go on where they stopped, checksums are compared, and what
is there already is not fetched again. Afterwards set HF_HUB_OFFLINE=1 and run with data=hub.
"""

from __future__ import annotations

import argparse
import itertools
import sys

from rich.console import Console

from corematching.benchmarks import BENCHMARKS, available_benchmarks, hub, load_benchmark
from corematching.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for wrong input or a failed transfer)."""
    args = _arguments(argv)
    console = Console(soft_wrap=True, highlight=False)
    try:
        named = [BENCHMARKS if name == "all" else (name,) for name in args.benchmarks]
        names = dict.fromkeys(itertools.chain.from_iterable(named))
        wanted = [hub.dataset_repo(load_benchmark(name), args.revision) for name in names]
        wanted += [hub.model_repo(name) for name in args.models]
        if not wanted:
            raise UserError("nothing to fetch: give --benchmarks and/or --models")
        plans = hub.plans(wanted)
        if args.verify:
            damaged = [f"{plan.repo.id}/{path}" for plan in plans for path in hub.verify(plan)]
            console.print("\n".join(f"damaged, removed: {path}" for path in damaged) or "all cached files are intact")
            plans = hub.plans(wanted)
        _show(console, plans)
        if not args.dry_run:
            hub.fetch_with_bars(plans, console)
            console.print("done: everything is in the cache")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(available_benchmarks())
    parser.add_argument(
        "--benchmarks", nargs="+", default=[], metavar="NAME", help=f"all (the paper's ten), or: {names}"
    )
    models = ", ".join(hub.model_names())
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help=f"any of: {models}; or owner/name")
    parser.add_argument("--revision", help="branch, tag or commit of the datasets (default: main)")
    parser.add_argument("--verify", action="store_true", help="also check the sums of files that are already there")
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched, and stop")
    return parser.parse_args(argv)


def _show(console: Console, plans: list[hub.Plan]) -> None:
    for plan in plans:
        size = hub.gigabytes(sum(file.size for file in plan.files))
        need = f"{hub.gigabytes(plan.bytes_missing)} to fetch" if plan.missing else "complete"
        console.print(f"{plan.repo.kind} {plan.repo.id} @ {plan.commit[:8]}: {len(plan.files)} files, {size}, {need}")
    total = sum(plan.bytes_missing for plan in plans)
    console.print(
        f"disk needed: {hub.gigabytes(total)}; running a benchmark unpacks its rows once, which needs as much again"
    )
    console.print("(VQAv2 repeats its images: unpacked it takes about 34 GB, less with a limit)")


if __name__ == "__main__":
    sys.exit(main())
