"""What tells one guide from every other: everything that its vectors depend on."""

import logging
import math
from typing import TYPE_CHECKING

from gistfast.errors import ModelError
from gistfast.models.folder import ModelFolder
from gistfast.models.prompts import own_prompt
from gistfast.store import GuideInfo

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)


def describe_guide(
    model: "SentenceTransformer",
    folder: ModelFolder,
    *,
    query_prompt: str | None,
    document_prompt: str | None,
    compute_dtype: str,
    decoded_with: str | None,
) -> GuideInfo:
    """What a store records of a guide.

    Args:
        model: The loaded guide.
        folder: What it was loaded from.
        query_prompt: Stands before anchors; the model's own when None.
        document_prompt: Stands before positives and negatives; the model's own when None.
        compute_dtype: Precision that the model computes in.
        decoded_with: The student that respells the texts, if one does.

    Raises:
        ModelError: When queries and documents take different ways through the model, or its width is unknown.
    """
    _refuse_routes(model, folder.name)
    info = GuideInfo(
        name=folder.name,
        revision=folder.revision,
        weights_hash=folder.weights_hash(),
        tokenizer_hash=folder.tokenizer_hash(),
        pooling=_describe_pooling(model),
        query_prompt=own_prompt(model, "query") if query_prompt is None else query_prompt,
        document_prompt=own_prompt(model, "document") if document_prompt is None else document_prompt,
        max_length=_token_limit(model),
        dtype="float32",
        compute_dtype=compute_dtype,
        normalised=True,
        width=_width(model, folder.name),
        decoded_with=decoded_with,
    )
    prompts = f"prompts {info.query_prompt!r} and {info.document_prompt!r}"
    limit = f"{info.max_length} tokens a text" if info.max_length else "texts of any length"
    logger.info("guide %s: %d wide, pooling %s, %s, %s", info.name, info.width, info.pooling, limit, prompts)
    return info


def _describe_pooling(model: "SentenceTransformer") -> str:
    """What follows the encoder, in order, as "mean" or "mean, dense"; every guide ends with length 1."""
    from sentence_transformers.sentence_transformer import modules

    parts = []
    for module in list(model.children())[1:]:
        if isinstance(module, modules.Pooling):
            modes = module.pooling_mode
            parts.append(modes if isinstance(modes, str) else "+".join(modes))
        elif not isinstance(module, modules.Normalize):
            parts.append(type(module).__name__.lower())
    return ", ".join(parts) or "none"


def _token_limit(model: "SentenceTransformer") -> int | None:
    limit = model.max_seq_length
    return int(limit) if limit is not None and math.isfinite(limit) else None


def _width(model: "SentenceTransformer", name: str) -> int:
    width = model.get_embedding_dimension()
    if width is None:
        raise ModelError(f"guide {name} does not say how wide its vectors are: use another guide")
    return width


def _refuse_routes(model: "SentenceTransformer", name: str) -> None:
    from sentence_transformers.sentence_transformer import modules

    if any(isinstance(module, modules.Router) for module in model.children()):
        raise ModelError(
            f"guide {name} embeds queries and documents with different modules, which a store of texts "
            "cannot tell apart: use a guide whose roles differ by prompt only"
        )
