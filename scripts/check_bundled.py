"""Check that token choice, neuron choice and the layer of the choice matter on the bundled model.

Answers the same new questions under every condition, prints accuracies, the share of kept patches that show objects,
the gates between conditions and how active the FFNs are. Goes on where an interrupted check stopped. Exit status 1 if
a gate is missed.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from corematching.errors import UserError
from corematching.inspection.activity import activity
from corematching.training import gates
from corematching.training.calibration import inputs_about, load_with_processor
from corematching.training.prompts import user_prompt


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a conf/model name or a folder (default: tiny)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the answers; give it again to go on")
    parser.add_argument("-n", type=int, default=600, help="questions (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")
    parser.add_argument("--only", nargs="+", metavar="CONDITION", help="run these conditions, e.g. 'fastv 64, layer 2'")
    parser.add_argument("--ablations", action="store_true", help="variants of core tokens instead of the gates")
    parser.add_argument("--trained", action="store_true", help="trained token selection beside untrained choices")
    options = parser.parse_args(arguments)
    conditions = gates.ABLATIONS if options.ablations else gates.TRAINED if options.trained else gates.CONDITIONS
    known = [condition.name for condition in conditions]
    if unknown := [name for name in options.only or () if name not in known]:
        parser.error(f"unknown condition {unknown[0]!r}: choose from {'; '.join(known)}")
    try:
        model, processor = load_with_processor(options.model)
        folder = options.out / f"seed-{options.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        asked = gates.ask(options.n, options.seed)
        log = partial(print, flush=True, file=sys.stderr)
        chosen = [condition for condition in conditions if condition.name in (options.only or known)]
        replies = {one.name: gates.run(one, asked, model, processor, folder, log) for one in chosen}
    except UserError as error:
        parser.error(str(error))
    held = () if options.ablations else gates.TRAINED_GATES if options.trained else gates.GATES
    text, met = gates.report(asked, replies, held)
    print(text)
    if options.ablations or options.trained:
        return 0 if met else 1
    print("\n| layer | positive, visual | positive, text | votes of the top 40 % |\n|---:|---:|---:|---:|")
    prompts = (inputs_about(processor, one.scene, user_prompt("gqa", one.question, "llava15")) for one in asked[:40:2])
    for layer, row in enumerate(activity(model, prompts)):
        print(f"| {layer} | {row.positive_visual:.2f} | {row.positive_text:.2f} | {row.concentration:.2f} |")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
