"""Texts in one row without padding, for students whose attention can tell them apart.

Shapes: N texts, T tokens.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from gistfast.models.packed_attention import pack_attention, unpack_attention
from gistfast.students.input import InputForm, TextSet
from gistfast.students.layers import encoder_of

# Beside what the model's own signature names.
_FEATURES = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


@dataclass(frozen=True)
class PackedForm(InputForm):
    """What the student takes of texts in one row.

    Attributes:
        first_position: Number of the position of a text's first token.
    """

    first_position: int

    def features(self, texts: TextSet, first: int, end: int, kind: int) -> dict[str, Any]:
        """The features of the texts from `first` to `end`: a row of tokens, and where each text begins and ends."""
        ids, starts = self.one_row(texts, first, end)
        lengths = texts.lengths[first:end]
        numbers = torch.arange(len(lengths), device=ids.device)
        text_of = torch.repeat_interleave(numbers, lengths, output_size=len(ids))
        positions = torch.arange(len(ids), device=ids.device) - starts[text_of] + self.first_position
        bounds = torch.cat([starts, starts[-1:] + lengths[-1:]]).int()
        longest = int(texts.sizes[first:end].max())
        zeros = {name: torch.zeros_like(ids)[None] for name in self.zeros}
        return {
            "input_ids": ids[None],
            "position_ids": positions[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": text_of[None],
            **zeros,
            **self.constants[kind],
        }


def pack(model: SentenceTransformer, form: InputForm) -> PackedForm:
    """Let the student take texts in one row, too.

    Args:
        model: The student.
        form: What it takes of padded texts.

    Raises:
        ModelError: When its attention is not to be exchanged.
    """
    pack_attention(encoder_of(model))
    module: Any = model[0]
    if module.model_forward_params is not None:
        module.model_forward_params = module.model_forward_params | _FEATURES
    shared = {field.name: getattr(form, field.name) for field in fields(form)}
    return PackedForm(**shared, first_position=_first_position(model))


def unpack(model: SentenceTransformer) -> None:
    """Let the student take padded texts alone again."""
    unpack_attention(encoder_of(model))


def _first_position(model: SentenceTransformer) -> int:
    """RoBERTa and its kin count positions from behind that of padding."""
    for module in model.modules():
        table, padding = getattr(module, "position_embeddings", None), getattr(module, "padding_idx", None)
        if isinstance(table, nn.Embedding) and isinstance(padding, int):
            return padding + 1
    return 0
