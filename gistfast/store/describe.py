"""What is in a store, in figures."""

import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gistfast.neighbours.index import read_report
from gistfast.store.info import GuideInfo
from gistfast.store.manifest import MANIFEST_NAME, Manifest
from gistfast.store.mined import mined_info
from gistfast.store.plan import is_store, read_finished, read_unfinished
from gistfast.store.reader import GuideStore
from gistfast.store.replace import replacement_of
from gistfast.store.shards import committed_shards


def describe_store(path: str | Path) -> dict[str, Any]:
    """What is in the store at `path`, as JSON knows it.

    Returns:
        "path", "format_version", "fingerprint", "finished"; "guides" (the fields of `GuideInfo`, with "key" and
        "weight") and "guide_score"; "data" (counts, "columns", "holdout", "tasks", "segments"); "bytes" by folder;
        "index" and "mined" (what is recorded of them) or None; "shards": done and planned by kind; "to_come": rows,
        texts and guides that an append or an added guide under way will bring, or None; "replacement": folder of the
        store that will replace this one when it is complete, or None. Of a store that was never finished everything is
        said as it will be.

    Raises:
        StoreError: When there is no store, or it is damaged.
    """
    folder = Path(path).absolute()
    under_way, finished = read_unfinished(folder), (folder / MANIFEST_NAME).is_file()
    manifest = under_way if under_way is not None and not finished else read_finished(folder)
    plan = under_way or manifest
    store = GuideStore(folder, manifest)
    index, mined = read_report(store), mined_info(folder, store.fingerprint)
    replacement = replacement_of(folder)
    return {
        "path": str(folder),
        "format_version": manifest.format_version,
        "fingerprint": store.fingerprint,
        "finished": finished,
        "guides": [_guide(*pair) for pair in zip(manifest.guides, manifest.weights, strict=True)],
        "guide_score": manifest.guide_score,
        "data": _data(store),
        "bytes": bytes_by_folder(folder),
        "index": None if index is None else asdict(index),
        "mined": None if mined is None else asdict(mined),
        "shards": {kind: _progress(folder, kind, plan) for kind in plan.kinds},
        "to_come": _to_come(manifest, plan) if plan != manifest else None,
        "replacement": str(replacement) if is_store(replacement) else None,
    }


def bytes_by_folder(store: Path) -> dict[str, int]:
    """Bytes on disk in each folder of a store that holds files, such as "vectors/3f9a01c2"; its own are "."."""
    sizes: dict[str, int] = {}
    for parent, _, names in os.walk(store):
        folder = Path(parent).relative_to(store).as_posix()
        for name in names:
            # A process that writes may have renamed or removed it since.
            with suppress(FileNotFoundError):
                sizes[folder] = sizes.get(folder, 0) + os.stat(os.path.join(parent, name)).st_size
    return dict(sorted(sizes.items()))


def _guide(guide: GuideInfo, weight: float) -> dict[str, Any]:
    return {**asdict(guide), "key": guide.key, "weight": weight}


def _data(store: GuideStore) -> dict[str, Any]:
    data = store.manifest.data
    names = ("description", "fingerprint", "num_rows", "num_texts", "skipped", "repeated")
    return {
        "rows": data.num_rows,
        "texts": data.num_texts,
        "held_out": int(store.held_out.sum()),
        "skipped": data.skipped,
        "repeated": sum(segment.repeated for segment in data.segments),
        "columns": list(data.columns),
        "holdout": data.holdout,
        "one_role": data.one_role,
        "tasks": list(data.tasks),
        "segments": [{name: getattr(segment, name) for name in names} for segment in data.segments],
    }


def _progress(folder: Path, kind: str, plan: Manifest) -> dict[str, int]:
    planned = plan.shards_of(kind)
    return {"done": len(committed_shards(folder, kind) & set(planned)), "planned": len(planned)}


def _to_come(manifest: Manifest, plan: Manifest) -> dict[str, Any]:
    return {
        "rows": plan.data.num_rows - manifest.data.num_rows,
        "texts": plan.data.num_texts - manifest.data.num_texts,
        "guides": [guide.name for guide in plan.guides if manifest.guide_like(guide) is None],
    }
