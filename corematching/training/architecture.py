"""The tiny LLaVA's shape and its structured start.

Stock ``LlavaForConditionalGeneration``; only the initial weights are unusual. The vision tower starts as a local
image analyser (cosine patch filters, heads that look at neighbouring patches), the language model as a machine that
matches equal codes (query and key maps equal, output maps the transpose of value maps) with one head that looks at the
previous token. Training from a random start needs far more steps than a CPU affords.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from corematching.benchmarks.mini.scenes import COLOURS, GRID, IMAGE_SIZE, PATCH, SHAPES, SIZES, TEXTURES
from corematching.training.codes import MARK_TO_TEXT, CodeBook
from corematching.training.vocabulary import CORE_WORDS, IMAGE_TOKEN


@dataclass(frozen=True)
class TinyShape:
    """Widths and depths; the defaults are the bundled model's."""

    layers: int = 12
    width: int = 192
    ffn: int = 512
    heads: int = 6
    vision_layers: int = 6
    vision_width: int = 128
    vision_ffn: int = 384
    vision_heads: int = 4


LOCAL_DIMS, GLOBAL_DIMS = 24, 8
_LOCAL_RATES = (2.6, 1.9, 1.3, 0.8, 0.45, 0.2)  # radians per patch
_NEIGHBOURS = (  # (dx, dy) in patches that each head of the first layers looks at
    ((-1, 0), (1, 0), (0, -1), (0, 1)),
    ((-1, -1), (1, 1), (2, 0), (-2, 0)),
    ((3, 0), (-3, 0), (0, 2), (0, -2)),
)


def build_config(tokenizer, shape: TinyShape) -> LlavaConfig:
    """The model's configuration, with LLaVA-1.5's image geometry: 336 px, patches of 14 px, 576 visual tokens."""
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=shape.vision_ffn,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=shape.vision_width,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokens = {
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=GRID * GRID,
        tie_word_embeddings=False,
        **tokens,
    )


def build_model(tokenizer, codes: CodeBook, shape: TinyShape, seed: int = 0) -> LlavaForConditionalGeneration:
    """A float32 model with the structured start; equal seeds give equal weights."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config(tokenizer, shape)).float()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        start_vision(model.model.vision_tower, generator)
        start_language(model, codes, generator)
    return model


def _orthogonal(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Random (rows, cols) matrix with orthonormal rows or columns."""
    size = max(rows, cols)
    return torch.linalg.qr(torch.randn(size, size, generator=generator))[0][:rows, :cols]


def deepen(shallow: LlavaForConditionalGeneration, deep: LlavaForConditionalGeneration) -> None:
    """Copy a trained model into a deeper one that computes the same function.

    The shallow model's decoder layers are spread evenly; the layers between them write nothing at first (their output
    maps are zero) but keep their structured start, so training can put them to use.

    Raises
    ------
    ValueError
        If the deep model has fewer decoder layers.
    """
    few, many = len(shallow.model.language_model.layers), len(deep.model.language_model.layers)
    if many < few:
        raise ValueError(f"cannot deepen {few} decoder layers to {many}")
    places = [number * many // few for number in range(few)]
    with torch.no_grad():
        state = {k: v for k, v in shallow.state_dict().items() if ".language_model.layers." not in k}
        deep.load_state_dict(state, strict=False)
        for number, layer in enumerate(deep.model.language_model.layers):
            if number in places:
                layer.load_state_dict(shallow.model.language_model.layers[places.index(number)].state_dict())
            else:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()


# --- vision --------------------------------------------------------------------------------------


def start_vision(tower, generator: torch.Generator) -> None:
    """Cosine patch filters, analytic places, neighbour-looking heads in the first three layers."""
    width = tower.config.hidden_size
    content = width - LOCAL_DIMS - GLOBAL_DIMS
    filters = torch.zeros(width, 3, PATCH, PATCH)
    filters[:content] = cosine_filters(content)
    tower.embeddings.patch_embedding.weight.copy_(filters)
    tower.embeddings.class_embedding.zero_()
    places = torch.zeros(GRID * GRID + 1, width)
    places[1:, content:] = analytic_places()
    tower.embeddings.position_embedding.weight.copy_(places)
    tower.embeddings.position_embedding.weight.requires_grad_(False)
    for layer, offsets in zip(tower.encoder.layers, _NEIGHBOURS):
        _look_at_neighbours(layer.self_attn, offsets, content, generator)


def cosine_filters(count: int) -> Tensor:
    """Low-frequency cosine patterns, half on brightness, a quarter on each colour difference: (count, 3, 14, 14)."""
    axis = torch.arange(PATCH) + 0.5
    order = sorted(((u, v) for u in range(PATCH) for v in range(PATCH)), key=lambda f: (f[0] + f[1], f))
    opponents = torch.tensor([[1.0, 1, 1], [1, -1, 0], [0.5, 0.5, -1]])
    opponents /= opponents.norm(dim=1, keepdim=True)
    filters = []
    for channel, share in zip(opponents, (count - 2 * (count // 4), count // 4, count // 4)):
        for u, v in order[:share]:
            pattern = torch.cos(math.pi * v * axis / PATCH)[:, None] * torch.cos(math.pi * u * axis / PATCH)[None]
            pattern = pattern / pattern.norm() / (7 if u + v == 0 else 3)  # the mean would drown the rest
            filters.append(channel[:, None, None] * pattern)
    return torch.stack(filters)


def analytic_places() -> Tensor:
    """Fixed codes of the 576 places, shape (576, 32): fast sines that tell neighbours apart, then slow global terms."""
    rows, cols = torch.meshgrid(torch.arange(GRID).float(), torch.arange(GRID).float(), indexing="ij")
    rates = torch.tensor(_LOCAL_RATES)
    local = [f(v.reshape(-1, 1) * rates) for v in (cols, rows) for f in (torch.cos, torch.sin)]
    x, y = ((v.reshape(-1, 1) + 0.5) / (GRID / 2) - 1 for v in (cols, rows))
    slow = [x, y, *(f(math.pi * v) for v in (x, y) for f in (torch.sin, torch.cos)), x.sign() * 0.5, y.sign() * 0.5]
    return torch.cat([*local, *slow], dim=1)


def _look_at_neighbours(attention, offsets: tuple, content: int, generator: torch.Generator, gain: float = 2.5) -> None:
    """Make head h attend to the patch at ``offsets[h]``: rotate the fast sines of the query by the offset."""
    head = attention.head_dim
    rates = torch.tensor(_LOCAL_RATES)
    query, key = torch.zeros_like(attention.q_proj.weight), torch.zeros_like(attention.k_proj.weight)
    for h, offset in enumerate(offsets):
        turn = torch.zeros(LOCAL_DIMS, LOCAL_DIMS)
        n = len(rates)
        for axis, step in enumerate(offset):
            c, s = torch.diag(torch.cos(rates * step)), torch.diag(torch.sin(rates * step))
            a, b = slice(2 * n * axis, 2 * n * axis + n), slice(2 * n * axis + n, 2 * n * (axis + 1))
            turn[a, a], turn[a, b], turn[b, a], turn[b, b] = c, -s, s, c
        query[h * head : h * head + LOCAL_DIMS, content : content + LOCAL_DIMS] = gain * turn
        key[h * head : h * head + LOCAL_DIMS, content : content + LOCAL_DIMS] = gain * torch.eye(LOCAL_DIMS)
    attention.q_proj.weight.copy_(query)
    attention.k_proj.weight.copy_(key)
    width = query.shape[1]
    attention.v_proj.weight.copy_(_orthogonal(width, width, generator))
    attention.out_proj.weight.copy_(0.3 * _orthogonal(width, width, generator))


# --- language ------------------------------------------------------------------------------------


def start_language(model: LlavaForConditionalGeneration, codes: CodeBook, generator: torch.Generator) -> None:
    """Words as codes, attention as matching of equal codes, one previous-token head in the first layer."""
    language = model.model.language_model
    language.embed_tokens.weight.copy_(codes.embeddings())
    model.lm_head.weight.copy_(codes.readout())
    width = language.config.hidden_size
    gain = 0.5 * math.sqrt(8 / len(language.layers))
    for layer in language.layers:
        attention = layer.self_attn
        value = _orthogonal(width, width, generator)
        _match_codes(attention, codes, language.config, generator)
        attention.v_proj.weight.copy_(value)
        attention.o_proj.weight.copy_(gain * value.T)
        for name in ("gate_proj", "up_proj"):
            weight = getattr(layer.mlp, name).weight
            weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(width) * 0.7)
        layer.mlp.down_proj.weight.copy_(
            torch.randn(layer.mlp.down_proj.weight.shape, generator=generator) * 0.1 / math.sqrt(width)
        )
    _previous_token_head(language.layers[0].self_attn, codes, language.config)


def _match_codes(attention, codes: CodeBook, config, generator: torch.Generator) -> None:
    """Every head attends where the key names what the query names; two in three look past text, one past the image.

    The match is made on named things only (the core words' span), in the slowly turning half of the rotary pairs, which
    hardly changes over 600 tokens.
    """
    width, head = config.hidden_size, attention.head_dim
    half = head // 2
    named = torch.stack([codes.unit(word) for word in CORE_WORDS])
    match = 0.5 * _orthogonal(width, width, generator)
    slow = (torch.arange(head) % half >= half // 2).nonzero()[:, 0]
    for number in range(config.num_attention_heads):
        rows = number * head + slow
        match[rows] = 1.2 * _orthogonal(len(slow), len(named), generator) @ named
    query, key = match.clone(), match.clone()
    for number in range(config.num_attention_heads):
        row = number * head + half - 1  # the slowest pair
        sign = -1.0 if number % 3 else 1.0
        query[row], key[row] = codes.text, sign * codes.text
    attention.q_proj.weight.copy_(query)
    attention.k_proj.weight.copy_(key)


def _previous_token_head(attention, codes: CodeBook, config) -> None:
    """Head 0 of the first layer attends one text token back and copies words that name things.

    It reads nothing but the mark common to all text tokens; rotary embeddings turn two constant vectors into a
    function of the distance alone, which peaks at one when the key starts out turned by one step.
    """
    head = attention.head_dim
    half, used = head // 2, 3
    rates = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    query, key = torch.zeros(head), torch.zeros(head)
    query[:used] = 1.0
    key[:used], key[half : half + used] = torch.cos(rates[:used]), torch.sin(rates[:used])
    gain = math.sqrt(12 * math.sqrt(head)) / 6.9  # a logit of 36 at distance one; 6.9: the mark after RMSNorm
    asks = codes.text - codes.mark / MARK_TO_TEXT  # nothing for option marks, whose letter is not about the word before
    attention.q_proj.weight[:head] = gain * torch.outer(query, asks)
    attention.k_proj.weight[:head] = gain * torch.outer(key, codes.text)
    named = [
        *"ABCDE",
        *COLOURS,
        *SHAPES,
        *TEXTURES,
        *SIZES,
        "left",
        "right",
        "above",
        "below",
        "tile",
        "sign",
        "object",
    ]
    value = torch.stack([codes.unit(word) for word in named[:head]])
    attention.v_proj.weight[:head] = 0
    attention.v_proj.weight[: len(value)] = value
    attention.o_proj.weight[:, :head] = 0.5 * attention.v_proj.weight[:head].T
