"""A student whose transformer is compiled for its training passes: one graph for passes of any size.

Evaluation, whose passes are of other kinds, and what is saved stay as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import PreTrainedModel

from gistfast.models.encoder import encoder_of
from gistfast.students.input import InputForm, TextSet


@dataclass(frozen=True)
class CompiledForm(InputForm):
    """What the student takes of padded texts, and its transformer, compiled.

    Attributes:
        encoder: The transformer.
        forward: Its forward pass, compiled.
    """

    encoder: PreTrainedModel
    forward: Callable[..., Any]

    def embed(self, model: Any, texts: TextSet, first: int, end: int, kind: int) -> Tensor:
        """The vectors of the texts from `first` to `end`, by one forward pass of the student."""
        if not self.encoder.training:
            return super().embed(model, texts, first, end, kind)
        # For this pass alone: a copy of the encoder, made to be saved, must not carry it.
        vars(self.encoder)["forward"] = self.forward
        try:
            return super().embed(model, texts, first, end, kind)[: end - first]
        finally:
            del vars(self.encoder)["forward"]

    def features(self, texts: TextSet, first: int, end: int, kind: int) -> dict[str, Any]:
        """The features of the texts from `first` to `end`; a text that is alone comes twice in training.

        A graph for any number of texts holds for two or more.
        """
        features = super().features(texts, first, end, kind)
        if end - first > 1 or not self.encoder.training:
            return features
        return {name: value.repeat(2, 1) if torch.is_tensor(value) else value for name, value in features.items()}


def compiled(model: SentenceTransformer, form: InputForm) -> CompiledForm:
    """The same form with the transformer compiled, when its first pass is made.

    Args:
        model: The student.
        form: What it takes, padded.

    Raises:
        ModelError: When the student has no transformer.
    """
    encoder = encoder_of(model)
    # Dropout draws what it draws otherwise: a replay, whose two passes are two graphs, needs the same draw.
    forward = torch.compile(encoder.forward, dynamic=True, fullgraph=True, options={"fallback_random": True})
    shared = {field.name: getattr(form, field.name) for field in fields(form)}
    return CompiledForm(**shared, encoder=encoder, forward=forward)
