"""The guided contrastive loss as one reads it: whole score matrices, PyTorch's own autograd, any precision.

This is the definition that every other backend is tested against. Shapes: B anchors, M negatives, R rows whose
loss is taken, D student width, G guide width; K = 2B + M vectors stacked as [anchors; positives; negatives].
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def guided_contrastive_reference(
    unit: Tensor,
    guides: Sequence[Tensor],
    ids: Tensor,
    temperature: Tensor,
    num_anchors: int,
    blocks: tuple[str, ...],
    *,
    row_offset: int,
    num_rows: int,
    margin: float,
    relative: bool,
    hard_only: bool,
    guide_min: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (R,), candidates kept in each of `blocks`, and the highest kept score of each row (R,).

    Args:
        unit: Student vectors of length 1, (K, D); the losses are differentiable in them.
        guides: Vectors of length 1, (K, G), of each guide; none to drop by identity alone.
        ids: Text ids, (K,). A candidate that shares its id with the row's anchor or positive is dropped.
        temperature: Scalar; the losses are differentiable in it.
        num_anchors: B.
        blocks: Which of "ap", "aa", "pp", "an" are used: the first letter is who looks, the second who is seen.
        row_offset: First row whose loss is taken.
        num_rows: R.
        margin: How far below the positive's guide score a candidate is dropped already.
        relative: Whether the margin is a share of the positive's guide score rather than a distance.
        hard_only: Whether candidates that the student scores below the own positive are dropped too.
        guide_min: Whether the lowest of the guides' scores counts, rather than the highest.
    """
    rows = slice(row_offset, row_offset + num_rows)
    column = {"a": slice(0, num_anchors), "p": slice(num_anchors, 2 * num_anchors), "n": slice(2 * num_anchors, None)}
    anchor_id, positive_id = (ids[column[role]][rows, None] for role in "ap")
    own = (unit[column["a"]][rows] * unit[column["p"]][rows]).sum(-1)
    of_guides = torch.amin if guide_min else torch.amax
    if guides:
        own_guide = of_guides(
            torch.stack([(guide[column["a"]][rows] * guide[column["p"]][rows]).sum(-1) for guide in guides]), 0
        )
        threshold = own_guide - (own_guide.abs() * margin if relative else margin)

    logits, kept, hardest = [], [], []
    for name in blocks:
        looker, seen = name[0], name[1]
        block = unit[column[looker]][rows] @ unit[column[seen]].T
        dropped = (ids[column[seen]] == anchor_id) | (ids[column[seen]] == positive_id)
        if guides:
            scores = torch.stack([guide[column[looker]][rows] @ guide[column[seen]].T for guide in guides])
            dropped |= of_guides(scores, 0) > threshold[:, None]
        if hard_only:
            dropped |= block.detach() < own.detach()[:, None]
        logits.append((block / temperature).masked_fill(dropped, -torch.inf))
        hardest.append(block.detach().masked_fill(dropped, -torch.inf))
        kept.append((~dropped).sum())

    others, top = torch.cat(logits, 1), torch.cat(hardest, 1).amax(1)
    alone = torch.isneginf(top)
    # softplus(log-sum-exp of the others - own logit); the softplus by log-sigmoid, exact where softplus turns linear.
    gap = torch.logsumexp(others.masked_fill(alone[:, None], 0.0), 1) - own / temperature
    losses = -torch.nn.functional.logsigmoid(-gap)
    return losses.masked_fill(alone, 0.0), torch.stack(kept), top
