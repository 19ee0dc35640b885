"""The text side of the CLIP model that a vision tower comes from: embeddings of the instruction and of the patches."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from corematching.engine.views import Prompt
from corematching.errors import UserError


class ClipText:
    """A CLIP model without its vision tower, and the tokenizer of the language model that reads the prompt."""

    def __init__(self, clip_path: str, llm_path: str, device: torch.device, dtype: torch.dtype) -> None:
        try:
            clip: torch.nn.Module = CLIPModel.from_pretrained(clip_path, dtype=dtype)
            self.clip: Any = clip.to(device).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(clip_path)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"text_model={clip_path!r} cannot be loaded as a CLIP model: {reason}") from error
        del self.clip.vision_model
        try:
            self.llm_tokenizer: Any = AutoTokenizer.from_pretrained(llm_path)
        except (OSError, ValueError) as error:
            raise UserError(f"the model at {llm_path!r} has no tokenizer to read the instruction with") from error

    def patches(self, hidden: Tensor, text_model: str) -> Tensor:
        """Patches [N, P, d_v] behind the tower's last norm -> [N, P, c].

        Raises
        ------
        UserError
            If the CLIP model belongs to a tower of another width.
        """
        width = self.clip.visual_projection.in_features
        if width != hidden.shape[-1]:
            raise UserError(
                f"text_model={text_model!r} belongs to a vision tower of width {width}, this model's has "
                f"{hidden.shape[-1]}: give the CLIP model that the tower was taken from"
            )
        return self.clip.visual_projection(hidden)

    def instruction(self, ids: list[int]) -> str:
        """Text of the prompt's tokens after the image, without the closing role marker ("ASSISTANT:")."""
        text = self.llm_tokenizer.decode(ids, skip_special_tokens=True).strip()
        head, _, last = text.rpartition(" ")
        return head.strip() if last.isupper() and last.endswith(":") else text

    def texts(self, texts: list[str]) -> list[Tensor]:
        """Per text the embeddings [M, c] of its M segments (as long as CLIP's context; padded with id 0, masked)."""
        length = self.clip.config.text_config.max_position_embeddings
        device = self.clip.text_projection.weight.device
        embeddings = []
        for text in texts:
            ids = torch.tensor(self.tokenizer(text)["input_ids"], device=device)
            padding = -len(ids) % length
            mask = torch.nn.functional.pad(torch.ones_like(ids), (0, padding)).unflatten(0, (-1, length))
            ids = torch.nn.functional.pad(ids, (0, padding)).unflatten(0, (-1, length))
            pooled = self.clip.text_model(input_ids=ids, attention_mask=mask).pooler_output
            embeddings.append(self.clip.text_projection(pooled))
        return embeddings

    def flops(self, segments: float) -> float:
        """FLOPs of the text tower's matrix products for so many segments."""
        weights = sum(parameter.numel() for parameter in self.clip.text_model.encoder.parameters())
        return 2.0 * weights * segments * self.clip.config.text_config.max_position_embeddings


@functools.lru_cache(maxsize=1)
def load_clip_text(clip_path: str, llm_path: str, device: torch.device, dtype: torch.dtype) -> ClipText:
    """The last one used stays loaded, since a sweep installs its method once per cell."""
    return ClipText(clip_path, llm_path, device, dtype)


def instructions(prompt: Prompt, clip: ClipText) -> list[str]:
    """The text after the last image of every batch row."""
    lengths = prompt.question_lengths
    ids = prompt.input_ids.tolist()
    return [clip.instruction(row[len(row) - length :]) for row, length in zip(ids, lengths, strict=True)]
