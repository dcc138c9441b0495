"""What a checkpoint holds besides the student's folder: weights that the folder has not, or not to the last bit.

checkpoint-N/
  (model files)         SentenceTransformer loads them; an adapter is merged
  trained.safetensors   an adapter and all that is trained with it; a learned temperature

The names in it are those of the student's weights with "student." before them, and those of the loss.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import nn

from gistfast.students.lora import has_lora

_FILE = "trained.safetensors"


def save_trained(folder: Path, model: SentenceTransformer, loss: nn.Module) -> None:
    """Write the weights that the student's folder does not hold as they are, if there are any."""
    weights = _weights(model, loss)
    if weights:
        save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, folder / _FILE)


def load_trained(folder: Path, model: SentenceTransformer, loss: nn.Module) -> None:
    """Take these weights over from a checkpoint, to the last bit."""
    weights = _weights(model, loss)
    if weights:
        found = load_file(folder / _FILE)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(found[name])


def _weights(model: SentenceTransformer, loss: nn.Module) -> dict[str, nn.Parameter]:
    """The loss's own parameters, and where the folder has an adapter merged, all that is trained."""
    own = {id(weight) for weight in model.parameters()}
    weights = {name: weight for name, weight in loss.named_parameters() if id(weight) not in own}
    if has_lora(model):
        weights |= {f"student.{name}": weight for name, weight in model.named_parameters() if weight.requires_grad}
    return weights
