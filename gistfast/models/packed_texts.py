"""Texts in one row, one after the other, in place of padding: for models whose attention can tell them apart.

Shapes: N texts, T tokens, D width.
"""

import logging
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn import functional

from gistfast.errors import ConfigError
from gistfast.models.encoder import encoder_of
from gistfast.models.packed_attention import pack_attention, unpack_attention

Attention = Literal["auto", "padded", "unpadded"]

logger = logging.getLogger(__name__)

# Beside what the model's own signature names.
_FEATURES = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


def pack_texts(model: SentenceTransformer) -> int:
    """Let a model take texts in one row, beside padded ones; the number of the position of a text's first token.

    Raises:
        ModelError: When its attention is not to be exchanged.
    """
    pack_attention(encoder_of(model))
    module: Any = model[0]
    if module.model_forward_params is not None:
        module.model_forward_params = module.model_forward_params | _FEATURES
    return _first_position(model)


def unpack_texts(model: SentenceTransformer) -> None:
    """Let the model take padded texts alone again."""
    unpack_attention(encoder_of(model))


def bounds_of_texts(lengths: Tensor, num_tokens: int, longest: int, first_position: int) -> dict[str, Any]:
    """What a pass is told beside its tokens: where in their row each text begins and ends.

    Args:
        lengths: (N,) tokens of each text.
        num_tokens: T, their sum.
        longest: Tokens of the longest text.
        first_position: From `pack_texts`.
    """
    bounds = functional.pad(lengths.cumsum(0), (1, 0))
    numbers = torch.arange(len(lengths), device=lengths.device)
    text_of = torch.repeat_interleave(numbers, lengths, output_size=num_tokens)
    positions = torch.arange(num_tokens, device=lengths.device) - bounds[text_of] + first_position
    return {
        "position_ids": positions[None],
        "cu_seq_lens_q": bounds.int(),
        "cu_seq_lens_k": bounds.int(),
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": text_of[None],
    }


def say_unpadded(device: torch.device, gives: str) -> None:
    """Log that texts are taken in one row, and what that gives."""
    way = "PyTorch's variable-length attention" if device.type == "cuda" else "text by text"
    logger.info("unpadded attention, %s: it gives the %s of padded texts", way, gives)


def refuse_unpadded(attention: Attention, reason: str) -> None:
    """Say why texts are taken padded.

    Raises:
        ConfigError: When they were not to be.
    """
    if attention == "unpadded":
        raise ConfigError(f"--attention unpadded cannot be had here: {reason}")
    logger.info("padded attention, because unpadded cannot be had here: %s", reason)


def largest_error(found: Tensor, right: Tensor) -> float:
    """Length of the largest difference of two rows (N, D), relative to that of the right one."""
    lengths = torch.linalg.vector_norm(right, dim=1).clamp_min(torch.finfo(right.dtype).tiny)
    return float((torch.linalg.vector_norm(found - right, dim=1) / lengths).max())


def _first_position(model: SentenceTransformer) -> int:
    """RoBERTa and its kin count positions from behind that of padding."""
    for module in model.modules():
        table, padding = getattr(module, "position_embeddings", None), getattr(module, "padding_idx", None)
        if isinstance(table, nn.Embedding) and isinstance(padding, int):
            return padding + 1
    return 0
