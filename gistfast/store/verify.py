"""Is every byte of a store what was written?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gistfast.errors import StoreError
from gistfast.neighbours.index_check import index_problem
from gistfast.neighbours.pair_scores import scores_of
from gistfast.progress import progress
from gistfast.store.contents import wrong_contents
from gistfast.store.manifest import MANIFEST_NAME, Manifest
from gistfast.store.mined import mined_info
from gistfast.store.plan import missing_vectors, read_unfinished, refuse_no_store
from gistfast.store.reader import GuideStore
from gistfast.store.shards import (
    ADVICE,
    committed_shards,
    open_shard,
    read_commit,
    read_shard,
    refuse_other_bytes,
    shard_path,
)

# Another processor or another order of summation moves a score by less.
_SAME_SCORE = 1e-4


@dataclass(frozen=True)
class BadShard:
    """A shard that is missing or damaged.

    Attributes:
        kind: Its folder inside the store.
        index: Its number.
        problem: What is wrong, in one line that names a file.
    """

    kind: str
    index: int
    problem: str


@dataclass(frozen=True)
class Findings:
    """What a check of a store found.

    Attributes:
        plans: What the store is and what it is becoming, as far as they could be read.
        shards: Shards that are missing or damaged.
        indexes: What is wrong with the index of each plan, by the plan's fingerprint.
        others: What else is wrong, one line each.
        notes: What an append, an added guide or a new store still lacks: no damage.
        num_shards: Shards that were checked.
        num_bytes: Bytes in them.
    """

    plans: tuple[Manifest, ...]
    shards: tuple[BadShard, ...]
    indexes: Mapping[str, str]
    others: tuple[str, ...]
    notes: tuple[str, ...]
    num_shards: int
    num_bytes: int

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong, one line each; empty when all is sound."""
        return [*self.others, *(bad.problem for bad in self.shards), *self.indexes.values()]


def problems_of(store: Path, manifest: Manifest, *, deep: bool = True) -> list[str]:
    """What is wrong with a finished store, one line each; empty when all is sound.

    Args:
        store: Its folder.
        manifest: What store.json says.
        deep: Whether to read every byte; else commits and the sizes of files are looked at.
    """
    return _check(store, manifest, None, (), deep).problems


def check_store(store: Path, *, deep: bool) -> Findings:
    """All that is wrong with the store in a folder, and with what it is becoming.

    Raises:
        StoreError: When no store is there.
    """
    refuse_no_store(store)
    unfinished = finished = None
    others = []
    try:
        unfinished = read_unfinished(store)
    except StoreError as error:
        others.append(f"{error}; `gistfast store gc --unfinished` gives it up")
    try:
        finished = Manifest.read(store / MANIFEST_NAME) if (store / MANIFEST_NAME).is_file() else None
    except StoreError as error:
        others.append(str(error))
    return _check(store, finished, unfinished, others, deep)


def _check(
    store: Path, finished: Manifest | None, unfinished: Manifest | None, others: Sequence[str], deep: bool
) -> Findings:
    plans = tuple(plan for plan in (finished, unfinished) if plan is not None)
    wanted = {**_begun_shards(store, unfinished), **_finished_shards(store, finished)}
    others = list(others)
    for plan in plans:
        try:
            wanted |= _mined_shards(store, plan)
        except StoreError as error:
            others.append(str(error))
    bad, num_bytes = [], 0
    with progress("checking the store", total=len(wanted), unit="shards") as bar:
        for (kind, index), manifest in wanted.items():
            try:
                num_bytes += _check_shard(store, kind, index, manifest, deep)
            except StoreError as error:
                bad.append(BadShard(kind, index, str(error)))
            bar.advance(1)
    sound = not any(shard.kind.startswith("vectors/") for shard in bad)
    if deep and finished is not None and not any(shard.kind in finished.kinds for shard in bad):
        bad.extend(_other_scores(GuideStore(store, finished)))
    indexes = {
        plan.fingerprint: index_problem(
            GuideStore(store, plan), deep=deep, vectors_are_sound=sound and not missing_vectors(store, plan)
        )
        for plan in plans
    }
    return Findings(
        plans=plans,
        shards=tuple(bad),
        indexes={fingerprint: problem for fingerprint, problem in indexes.items() if problem is not None},
        others=tuple(dict.fromkeys(others)),
        notes=tuple(_notes(store, unfinished)),
        num_shards=len(wanted),
        num_bytes=num_bytes,
    )


def _other_scores(store: GuideStore) -> Iterator[BadShard]:
    """Shards of scores that are not those of the store's vectors: a repair may have stopped between the two."""
    kind = store.manifest.scores
    # An append under way may have committed some of its own.
    shards = sorted(committed_shards(store.path, kind) & set(store.manifest.shards_of(kind)))
    with progress("comparing scores", total=len(shards), unit="shards") as bar:
        for index in shards:
            stored = read_shard(store.path, kind, index, store.manifest).tensor(0, torch.float32).numpy()
            ids = store.rows_of(index)
            for column, scores in enumerate(stored.T, start=1):
                found = scores_of(store, ids[:, 0], ids[:, column])
                row = int(np.argmax(np.abs(found - scores)))
                if abs(found[row] - scores[row]) > _SAME_SCORE:
                    what = f"has a score of {scores[row]:.4f} where the vectors give {found[row]:.4f} (row {row})"
                    yield BadShard(kind, index, f"{store.path / kind} shard {index} {what}: {ADVICE}")
                    break
            bar.advance(1)


def _finished_shards(store: Path, manifest: Manifest | None) -> dict[tuple[str, int], Manifest]:
    """Every shard that the manifest plans."""
    if manifest is None:
        return {}
    # Scores are made last and may be absent altogether.
    scored = committed_shards(store, manifest.scores) or any((store / manifest.scores).glob("*.arrow"))
    kinds = [kind for kind in manifest.kinds if kind != manifest.scores or scored]
    return {(kind, index): manifest for kind in kinds for index in manifest.shards_of(kind)}


def _mined_shards(store: Path, manifest: Manifest) -> dict[tuple[str, int], Manifest]:
    """What was mined of this state of the store; none when nothing was, or not all of it yet."""
    info = mined_info(store, manifest.fingerprint)
    return {(info.kind, index): manifest for index in manifest.shards_of(info.kind)} if info else {}


def _begun_shards(store: Path, plan: Manifest | None) -> dict[tuple[str, int], Manifest]:
    """What must be there of a plan under way: all texts and rows, and what is committed of the rest."""
    if plan is None:
        return {}
    must_be_there = {(kind, index) for kind in ("texts", "rows") for index in plan.shards_of(kind)}
    committed = {(kind, index) for kind in plan.kinds for index in committed_shards(store, kind)}
    order = ((kind, index) for kind in plan.kinds for index in plan.shards_of(kind))
    return {shard: plan for shard in order if shard in must_be_there or shard in committed}


def _notes(store: Path, plan: Manifest | None) -> Iterator[str]:
    if plan is None:
        return
    # What grows a store, or replaces it, finds its own plan: --resume is for a first one.
    with_resume = "" if (store / MANIFEST_NAME).is_file() else " with --resume"
    yield f"{store} is not finished: the command that began it goes on{with_resume}"
    for guide, missing in missing_vectors(store, plan).items():
        yield f"guide {guide} has {len(plan.plan.texts) - missing} of {len(plan.plan.texts)} shards of vectors"


def _check_shard(store: Path, kind: str, index: int, manifest: Manifest, deep: bool) -> int:
    """The size of a shard that is sound.

    Raises:
        StoreError: When it is not.
    """
    commit = read_commit(store, kind, index, manifest)
    path = shard_path(store, commit)
    if deep:
        refuse_other_bytes(store, commit)
        if wrong := wrong_contents(kind, index, open_shard(store, commit), manifest):
            raise StoreError(f"{path} {wrong}: {ADVICE}")
    return commit.bytes
