"""The guided contrastive loss in PyTorch's terms: an autograd function, and an operator for torch.compile.

Shapes: B anchors, M negatives, K = 2B + M, R rows whose loss is taken, D student width, G guide width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gistfast.kernels import chunked, fused
from gistfast.kernels.fused import Settings

Gradients = tuple[list[Tensor], Tensor | None]  # on the vectors of each role, and on the temperature if wanted


class UnusableVectorError(ValueError):
    """A vector is zero or not finite; the message names it."""


def refuse_unusable(lengths: dict[str, list[Tensor]]) -> None:
    """Raise if a vector is zero or not finite; `lengths` of anchors, positives and negatives by whose they are.

    Raises:
        UnusableVectorError: Naming the first such vector by its role and row.
    """
    for whose, roles in lengths.items():
        for role, length in zip(("anchor", "positive", "negative"), roles, strict=False):
            for row in ((length > 0) & (length < torch.inf)).logical_not().nonzero()[:1, 0].tolist():
                found = "zero" if float(length[row]) == 0 else "not finite"
                raise UnusableVectorError(
                    f"the {whose} vector of {role} {row} is {found}: a cosine needs a finite vector of length above 0; "
                    "look at the text of that row, or lower the learning rate if the run has diverged"
                )


def guided_contrastive(
    vectors: list[Tensor], guide: list[Tensor], ids: list[Tensor], temperature: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (a scalar or (R,)), candidates kept in each block, and the highest kept score of each row (R,).

    Args:
        vectors: Student vectors of each role: anchor, positive and perhaps negative; (B, D), (B, D), (M, D).
        guide: Guide vectors of each role, or nothing.
        ids: Text ids of each role, int32 or int64.
        temperature: Scalar tensor, fp32 or fp64.
        settings: Everything else.

    Raises:
        UnusableVectorError: When a vector is zero or not finite.
    """
    if torch.compiler.is_compiling():
        loss, kept, top, *_ = _operator(vectors, guide, ids, temperature, None, *settings)
        return loss, kept, top
    result: tuple[Tensor, Tensor, Tensor] = _Function.apply(
        settings, len(vectors), len(guide), temperature, *vectors, *guide, *ids
    )
    return result


def _run(
    vectors: Sequence[Tensor], guide: Sequence[Tensor], ids: Sequence[Tensor], temperature: Tensor,
    row_weights: Tensor | None, settings: Settings,
) -> fused.Result:  # fmt: skip
    """Losses and, if wanted, gradients: of the mean, or of the sum weighted by `row_weights`."""
    backend = _backend(settings.backend)
    num_negatives = len(vectors[2]) if len(vectors) > 2 else 0
    layout = fused.Layout(
        len(vectors[0]), num_negatives, settings.contrast_anchors, settings.contrast_positives,
        backend.alignment(vectors[0].device),
    )  # fmt: skip
    with torch.autocast(vectors[0].device.type, enabled=False):
        result = fused.loss_and_gradients(
            vectors, guide, ids, temperature, layout, settings, backend, row_weights=row_weights
        )  # fmt: skip
    # Last, because it waits for the device: everything else is under way by now.
    if bool(result.unusable):
        refuse_unusable(result.lengths)
    return result


def _backend(name: str) -> fused.Backend:
    """The module that makes tiles."""
    if name == "chunked":
        return chunked
    from gistfast.kernels import triton_backend

    return triton_backend


class _Function(torch.autograd.Function):
    """The loss outside torch.compile; its overhead is a fraction of an operator's."""

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, num_roles: int, num_guides: int, temperature: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, kept, top."""
        ctx.settings, ctx.counts = settings, (num_roles, num_guides)
        ctx.dtypes = [*(tensor.dtype for tensor in tensors[:num_roles]), temperature.dtype]
        result = _run(*_split(tensors, ctx.counts), temperature, None, settings)
        if settings.with_gradients and settings.mean:
            on_temperature = [] if result.on_temperature is None else [result.on_temperature]
            ctx.save_for_backward(*result.on_vectors, *on_temperature)
        else:
            ctx.save_for_backward(*tensors, temperature)
        ctx.mark_non_differentiable(result.kept, result.top)
        return result.losses.mean() if settings.mean else result.losses, result.kept, result.top

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
        """Gradients on temperature and vectors."""
        on_vectors, on_temperature = _gradients(ctx, grad_loss, in_graph=False)
        num_roles, num_guides = ctx.counts
        return None, None, None, on_temperature, *on_vectors, *[None] * (num_guides + num_roles)


def _split(
    tensors: Sequence[Tensor], counts: tuple[int, int]
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Vectors, guide vectors and ids, as they follow each other."""
    first, second = counts[0], counts[0] + counts[1]
    return tensors[:first], tensors[first:second], tensors[second : second + first]


def _gradients(ctx: Any, grad_loss: Tensor, *, in_graph: bool) -> Gradients:
    """Gradients on vectors and temperature: those of the forward pass, or made now that the rows' weights are known.

    With `in_graph` the backward pass is being traced: no value may be looked at, and only operators leave a trace.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "guided_contrastive_loss takes its gradient in the forward pass and cannot be differentiated twice: "
            "call backward without create_graph, or use backend='reference'"
        )
    if ctx.settings.mean:
        # On a CPU a look at the weight costs nothing, and one of 1 saves a copy of the gradients. Elsewhere the cast to
        # the vectors' dtype comes with the product, in one launch and without a copy in between.
        is_one = not in_graph and grad_loss.device.type == "cpu" and float(grad_loss) == 1
        scaled = [
            gradient if is_one else torch.mul(gradient, grad_loss, out=torch.empty_like(gradient, dtype=dtype))
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=False)
        ]
        on_vectors, on_temperature = scaled[: ctx.counts[0]], (scaled[ctx.counts[0] :] or [None])[0]
    else:
        *tensors, temperature = ctx.saved_tensors
        settings = ctx.settings._replace(with_gradients=True)
        columns = map(list, _split(tensors, ctx.counts))
        run_again = _operate_again if in_graph else _run_again
        on_vectors, on_temperature = run_again(*columns, temperature, grad_loss.contiguous(), settings)
    on_vectors = [gradient.to(dtype) for gradient, dtype in zip(on_vectors, ctx.dtypes, strict=False)]
    return on_vectors, None if on_temperature is None else on_temperature.to(ctx.dtypes[-1])


def _run_again(*arguments: Any) -> Gradients:
    """The gradients of `_run`."""
    result = _run(*arguments)
    return result.on_vectors, result.on_temperature


@torch.library.custom_op("gistfast::guided_contrastive", mutates_args=())
def _operator(
    vectors: Sequence[Tensor], guide: Sequence[Tensor], ids: Sequence[Tensor], temperature: Tensor,
    row_weights: Tensor | None, row_offset: int, num_rows: int, margin: float, relative: bool, contrast_anchors: bool,
    contrast_positives: bool, hard_only: bool, guide_widths: Sequence[int], guide_min: bool, half: bool,
    lowest_temperature: float, with_gradients: bool, learn_temperature: bool, mean: bool, chunk_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Loss, kept, top, and the gradients on temperature and vectors; empty where they are not wanted."""
    settings = Settings(
        row_offset, num_rows, margin, relative, contrast_anchors, contrast_positives, hard_only, guide_widths,
        guide_min, half, lowest_temperature, with_gradients, learn_temperature, mean, chunk_bytes, backend,
    )  # fmt: skip
    result = _run(vectors, guide, ids, temperature, row_weights, settings)
    on_temperature = temperature.new_empty(0) if result.on_temperature is None else result.on_temperature
    return result.losses.mean() if mean else result.losses, result.kept, result.top, on_temperature, result.on_vectors


@_operator.register_fake
def _(
    vectors: Sequence[Tensor], guide: Sequence[Tensor], ids: Sequence[Tensor], temperature: Tensor,
    row_weights: Tensor | None, row_offset: int, num_rows: int, margin: float, relative: bool, contrast_anchors: bool,
    contrast_positives: bool, hard_only: bool, guide_widths: Sequence[int], guide_min: bool, half: bool,
    lowest_temperature: float, with_gradients: bool, learn_temperature: bool, mean: bool, chunk_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Shapes of the outputs, for tracing."""
    wide = fused.wide_dtype(vectors)
    num_blocks = 1 + contrast_anchors + contrast_positives + (len(vectors) > 2)
    new = vectors[0].new_empty
    return (
        new(() if mean else (num_rows,), dtype=wide),
        new((num_blocks,), dtype=torch.int64),
        new((num_rows,), dtype=wide),
        new(() if with_gradients and learn_temperature else (0,), dtype=wide),
        [new(role.shape, dtype=wide) for role in vectors] if with_gradients else [],
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """Keep what `_gradients` reads."""
    vectors, guide, ids, temperature, _, *settings = inputs
    ctx.settings, ctx.counts = Settings(*settings), (len(vectors), len(guide))
    ctx.dtypes = [*(role.dtype for role in vectors), temperature.dtype]
    if ctx.settings.mean:
        ctx.save_for_backward(*output[4], *([output[3]] if ctx.settings.learn_temperature else []))
    else:
        ctx.save_for_backward(*vectors, *guide, *ids, temperature)


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    """Gradients in the order of the operator's inputs."""
    on_vectors, on_temperature = _gradients(ctx, grad_loss, in_graph=True)
    num_roles, num_guides = ctx.counts
    # Numbers have no gradient; but an empty list, of widths, counts as one of tensors.
    on_settings: list[Any] = [[] if value == [] else None for value in ctx.settings]
    return on_vectors, [None] * num_guides, [None] * num_roles, on_temperature, None, *on_settings


def _operate_again(*arguments: Any) -> Gradients:
    """The gradients of the operator, which a trace of the backward pass holds as such."""
    *tensors, settings = arguments
    *_, on_temperature, on_vectors = _operator(*tensors, *settings)
    return on_vectors, on_temperature if settings.learn_temperature else None


_operator.register_autograd(_backward, setup_context=_setup_context)
