"""Texts in one row without padding, for students whose attention can tell them apart."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from gistfast.models.packed_texts import bounds_of_texts, pack_texts
from gistfast.students.input import InputForm, TextSet


@dataclass(frozen=True)
class PackedForm(InputForm):
    """What the student takes of texts in one row.

    Attributes:
        first_position: Number of the position of a text's first token.
    """

    first_position: int

    def features(self, texts: TextSet, first: int, end: int, kind: int) -> dict[str, Any]:
        """The features of the texts from `first` to `end`: a row of tokens, and where each text begins and ends."""
        ids, _ = self.one_row(texts, first, end)
        longest = int(texts.sizes[first:end].max())
        bounds = bounds_of_texts(texts.lengths[first:end], len(ids), longest, self.first_position)
        zeros = {name: torch.zeros_like(ids)[None] for name in self.zeros}
        return {"input_ids": ids[None], **bounds, **zeros, **self.constants[kind]}


def pack(model: SentenceTransformer, form: InputForm) -> PackedForm:
    """Let the student take texts in one row, too.

    Args:
        model: The student.
        form: What it takes of padded texts.

    Raises:
        ModelError: When its attention is not to be exchanged.
    """
    shared = {field.name: getattr(form, field.name) for field in fields(form)}
    return PackedForm(**shared, first_position=pack_texts(model))
