"""The layers of a student's transformer: some of them kept, some of its weights frozen."""

import copy
import logging
from collections.abc import Sequence

from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from gistfast.errors import ConfigError, ModelError, first_line
from gistfast.models.encoder import encoder_of

logger = logging.getLogger(__name__)


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
    encoder = encoder_of(model)
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
    replace_encoder(model, smaller)
    logger.info("student: kept layers %s of %d", ",".join(map(str, layers)), num_layers)


def replace_encoder(model: SentenceTransformer, encoder: PreTrainedModel) -> None:
    """Let the model have another transformer in place of its own."""
    own = encoder_of(model)
    for module in list(model.modules()):
        if getattr(module, "model", None) is own:
            module.model = encoder


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


def freeze_parts(model: SentenceTransformer, parts: Sequence[str]) -> None:
    """Keep parts of the model's transformer as they are: no gradient is taken for them.

    Args:
        model: Any model whose transformer keeps its layers in lists.
        parts: "embeddings", which is all of the transformer's embeddings with their norm, and numbers of layers.

    Raises:
        ConfigError: When a part is not there.
        ModelError: When the model has no layers.
    """
    encoder = encoder_of(model)
    num_layers: int = encoder.config.num_hidden_layers
    unknown = [part for part in parts if part != "embeddings" and part not in map(str, range(num_layers))]
    if unknown:
        raise ConfigError(
            f"--freeze knows embeddings and the student's layers, 0 to {num_layers - 1}; found {', '.join(unknown)}"
        )
    lists = _layer_lists(encoder, num_layers)
    of_layers = tuple(f"{prefix}{part}." for prefix in lists for part in parts)
    word_vectors = {id(weight) for weight in encoder.get_input_embeddings().parameters()}
    count = 0
    for name, weight in encoder.named_parameters():
        embeds = id(weight) in word_vectors or ("embed" in name and not name.startswith(tuple(lists)))
        if name.startswith(of_layers) or (embeds and "embeddings" in parts):
            weight.requires_grad_(False)
            count += weight.numel()
    logger.info("student: froze %s, %.1f M weights", ",".join(parts), count / 1e6)
