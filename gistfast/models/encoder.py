"""The transformer inside of a sentence-transformers model."""

from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel

from gistfast.errors import ModelError


def encoder_of(model: SentenceTransformer) -> PreTrainedModel:
    """The model's transformer.

    Raises:
        ModelError: When it has none with layers.
    """
    encoder = model.transformers_model
    if not isinstance(encoder, PreTrainedModel) or not hasattr(encoder.config, "num_hidden_layers"):
        raise ModelError(f"the model has no transformer layers, its first module is {type(model[0]).__name__}")
    return encoder
