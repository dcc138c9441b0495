"""The model that is trained: loaded, cut to some of its layers, its dropout set."""

import copy
import logging
from collections.abc import Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from gistfast.errors import ConfigError, ModelError, first_line
from gistfast.model_folder import model_folder
from gistfast.pretrained import Pooling, load_sentence_transformer, pick_device

logger = logging.getLogger(__name__)


def load_student(
    name: str,
    *,
    keep_layers: Sequence[int] | None = None,
    pooling: Pooling | None = None,
    max_length: int | None = None,
    dropout: float | None = None,
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
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether code that comes with the model may run.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ModelError: When the name leads to no model, or its layers cannot be cut.
        ConfigError: When `keep_layers` names layers that are not there, or `device` is not there.
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
    return model


def keep_transformer_layers(model: SentenceTransformer, layers: Sequence[int]) -> None:
    """Cut the model's transformer to some of its layers, in place.

    The smaller transformer is built from its own configuration and takes over the weights, so what is in
    memory is what a saved folder gives back, and whatever depends on a layer's number is right.

    Args:
        model: Any model whose transformer keeps its layers in lists of `num_hidden_layers`.
        layers: Numbers of the layers to keep, from 0 and ascending.

    Raises:
        ConfigError: When `layers` is empty, not ascending, or names a layer that is not there.
        ModelError: When the model has no such lists, or its weights do not fit the smaller transformer.
    """
    encoder = _encoder_of(model)
    num_layers: int = encoder.config.num_hidden_layers
    ascending = list(layers) == sorted(set(layers))
    if not layers or not ascending or layers[0] < 0 or layers[-1] >= num_layers:
        raise ConfigError(
            f"--keep-layers must be ascending numbers from 0 to {num_layers - 1}, the student's layers; "
            f"found {','.join(map(str, layers))}"
        )
    smaller = type(encoder)(_smaller_config(encoder.config, layers))
    try:
        smaller.load_state_dict(_kept_weights(encoder, num_layers, layers))
    except RuntimeError as error:
        raise ModelError(
            f"{type(encoder).__name__} does not work with layers {','.join(map(str, layers))} alone: "
            f"{first_line(error)}: leave --keep-layers out or keep other layers"
        ) from error
    smaller.train(encoder.training)
    nn.Module.to(smaller, device=encoder.device, dtype=encoder.dtype)
    for module in model.modules():
        if getattr(module, "model", None) is encoder:
            module.model = smaller
    logger.info("student: kept layers %s of %d", ",".join(map(str, layers)), num_layers)


def _encoder_of(model: SentenceTransformer) -> PreTrainedModel:
    encoder = model.transformers_model
    if not isinstance(encoder, PreTrainedModel) or not hasattr(encoder.config, "num_hidden_layers"):
        raise ModelError(f"the student has no transformer layers, its first module is {type(model[0]).__name__}")
    return encoder


def _smaller_config(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The configuration for the kept layers; lists with one item a layer, such as `layer_types`, are cut."""
    smaller = copy.deepcopy(config)
    for key, value in vars(config).items():
        if "layer" in key and isinstance(value, list | tuple) and len(value) == config.num_hidden_layers:
            setattr(smaller, key, [value[layer] for layer in layers])
    smaller.num_hidden_layers = len(layers)
    return smaller


def _kept_weights(encoder: PreTrainedModel, num_layers: int, layers: Sequence[int]) -> dict[str, Tensor]:
    """The state dict without the layers that go, the others renumbered from 0."""
    lists = _layer_lists(encoder, num_layers)
    new_number = {str(layer): str(number) for number, layer in enumerate(layers)}
    kept = {}
    for key, value in encoder.state_dict().items():
        prefix = next((prefix for prefix in lists if key.startswith(prefix)), "")
        number, dot, rest = key.removeprefix(prefix).partition(".")
        if not prefix:
            kept[key] = value
        elif number in new_number:
            kept[prefix + new_number[number] + dot + rest] = value
    return kept


def _layer_lists(encoder: PreTrainedModel, num_layers: int) -> list[str]:
    """Prefixes of the outermost module lists that hold one item a layer, such as "encoder.layer."."""
    lists = [
        f"{name}."
        for name, module in encoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    outermost = [name for name in lists if not any(name != other and name.startswith(other) for other in lists)]
    if not outermost:
        raise ModelError(f"{type(encoder).__name__} keeps no list of its {num_layers} layers: leave --keep-layers out")
    return outermost


def set_dropout(model: SentenceTransformer, probability: float) -> None:
    """Give every dropout of the model one probability, in its modules and in its configuration."""
    holders: list[Any] = [module for module in model.modules() if not isinstance(module, nn.Dropout)]
    if model.config is not None:
        holders.append(model.config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
    for holder in holders:
        for name, value in vars(holder).items():
            if "dropout" in name and isinstance(value, float):
                setattr(holder, name, probability)


def checkpoint_activations(model: SentenceTransformer) -> None:
    """Let the model's transformer recompute its activations in the backward pass instead of keeping them.

    Raises:
        ModelError: When the model has no transformer, or one that cannot.
    """
    encoder = _encoder_of(model)
    if not encoder.supports_gradient_checkpointing:
        raise ModelError(f"{type(encoder).__name__} cannot recompute: leave --gradient-checkpointing out")
    # Transformers renamed it; the old name warns.
    enable = getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
