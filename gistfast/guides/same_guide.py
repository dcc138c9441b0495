"""Whether a guide that shows no weights is the one that wrote a store's vectors: it must give them again."""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from gistfast.errors import StoreError
from gistfast.guides.directions import shown
from gistfast.guides.guide import Guide
from gistfast.models.prompts import ROLES
from gistfast.store import GuideInfo
from gistfast.store.plan import is_store, read_plan
from gistfast.store.shards import open_shard, pending_shards, read_commit

# A server's vectors move a little with the batch they are in, and by the precision of the store.
SAME_COSINE = 0.99
NUM_TEXTS = 8


def check_same_guide(store: Path, info: GuideInfo, guide: Guide, *, bad: Collection[int] = ()) -> None:
    """Refuse a guide whose vectors are not those in a store, finished or not.

    Args:
        store: Its folder; one without vectors of this guide takes any.
        info: The guide as the store records it.
        guide: Embeds a few texts that have vectors there.
        bad: Shards whose vectors do not count.

    Raises:
        StoreError: When it gives one of them another vector.
    """
    kind = f"vectors/{info.key}"
    if not is_store(store) or kind not in (plan := read_plan(store)).vectors:
        return
    committed = sorted(set(plan.shards_of(kind)) - {*pending_shards(store, kind, plan), *bad})
    if not committed:
        return
    entries, lists = (open_shard(store, read_commit(store, of, committed[0], plan)).batch for of in ("texts", kind))
    numbers = np.linspace(0, entries.num_rows - 1, min(NUM_TEXTS, entries.num_rows)).astype(int)
    texts, roles = entries.column("text").take(numbers).to_pylist(), entries.column("role").take(numbers).to_pylist()
    stored = np.array(lists.column(0).take(numbers).to_pylist(), np.float32)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    again = np.concatenate([guide.embed([text], ROLES[role]) for text, role in zip(texts, roles, strict=True)])
    scores = np.einsum("ng,ng->n", stored, again)
    if scores.min() < SAME_COSINE:
        worst = int(scores.argmin())
        raise StoreError(
            f"{store} has a vector for the text {shown(texts[worst])} that guide {info.name} no longer gives "
            f"(cosine {scores[worst]:.3f}): the server's model has changed, bring it back or make the store anew"
        )
