"""What guides say of two texts: the cosine of their vectors, and one score where there are several guides.

# N, Q vectors, P pairs, G numbers in a vector: the vectors of all guides side by side
"""

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from gistfast.store import GuideStore

# What is multiplied at once stays in the processor's cache: 1,024 x 384 fp32 are 1.5 MiB.
NUMBERS_AT_ONCE = 2**18


@dataclass(frozen=True)
class Scorer:
    """How vectors of a store become scores.

    Attributes:
        widths: Numbers in a vector of each guide; they sum up to G.
        how: Whether a score is the mean, the smallest or the largest of the guides' cosines. For the mean, the
            vectors carry the weights: their inner product is the weighted mean.
    """

    widths: tuple[int, ...]
    how: Literal["mean", "min", "max"] = "mean"

    @classmethod
    def of(cls, store: "GuideStore") -> "Scorer":
        """The scorer of a store's vectors."""
        return cls(store.guide_widths, store.guide_score)

    def unit(self, vectors: Tensor) -> Tensor:
        """The vectors (N, G) as fp32, so scaled that inner products are cosines."""
        return torch.cat([normalize(part, dim=1) for part in self._parts(vectors.float())], dim=1)

    def centre(self, vectors: Tensor) -> Tensor:
        """A vector (G,) that may be taken off y in `block`: scores with x then lack their product with it.

        That is the mean of the unit vectors (N, G); zero where a score is more than one inner product.
        """
        is_product = len(self._parts(vectors)) == 1 and len(vectors) > 0
        return vectors.mean(dim=0) if is_product else vectors.new_zeros(vectors.shape[1])

    def block(self, x: Tensor, y: Tensor) -> Tensor:
        """The scores (Q, N) of each of x (Q, G) with each of y (N, G), in their dtype.

        Args:
            x: From `unit`, rounded to any dtype.
            y: As `x`.
        """
        return self._joined([one @ other.T for one, other in zip(self._parts(x), self._parts(y), strict=True)])

    def rows(self, x: Tensor, y: Tensor) -> Tensor:
        """The scores (P,) of each of x with the one of y in its place, fp32.

        Sums are taken in double precision, so that the same vectors give the same score in whatever company.

        Args:
            x: (P, G) from `unit`.
            y: As `x`.
        """
        step = self._pairs_at_once(x)
        scores = torch.empty(len(x), device=x.device)
        for first in range(0, len(x), step):
            rows = slice(first, first + step)
            cosines = [part.sum(dim=1, dtype=torch.float64) for part in self._parts(x[rows] * y[rows])]
            scores[rows] = self._joined(cosines).float()
        return scores

    def pairs(self, x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
        """The scores (P,) of the vectors x[of_x] with y[of_y], fp32, as `rows` has them.

        Args:
            x: (Q, G) from `unit`.
            y: (N, G) from `unit`.
            of_x: (P,) integers.
            of_y: (P,) integers.
        """
        step = self._pairs_at_once(x)
        scores = torch.empty(len(of_x), device=x.device)
        for first in range(0, len(of_x), step):
            pairs = slice(first, first + step)
            scores[pairs] = self.rows(x[of_x[pairs]], y[of_y[pairs]])
        return scores

    def _pairs_at_once(self, vectors: Tensor) -> int:
        return max(NUMBERS_AT_ONCE // vectors.shape[1], 1) if vectors.device.type == "cpu" else 2**18

    def _parts(self, vectors: Tensor) -> tuple[Tensor, ...]:
        return (vectors,) if self.how == "mean" else torch.split(vectors, list(self.widths), dim=1)

    def _joined(self, cosines: list[Tensor]) -> Tensor:
        return reduce(torch.maximum if self.how == "max" else torch.minimum, cosines)
