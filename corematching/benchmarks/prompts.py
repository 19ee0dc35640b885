"""How a question is put to the model.

Two modes. ``lmms_eval`` is lmms-eval's own wording, untouched. ``llava15`` is the wording of the LLaVA-1.5 evaluation
scripts; the functions below exist only where the two differ, and each docstring says in what. Every function takes a
dataset row and returns the user's turn; the model side puts the conversation template and the images around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image

from corematching.errors import UserError

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_EN = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


def textvqa_with_ocr(row: dict[str, Any]) -> str:
    """TextVQA with the OCR tokens as a reference line; stock leaves them out and lower-cases the question."""
    return f"{row['question']}\nReference OCR token: {', '.join(row['ocr_tokens'])}\n{SHORT_ANSWER}"


def textvqa_without_ocr(row: dict[str, Any]) -> str:
    """TextVQA without OCR tokens, the question's capitals kept."""
    return f"{row['question']}\n{SHORT_ANSWER}"


def vizwiz(row: dict[str, Any]) -> str:
    """VizWiz with the question's capitals kept; stock lower-cases all but the first letter."""
    return f"{row['question']}\n{UNANSWERABLE}\n{SHORT_ANSWER}"


def mmvet(row: dict[str, Any]) -> str:
    """MM-Vet's bare question; stock asks for step-by-step reasoning first."""
    return row["question"]


def mmbench_en(row: dict[str, Any]) -> str:
    """MMBench, one item per line; stock adds "There are several options:" and a blank line."""
    return _mmbench(row, LETTER_EN)


def mmbench_cn(row: dict[str, Any]) -> str:
    """MMBench-CN with LLaVA-1.5's short Chinese instruction."""
    return _mmbench(row, LETTER_CN)


def _mmbench(row: dict[str, Any], instruction: str) -> str:
    lines = [] if _absent(row["hint"]) else [row["hint"]]
    lines.append(row["question"])
    for letter in "ABCD":
        if _absent(row[letter]):
            break
        lines.append(f"{letter}. {row[letter]}")
    return "\n".join([*lines, instruction])


def _absent(value: str | None) -> bool:
    return value is None or value.lower() in ("", "nan", "none")


def middle_frame(row: dict[str, Any]) -> list[Image.Image]:
    """SEED-Bench: the image, or the middle frame of a video; stock hands over every frame."""
    images = row["image"]
    return [images[len(images) // 2].convert("RGB")]


_FUNCTIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], ...]] = {
    "text": (textvqa_with_ocr, textvqa_without_ocr, vizwiz, mmvet, mmbench_en, mmbench_cn),
    "visual": (middle_frame,),
}


def named(kind: str, name: str) -> Callable[[dict[str, Any]], Any]:
    """The function that a benchmark file means; `kind` is ``"text"`` or ``"visual"``.

    Raises
    ------
    UserError
        If there is none of this name; the message lists the valid ones.
    """
    functions = {function.__name__: function for function in _FUNCTIONS[kind]}
    if name not in functions:
        raise UserError(f"unknown prompt {kind} {name!r}; valid names: {', '.join(functions)}")
    return functions[name]
