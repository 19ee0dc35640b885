"""The tiny model's tokenizer: words of the mini suite's questions, instructions as single tokens, then characters.

Instruction sentences that every prompt repeats ("Answer the question using a single word or phrase.") are one token
each: sequences stay short, and a model of this size spends its capacity on the image instead. Anything else splits
into known words, then characters, then ``<unk>``.
"""

from __future__ import annotations

import re
import string

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from corematching.benchmarks.mini.families import plural
from corematching.benchmarks.mini.questions import HINTS, UNANSWERABLE
from corematching.benchmarks.mini.scenes import COLOURS, DIGITS, SHAPES, SIZES, TEXTURES, WORDS

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SHORT_ANSWER = "Answer the question using a single word or phrase."
INSUFFICIENT = "When the provided information is insufficient, respond with 'Unanswerable'."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."
LETTER_ANSWER_CN = "请直接使用所提供的选项字母作为答案回答。"
SEVERAL_OPTIONS = "There are several options:"
REASONING = "First please perform reasoning, and think step by step to provide best answer to the following question:"
OCR_REFERENCE = "Reference OCR token:"
CONTEXT = "Context:"
PHRASES = (
    SYSTEM, "USER:", "ASSISTANT:", SHORT_ANSWER, INSUFFICIENT, LETTER_ANSWER, LETTER_ANSWER_CN, SEVERAL_OPTIONS,
    REASONING, OCR_REFERENCE, CONTEXT, *HINTS,
)  # fmt: skip
OPTION_MARKS = tuple(f"{letter}." for letter in "ABCDE")
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
IMAGE_TOKEN = "<image>"

# Words with a meaning that the image can show or an answer can give; their embeddings are mutually orthogonal at the
# start.
CORE_WORDS = (
    *"ABCDE", *COLOURS, *SHAPES, *TEXTURES, *SIZES, *DIGITS, *WORDS,
    "yes", "no", "left", "right", "top", "bottom", UNANSWERABLE,
)  # fmt: skip
FUNCTION_WORDS = (
    "What", "color", "is", "the", "tile", "with", "number", "sign", "word", "shape", "object", "on", "pattern", "size",
    "Is", "or", "at", "to", "of", "above", "below", "there", "a", "in", "image", "How", "many", "are", "Are", "any",
    "Describe", "Where", "does", "say", "It", "says", "Sign", "Tile", "?", ".", ",",
    *(plural(shape) for shape in SHAPES),
)  # fmt: skip
_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}SYSTEM {% endif -%}
{%- if message['role'] == 'user' -%}USER: {% elif message['role'] == 'assistant' -%}ASSISTANT: {% endif -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}{{ '</s>' }}{%- else -%}{{ ' ' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}
"""
CHAT_TEMPLATE = _TEMPLATE.replace("SYSTEM", SYSTEM)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, left-padding, adding the beginning-of-sequence token, with the vicuna_v1 chat template.

    Decoded answers are words joined by single spaces, so one-word answers come out exactly.
    """
    characters = [c for c in string.printable if not c.isspace()]
    words = [*SPECIAL.values(), *CORE_WORDS, *FUNCTION_WORDS, *characters, *(f"##{c}" for c in characters)]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=100))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    bos = SPECIAL["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[bos])]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL.values()])
    backend.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    backend.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    backend.add_tokens([AddedToken(mark, normalized=False, single_word=True) for mark in OPTION_MARKS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **SPECIAL,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def alias_of(token: str) -> str | None:
    """The core word whose meaning a token shares: plurals and option marks start out next to it, else None."""
    singulars = {plural(shape): shape for shape in SHAPES}
    if token in singulars:
        return singulars[token]
    return token[0] if re.fullmatch(r"[A-E]\.", token) else None
