"""What follows a student's pooling: a head to another width, vectors of length 1 or as they come."""

import logging

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from torch import nn

from gistfast.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)


def add_head(model: SentenceTransformer, width: int) -> None:
    """Map the model's vectors to another width by a matrix that is drawn at random, before they are normalised.

    Args:
        model: Any model.
        width: Of the vectors then.

    Raises:
        ConfigError: When the model has this width already.
        ModelError: When the model does not say how wide it is.
    """
    before = model.get_embedding_dimension()
    if before is None:
        raise ModelError("the student does not say how wide its vectors are: leave --dim out")
    if before == width:
        raise ConfigError(f"--dim is {width}, and the student's vectors are {width} wide already: leave it out")
    head = Dense(before, width, bias=False, activation_function=nn.Identity()).to(model.device)
    norms = _trailing_norms(model)
    for name in norms:
        delattr(model, name)
    model.add_module(_free_name(model, "head"), head)
    for name, norm in norms.items():
        model.add_module(name, norm)
    logger.info("student: a head from %d to %d", before, width)


def set_normalize(model: SentenceTransformer, on: bool) -> None:
    """Let the model's vectors have length 1, or the length that they come with; in place."""
    norms = _trailing_norms(model)
    if on and not norms:
        model.add_module(_free_name(model, "normalize"), Normalize())
    for name in () if on else norms:
        delattr(model, name)


def _trailing_norms(model: SentenceTransformer) -> dict[str, nn.Module]:
    """The normalising modules that the model ends with, by name."""
    ending: dict[str, nn.Module] = {}
    for name, module in model.named_children():
        ending = {**ending, name: module} if isinstance(module, Normalize) else {}
    return ending


def _free_name(model: SentenceTransformer, wanted: str) -> str:
    """A name that none of the model's modules has."""
    taken = [name for name, _ in model.named_children()]
    return wanted if wanted not in taken else f"{wanted}_{len(taken)}"
