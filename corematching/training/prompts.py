"""Prompts exactly as the evaluation feeds them, in both prompt variants.

``llava15`` is the official LLaVA-1.5 recipe, ``lmms_eval`` what lmms-eval's stock tasks say; they differ for TextVQA,
MMBench and MM-Vet. The text returned follows ``USER: <image>`` and a newline in the vicuna_v1 conversation.
"""

from __future__ import annotations

from corematching.benchmarks.mini.questions import LETTERS, Question
from corematching.training.vocabulary import (
    CONTEXT,
    INSUFFICIENT,
    LETTER_ANSWER,
    LETTER_ANSWER_CN,
    OCR_REFERENCE,
    REASONING,
    SEVERAL_OPTIONS,
    SHORT_ANSWER,
)

VARIANTS = ("llava15", "lmms_eval")


def user_prompt(benchmark: str, question: Question, variant: str, chinese: bool = False) -> str:
    """What the user says after the image.

    Parameters
    ----------
    benchmark : str
        A mini benchmark's name.
    question : Question
    variant : {"llava15", "lmms_eval"}
    chinese : bool
        For MMBench: ask for the letter in Chinese, as MMBench-CN does.
    """
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices or ()))
    hint = question.meta.get("hint", "")
    text = question.text
    if benchmark == "vizwiz":
        return f"{text.capitalize()}\n{INSUFFICIENT}\n{SHORT_ANSWER}"
    if benchmark == "textvqa":
        tokens = ", ".join(question.meta["ocr_tokens"])
        reference = f"{OCR_REFERENCE} {tokens}\n" if variant == "llava15" else ""
        return f"{text.capitalize()}\n{reference}{SHORT_ANSWER}"
    if benchmark == "scienceqa":
        context = f"{CONTEXT} {hint}\n" if hint else ""
        return f"{context}{text}\n{options}\n{LETTER_ANSWER}"
    if benchmark in ("seedbench", "echo"):
        return f"{text}\n{options}\n{LETTER_ANSWER}"
    if benchmark == "mmbench":
        suffix = LETTER_ANSWER_CN if chinese else LETTER_ANSWER
        if variant == "llava15":
            return "\n".join([*([hint] if hint else []), text, options, suffix])
        return f"{hint} {text} {SEVERAL_OPTIONS}\n{options}\n\n{suffix}"
    if benchmark == "mmvet":
        return text if variant == "llava15" else f"{REASONING} \n\n{text}"
    return f"{text}\n{SHORT_ANSWER}"
