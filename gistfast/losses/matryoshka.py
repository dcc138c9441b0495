"""A loss at several widths: vectors that are good when they are cut, too.

Source: Matryoshka Representation Learning, arXiv:2205.13147.

Shapes: C columns, B rows, D student width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from gistfast.errors import ConfigError


@dataclass(frozen=True)
class Matryoshka:
    """Widths at which the loss is taken of a student's vectors.

    Attributes:
        weights: What the loss counts at each width, the student's own among them; by the widths, ascending.
    """

    weights: Mapping[int, float]

    @property
    def cuts(self) -> list[int]:
        """The widths but the student's own, the widest first."""
        return sorted(self.weights, reverse=True)[1:]

    def loss(self, contrast: Callable[[Tensor], Tensor], columns: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses, and the loss at each width by its name in the log, "loss_at/WIDTH".

        Whatever `contrast` leaves behind is that of the vectors as a whole: they come last.

        Args:
            contrast: The loss of vectors cut to a width, (C, B, width).
            columns: (C, B, D).
        """
        losses = {width: contrast(columns[..., :width]) for width in self.weights}
        terms = [weight * losses[width] for width, weight in self.weights.items()]
        return sum(terms[1:], start=terms[0]), {f"loss_at/{width}": loss.detach() for width, loss in losses.items()}


def matryoshka(own_width: int, dims: Sequence[int], weights: Sequence[float]) -> Matryoshka:
    """The widths of a run: those that vectors may be cut to, and the student's own.

    Args:
        own_width: Of the student's vectors.
        dims: That they may be cut to.
        weights: What the loss counts at each of them; none for 1. At the own width it counts 1 unless that is among
            them.

    Raises:
        ConfigError: When a width is more than the student has, or there is none but its own.
    """
    if (widest := max(dims)) > own_width:
        raise ConfigError(f"--matryoshka-dims {widest}: the student's vectors are {own_width} wide: give less")
    if min(dims) == own_width:
        raise ConfigError(
            f"--matryoshka-dims {own_width} is the student's own width, which is trained anyway: give smaller ones"
        )
    counts = {own_width: 1.0} | dict(zip(dims, weights or [1.0] * len(dims), strict=True))
    return Matryoshka(dict(sorted(counts.items())))
