"""Build the Weights & Biases workspace for this project's runs.

Usage: ``python scripts/wandb_dashboard.py --entity ME [--project corematching-bench] [--print]``

``--print`` writes the workspace's specification as JSON to the standard output and needs neither network nor login.
"""

from __future__ import annotations

import argparse
import json
import sys

from corematching.benchmarks.spec import BENCHMARKS, available_benchmarks
from corematching.results.dashboard import workspace
from corematching.texts import neutral


def main() -> int:
    """Parse the arguments, build the workspace, print or save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", default="", help="wandb user or team")
    parser.add_argument("--project", default="corematching-bench")
    parser.add_argument("--benchmarks", nargs="+", default=list(BENCHMARKS), choices=available_benchmarks())
    parser.add_argument("--print", action="store_true", help="print the specification instead of saving it")
    arguments = parser.parse_args()
    if not arguments.print and not arguments.entity:
        print("error: --entity is needed to save the workspace (or use --print)", file=sys.stderr)
        return 2
    if not arguments.print and not _has_key():
        print("error: wandb has no key: run `wandb login` or set WANDB_API_KEY (or use --print)", file=sys.stderr)
        return 2
    built = workspace(arguments.entity or "entity", arguments.project, arguments.benchmarks)
    if arguments.print:
        print(json.dumps(built._to_model().model_dump(mode="json", by_alias=True), indent=1, sort_keys=True))
    else:
        try:
            print(built.save().url)
        except Exception as error:  # whatever wandb has to say: no network, no such entity, no permission
            print(f"error: wandb did not take the workspace: {neutral(str(error))[:300]}", file=sys.stderr)
            return 2
    return 0


def _has_key() -> bool:
    """Whether wandb can log in without asking."""
    import wandb

    return bool(wandb.api.api_key)


if __name__ == "__main__":
    raise SystemExit(main())
