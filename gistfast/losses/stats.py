"""What the mask did to a batch, and how student scores lie.

Shapes: B anchors, K candidates, R rows whose loss is taken, D student width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gistfast.kernels.fused import Layout, wide_dtype


@dataclass(frozen=True)
class LossStats:
    """What the mask did to a batch, and how the student scores its rows.

    Attributes:
        dropped: For each block in use ("ap", "aa", "pp", "an") the share of its candidates that was dropped, a scalar
            tensor in [0, 1]. The own positive, and a text met with itself in its own row, do not count as candidates.
        positive_score: (R,) student score of the row's own positive.
        hardest_score: (R,) highest student score among the candidates kept; -inf where none was.
        triplet: (R,) triplet terms, a part of the loss; None where there are none.
    """

    dropped: dict[str, Tensor]
    positive_score: Tensor
    hardest_score: Tensor
    triplet: Tensor | None = None

    def means(self) -> dict[str, Tensor]:
        """Scalars for a log: "dropped/ap", ..., "score/positive", "score/hardest", and "triplet" where there is one.

        Rows without a candidate have no hardest score; the mean is NaN where all rows are such.
        """
        kept = self.hardest_score > -torch.inf
        hardest = self.hardest_score.where(kept, 0).sum() / kept.sum()
        shares = {f"dropped/{block}": share for block, share in self.dropped.items()}
        triplet = {} if self.triplet is None else {"triplet": self.triplet.detach().mean()}
        return shares | {"score/positive": self.positive_score.mean(), "score/hardest": hardest} | triplet


def dropped_share(kept: Tensor, layout: Layout, num_rows: int) -> dict[str, Tensor]:
    """The share of candidates dropped in each block in use; 0 where a block has no candidates.

    Args:
        kept: Candidates kept in each block.
        layout: Of the blocks.
        num_rows: R.
    """
    shares = {}
    for index, (block, (_, first, end, _)) in enumerate(layout.blocks.items()):
        candidates = num_rows * (end - first - (block != "an"))
        shares[block] = 1.0 - kept[index] / candidates if candidates else torch.zeros((), device=kept.device)
    return shares


def unit_vectors(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """The vectors at length 1, in a dtype; differentiable."""
    vectors = vectors.to(dtype)
    unit: Tensor = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return unit


def positive_score(anchor: Tensor, positive: Tensor, row_offset: int, num_rows: int) -> Tensor:
    """The cosine of each row's anchor and positive, (R,), without a gradient.

    Args:
        anchor: (B, D).
        positive: (B, D).
        row_offset: First row.
        num_rows: R.
    """
    rows = slice(row_offset, row_offset + num_rows)
    columns = [anchor, positive]
    one, other = (unit_vectors(column[rows].detach(), wide_dtype(columns)) for column in columns)
    score: Tensor = torch.linalg.vecdot(one, other)
    return score
