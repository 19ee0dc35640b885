"""Write the support matrix of ``docs/models.md``: which method runs on which model family, asked of the code.

Usage: ``python scripts/make_models.py``. No model is loaded: a method is asked what a run would ask it before weights
are. The rest of the page is kept.
"""

from __future__ import annotations

import re
from pathlib import Path

from corematching import files, groups
from corematching.errors import UserError
from corematching.models.loading import load_config
from corematching.models.support import refusal
from corematching.registry import build_method

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
MODELS = ("llava_1_5_7b", "llava_next_7b", "llava_onevision_7b", "qwen2_5_vl_7b", "qwen3_vl_4b", "internvl3_8b")
"""One per family: its file in ``conf/model``."""
BLOCK = re.compile(r"(<!-- matrix -->\n).*?(<!-- end of matrix -->\n)", re.DOTALL)


def verdict(model: str, method: str) -> str | None:
    """Why a method, with the model's own placement of layers, is refused; None if it runs."""
    config = load_config(model, "random")
    overrides = (groups.load("model", model).get("method_overrides") or {}).get(method) or {}
    try:
        return refusal(config, build_method(method, **overrides))
    except UserError as error:
        return str(error)


def matrix() -> str:
    """The table as Markdown, with the reasons below it."""
    reasons: dict[str, int] = {}
    lines = [
        f"| method | {' | '.join(f'`{model}`' for model in MODELS)} |",
        f"|---|{'---|' * len(MODELS)}",
    ]
    for method in groups.choices("method"):
        cells = []
        for model in MODELS:
            reason = verdict(model, method)
            number = None if reason is None else reasons.setdefault(reason, len(reasons) + 1)
            cells.append("runs" if number is None else f"refused ({number})")
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in reasons.items())]) + "\n"


def page(text: str) -> str:
    """The page with the matrix as the code has it."""
    return BLOCK.sub(lambda found: found[1] + "\n" + matrix() + "\n" + found[2], text)


def main() -> None:
    files.write(PAGE, page(PAGE.read_text(encoding="utf-8")))
    print(f"matrix of {len(groups.choices('method'))} methods and {len(MODELS)} families in {PAGE}")


if __name__ == "__main__":
    main()
