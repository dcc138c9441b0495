"""From the settings of precompute to a guide of whichever kind they name."""

from collections.abc import Mapping
from typing import Any

from gistfast.guides.guide import Guide, load_guide
from gistfast.guides.kinds import guide_kind
from gistfast.guides.ready_guide import load_ready_guide
from gistfast.guides.server_guide import load_server_guide


def open_guide(settings: Mapping[str, Any]) -> Guide:
    """The guide that the settings name.

    Args:
        settings: The fields of `gistfast.settings.stages.PrecomputeSettings`, as they are or as JSON knows them.

    Raises:
        GistfastError: As `load_guide`, `load_server_guide` and `load_ready_guide` do.
    """
    name, both = settings["guide"], settings["guide_prompt"]
    query = both if settings["query_prompt"] is None else settings["query_prompt"]
    document = both if settings["document_prompt"] is None else settings["document_prompt"]
    kind = guide_kind(name)
    if kind == "server":
        return load_server_guide(
            name,
            model=settings["guide_model"],
            query_prompt=query or "",
            document_prompt=document or "",
            concurrency=settings["server_concurrency"],
            texts_per_request=settings["server_batch"],
            timeout_s=settings["server_timeout_s"],
            retries=settings["server_retries"],
            api_key_env=settings["api_key_env"],
        )
    if kind == "ready":
        return load_ready_guide(
            name, vectors=settings["vectors"], query_prompt=query or "", document_prompt=document or ""
        )
    return load_guide(
        name,
        pooling=settings["pooling"],
        query_prompt=query,
        document_prompt=document,
        max_length=settings["max_length"],
        dtype=settings["dtype"],
        revision=settings["guide_revision"],
        device=settings["device"],
        trust_remote_code=settings["trust_remote_code"],
        tokens_per_batch=settings["tokens_per_batch"],
        attention=settings["attention"],
        decode_with=settings["decode_with"],
    )
