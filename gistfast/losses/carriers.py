"""Which texts carry the gradient of a batch: when the softmax is sharp, few do.

What a text carries is the length of its gradient on the unit sphere, where the loss lives whatever the length of the
student's vectors; a tolerance bounds the length of all that is left out, relative to that of the whole.

Shapes: N texts, D student width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Carriers:
    """The texts that carry the gradient back.

    Attributes:
        places: (n,) their places among the texts, ascending.
        weights: (n,) what their gradients are multiplied by.
        left_out: Length of the gradient that the tolerance leaves out, relative to that of the whole.
    """

    places: Array
    weights: Array
    left_out: float


def carriers(gradient: Tensor, vectors: Tensor, sizes: Array, tolerance: float, *, unbiased: bool = False) -> Carriers:
    """The texts to replay: those with the largest shares of the squared gradient for each token that they cost.

    Args:
        gradient: (N, D) on the vectors.
        vectors: (N, D) of the texts.
        sizes: (N,) tokens of each text.
        tolerance: Relative length of what may be left out.
        unbiased: Draw some of the texts that would be left out, and let each stand for more than itself, so that the
            mean over the draws is the whole gradient.
    """
    on_sphere = torch.linalg.vector_norm(gradient, dim=1) * torch.linalg.vector_norm(vectors, dim=1)
    squares: Array = on_sphere.double().square().cpu().numpy()
    shares = squares / np.maximum(sizes, 1)
    order = np.argsort(-shares, kind="stable")
    # What is left out when the first n texts are taken, squared.
    rest = np.append(np.cumsum(squares[order[::-1]])[::-1], 0.0)
    # At least one: no gradient at all would leave several processes waiting for each other.
    count = max(int((rest > tolerance**2 * rest[0]).sum()), 1)
    left_out = float(np.sqrt(rest[count] / rest[0])) if rest[0] else 0.0
    smallest = shares[order[count - 1]]
    if not (unbiased and smallest):
        places = np.sort(order[:count])
        return Carriers(places, np.ones(count), left_out)
    # Least variance for the tokens spent: chances in proportion to the root of the share.
    chances = np.minimum(np.sqrt(shares / smallest), 1.0)
    places = np.flatnonzero(torch.rand(len(chances), dtype=torch.float64).numpy() < chances)
    return Carriers(places, 1 / chances[places], left_out)
