"""Compare two finished experiments cell by cell.

Usage: ``python scripts/compare.py results/<experiment> results/<another> [--out FOLDER]``

Prints both scores, their difference with its paired 95 % interval and the exact McNemar test; FOLDER gets the same as
CSV, Markdown, LaTeX and HTML.
"""

from corematching.commands import compare_command

if __name__ == "__main__":
    raise SystemExit(compare_command())
