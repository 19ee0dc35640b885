"""Write ``report.html``, one self-contained page about finished experiments.

Usage: ``python scripts/report.py results/<experiment> [more experiments ...] [--out FILE] [--overlays N]``

``--overlays N`` loads the experiment's model and runs its methods again on questions about N images, to show which
image patches each keeps; without it, overlays recorded earlier are shown.
"""

from corematching.commands import report_command

if __name__ == "__main__":
    raise SystemExit(report_command())
