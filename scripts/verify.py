"""Check every id, checksum and count of stored results.

    python scripts/verify.py results/quickstart

Prints one line for each thing that is wrong. Exit status: 0 all is well, 1 something is wrong, 2 no such experiment.
"""

from __future__ import annotations

import argparse
import sys

from corematching.errors import UserError
from corematching.results import remote
from corematching.results.verify import verify


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", help="experiment folders, results/<experiment>, or their URLs")
    wrong = False
    for folder in parser.parse_args(arguments).experiments:
        try:
            intact, problems = verify(remote.local(folder))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(*problems, f"{folder}: {intact} cells intact, {len(problems)} problems", sep="\n")
        wrong |= bool(problems)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
