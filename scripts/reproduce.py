"""Compute a stored cell again from its own record, and say what differs.

    python scripts/reproduce.py results/quickstart/cells/0123456789abcdef

Prints in what the second computation was made differently (weights, data, versions, machine), then in what it came out
differently (status, score, trace, answers). Nothing is stored. Exit status: 0 the same result, 1 another one, 2 no such
cell, or one that cannot be made here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from corematching.errors import UserError
from corematching.evaluation.runner import prepare_libraries


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", type=Path, help="a cell's folder, results/<experiment>/cells/<id>")
    folder = parser.parse_args(arguments).cell
    prepare_libraries()
    from corematching.evaluation.again import compute_again

    try:
        found = compute_again(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("made the same way" if not found.origin else "made differently:", *found.origin, sep="\n  ")
    print("same result" if not found.result else "another result:", *found.result, sep="\n  ")
    return int(bool(found.result))


if __name__ == "__main__":
    sys.exit(main())
