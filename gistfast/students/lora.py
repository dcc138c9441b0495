"""Low-rank adapters (LoRA): small matrices beside the frozen weights of a student's transformer.

During a run they stay beside the weights. Where the student is saved, they are merged into a copy of the weights: the
folder is a whole model, which loads without peft and is as quick as before.

Source: LoRA, arXiv:2106.09685.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

from gistfast.errors import ConfigError, first_line
from gistfast.models.adapter import import_peft
from gistfast.models.encoder import encoder_of
from gistfast.students.layers import replace_encoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lora:
    """An adapter.

    Attributes:
        rank: Inner width of its matrices.
        alpha: The product of the matrices counts alpha / rank; None for twice the rank.
        dropout: Before its matrices.
        targets: Ends of the names of the linear layers that get it; none for all linear layers.
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ()


def add_lora(model: SentenceTransformer, lora: Lora) -> None:
    """Put an adapter beside the weights of the model's transformer, and freeze these, in place.

    What comes behind the transformer, such as a head, is trained as before.

    Raises:
        ConfigError: When no layer has the name of a target.
        DependencyError: When peft is not installed.
        ModelError: When the model has no transformer.
    """
    peft: Any = import_peft("--lora-rank trains an adapter")
    encoder = encoder_of(model)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) or "all-linear",
    )
    try:
        peft.inject_adapter_in_model(config, encoder)
    except ValueError as error:
        raise ConfigError(f"--lora-targets {','.join(lora.targets)}: {first_line(error)}") from error
    trained = sum(weight.numel() for weight in encoder.parameters() if weight.requires_grad)
    logger.info("student: an adapter of rank %d with %.2f M weights, all others frozen", lora.rank, trained / 1e6)


def has_lora(model: SentenceTransformer) -> bool:
    """Whether an adapter lies beside the weights of the model's transformer."""
    return any(".lora_" in name for name, _ in model.named_parameters())


@contextmanager
def merged(model: SentenceTransformer) -> Iterator[None]:
    """While it lasts, the model's adapter, if it has one, is merged: to save the model whole."""
    if not has_lora(model):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    # Taken out of the weights again, an adapter leaves other weights than before: so it goes into a copy of them.
    adapted: Any = encoder_of(model)
    whole = copy.deepcopy(adapted)
    for name, layer in list(whole.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            whole.set_submodule(name, layer.get_base_layer())
    del whole.peft_config
    replace_encoder(model, whole)
    try:
        yield
    finally:
        replace_encoder(model, adapted)


def save_adapter(model: SentenceTransformer, folder: Path, base: str) -> None:
    """Write the model's adapter alone, as peft reads it.

    Args:
        model: The student.
        folder: Where to.
        base: Folder or hub id of the model that the adapter was trained on.
    """
    peft: Any = import_peft("--lora-rank trains an adapter")
    encoder: Any = encoder_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(encoder.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    weights = peft.get_peft_model_state_dict(encoder, save_embedding_layers=False)
    tensors = {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
