"""The model that is trained: loaded, and given the shape that the run asks for."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import nn

from gistfast.errors import ConfigError, ModelError
from gistfast.models.encoder import encoder_of
from gistfast.models.folder import model_folder
from gistfast.models.pretrained import Pooling, load_sentence_transformer, pick_device
from gistfast.students.layers import freeze_parts, keep_transformer_layers
from gistfast.students.lora import Lora, add_lora
from gistfast.students.shape import add_head, set_normalize


def load_student(
    name: str,
    *,
    keep_layers: Sequence[int] | None = None,
    pooling: Pooling | None = None,
    max_length: int | None = None,
    dropout: float | None = None,
    width: int | None = None,
    normalize: bool | None = None,
    freeze: Sequence[str] = (),
    lora: Lora | None = None,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
) -> SentenceTransformer:
    """A student, ready to train and to save, in float32.

    Args:
        name: A folder or a hub id, of a sentence-transformers or (with `pooling`) a transformers model.
        keep_layers: Numbers of the transformer layers to keep, from 0 and ascending; None for all.
        pooling: How tokens become one vector; None for the model's own way.
        max_length: Tokens of a text that the student sees; None for its own limit.
        dropout: Probability of every dropout in the student; None for its own.
        width: Of the vectors, through a head that is new; None for the model's own.
        normalize: Whether its vectors have length 1; None for the model's own way.
        freeze: "embeddings" and numbers of layers, of those that are kept, that are not trained.
        lora: Adapter that is trained in place of the transformer's weights.
        seed: Decides the first weights of a head and an adapter.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether code that comes with the model may run.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ModelError: When the name leads to no model, or its layers cannot be cut.
        ConfigError: When layers are named that are not there, `freeze` leaves nothing to train, `width` is its own,
            there is no dropout to be set, or `device` is not there.
        DependencyError: When `lora` is given and peft is not installed.
    """
    folder = model_folder(name, revision=revision, trust_remote_code=trust_remote_code)
    model = load_sentence_transformer(
        folder,
        pooling=pooling,
        max_length=max_length,
        device=pick_device(device),
        trust_remote_code=trust_remote_code,
    )
    # Left to itself the model card asks the hub for models named like the folder, with retries.
    model.model_card_data.local_files_only = True
    if folder.revision is not None:
        model.model_card_data.base_model = folder.name
        model.model_card_data.base_model_revision = folder.revision
    if keep_layers is not None:
        keep_transformer_layers(model, keep_layers)
    if dropout is not None:
        set_dropout(model, dropout)
    if freeze:
        freeze_parts(model, freeze)
    if normalize is not None:
        set_normalize(model, normalize)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if width is not None:
            add_head(model, width)
        if lora is not None:
            add_lora(model, lora)
        frozen = bool(freeze) and not _learns(model)
    if frozen:
        raise ConfigError(f"--freeze {','.join(freeze)} leaves nothing to train: freeze less")
    return model


def _learns(model: SentenceTransformer) -> bool:
    """Whether any of the weights that are trained moves the vectors: the pooler of BERT, for one, does not."""
    with torch.enable_grad():
        features = batch_to_device(model.preprocess(["a text"]), model.device)
        return bool(model(features)["sentence_embedding"].requires_grad)


def check_learning_rates(rates: Mapping[str, float], model: SentenceTransformer, more: Sequence[str] = ()) -> None:
    """Refuse a regular expression that finds none of the trained weights.

    Args:
        rates: Learning rate by expression.
        model: The student.
        more: Names of the loss's own weights.

    Raises:
        ConfigError: With a name that could be found.
    """
    # As the optimizer calls them, which sees the student as a part of the loss.
    names = [f"model.{name}" for name, weight in model.named_parameters() if weight.requires_grad]
    names += more
    for pattern in rates:
        if not any(re.search(pattern, name) for name in names):
            raise ConfigError(
                f"--learning-rates: {pattern!r} finds none of the weights that are trained, such as {names[0]}"
            )


def set_dropout(model: SentenceTransformer, probability: float) -> None:
    """Give every dropout of the model one probability, in its modules and in its configuration.

    Raises:
        ConfigError: When it is above 0 and the model has none.
    """
    holders: list[Any] = [*model.modules(), *([] if model.config is None else [model.config])]
    # PyTorch's own module calls it p.
    found = [(holder, "p") for holder in holders if isinstance(holder, nn.Dropout)]
    found += [
        (holder, name)
        for holder in holders
        for name, value in vars(holder).items()
        if "dropout" in name and isinstance(value, float)
    ]
    if probability > 0 and not found:
        raise ConfigError(f"--dropout {probability:g}: the student has no dropout: leave it out")
    for holder, name in found:
        setattr(holder, name, probability)


def checkpoint_activations(model: SentenceTransformer) -> None:
    """Let the model's transformer recompute its activations in the backward pass instead of keeping them.

    Raises:
        ModelError: When the model has no transformer, or one that cannot.
    """
    encoder = encoder_of(model)
    if not encoder.supports_gradient_checkpointing:
        raise ModelError(f"{type(encoder).__name__} cannot recompute: leave --gradient-checkpointing out")
    # Transformers renamed it; the old name warns.
    enable = getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
