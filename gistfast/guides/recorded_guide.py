"""A guide that a store records, opened once more."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from gistfast.errors import ModelError, StoreError
from gistfast.guides.guide import Guide
from gistfast.guides.kinds import guide_kind
from gistfast.guides.open_guide import open_guide
from gistfast.guides.same_guide import check_same_guide
from gistfast.guides.server_guide import ServerGuide
from gistfast.models.pretrained import POOLING_MODES
from gistfast.settings.stages import PrecomputeSettings, build, to_dict
from gistfast.settings.store import StoreRepairSettings
from gistfast.store import GuideInfo, Manifest

_NO_MODEL = ("server", "ready")


def open_recorded_guide(
    store: Path, plan: Manifest, number: int, settings: StoreRepairSettings, bad: Collection[int]
) -> Guide:
    """A guide of a store, from where it was opened first or from where the settings say that it is.

    Args:
        store: Folder of the store.
        plan: Its manifest.
        number: Number of the guide.
        settings: Where it is, and on which device it is to run.
        bad: Shards whose vectors do not count.

    Raises:
        DataError: When a file of ready vectors cannot be read.
        ModelError: When it cannot be opened.
        StoreError: When it is another guide; the first field that differs is named.
    """
    info = plan.guides[number]
    if settings.guide is None and info.pooling in _NO_MODEL:
        raise ModelError(f"the guide {info.name} was no model: give --guide with its address or file")
    try:
        guide = open_guide(to_dict(_asked(info, settings)))
    except ModelError as error:
        if settings.guide is None:
            raise ModelError(f"the guide {info.name} cannot be loaded by its name ({error}): give --guide") from error
        raise
    found = replace(guide.info, dtype=info.dtype)
    alone = replace(plan, guides=(info,), weights=(1.0,))
    if difference := alone.difference(found, plan.data.columns, plan.data.holdout):
        raise StoreError(f"{found.name} is not the guide that made it: {difference}: give --guide with {info.name}")
    if isinstance(guide, ServerGuide):
        check_same_guide(store, info, guide, bad=bad)
    return guide


def _asked(info: GuideInfo, settings: StoreRepairSettings) -> PrecomputeSettings:
    """What precompute was asked for when it opened the guide first."""
    name = settings.guide or info.name
    asked: dict[str, Any] = {"source": "", "out": "", "guide": name}
    asked |= {"query_prompt": info.query_prompt, "document_prompt": info.document_prompt}
    kind = guide_kind(name)
    if kind == "server":
        asked |= {"guide_model": info.name, "api_key_env": settings.api_key_env}
    elif kind == "ready":
        asked |= {"vectors": settings.vectors}
    elif info.pooling not in _NO_MODEL:
        # A model that is not the recorded one is refused by what differs.
        names = {mode: name for name, mode in POOLING_MODES.items()}
        asked |= {"pooling": names.get(info.pooling.partition(", ")[0]), "max_length": info.max_length}
        asked |= {"dtype": info.compute_dtype, "guide_revision": None if settings.guide else info.revision}
        asked |= {name: getattr(settings, name) for name in ("decode_with", "device", "tokens_per_batch", "attention")}
        asked |= {"trust_remote_code": settings.trust_remote_code}
    return build(PrecomputeSettings, asked)
