"""One worker: takes shards that nobody is at, embeds their texts and commits their vectors, until none is left.

Every engine runs this: one process or many, on one machine or many. Workers know nothing of each other; what is
done, and what somebody is at, stands in the store.

# N texts, G guide width
"""

import logging
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from gistfast.engines.claims import Claim, claim
from gistfast.guides.batch_done import BatchDone, OnBatch
from gistfast.guides.guide import Guide
from gistfast.models.prompts import Role
from gistfast.store.vectors import VectorShards

logger = logging.getLogger(__name__)

Vectors = np.ndarray[Any, np.dtype[np.float32]]
Texts = tuple[list[str], list[Role]]

SECONDS_BETWEEN_LOOKS = 0.5


class Part(NamedTuple):
    """Every `of`-th shard, from shard `number` on."""

    number: int
    of: int

    def of_shards(self, shards: Sequence[int]) -> list[int]:
        """Those of the shards that are in this part."""
        return [shard for shard in shards if shard % self.of == self.number]


WHOLE = Part(0, 1)


def embed_shards(
    vectors: VectorShards,
    guide: Guide,
    *,
    part: Part = WHOLE,
    on_batch: OnBatch = lambda done: None,
    on_commit: Callable[[int], None] = lambda count: None,
) -> None:
    """Embed the shards of a part that have no vectors yet; returns when all of them are committed.

    The texts of the next shard are read, and the vectors of the last one written, while the guide embeds. Shards
    that other processes are at are left to them; when one of these dies, its shard is taken.

    Args:
        vectors: The shards of a store whose rows are complete.
        guide: The guide that the store is made with.
        part: The shards to look at.
        on_batch: Called with each batch that is embedded.
        on_commit: Called with the number of texts of each shard that is committed, in another thread.

    Raises:
        VectorError: When a vector is zero or not finite; its text is named.
        StoreError: When the store cannot be read or written.
    """
    with ThreadPoolExecutor(2, thread_name_prefix="gistfast-store") as background:
        _Worker(vectors, guide, part, background, on_batch, on_commit).run()


def embed_by_role(
    guide: Guide, texts: Sequence[str], roles: Sequence[Role], on_batch: OnBatch | None = None
) -> Vectors:
    """The vectors (N, G) of the texts in their order, each read by the guide under the prompt of its role."""
    if len(set(roles)) == 1:
        # No second array of a shard's vectors beside the guide's own.
        return guide.embed(texts, roles[0], on_batch)
    given = np.array(roles)
    vectors = np.empty((len(texts), guide.info.width), np.float32)
    for role in ("query", "document"):
        numbers = np.flatnonzero(given == role).tolist()
        if numbers:
            vectors[numbers] = guide.embed([texts[number] for number in numbers], role, on_batch)
    return vectors


class _Worker:
    def __init__(
        self,
        vectors: VectorShards,
        guide: Guide,
        part: Part,
        background: ThreadPoolExecutor,
        on_batch: OnBatch,
        on_commit: Callable[[int], None],
    ) -> None:
        self._vectors = vectors
        self._guide = guide
        self._part = part
        self._background = background
        self._on_batch = on_batch
        self._on_commit = on_commit
        # What is read ahead, and what is being written: a shard and what comes of it.
        self._reading: tuple[int, Future[Texts]] | None = None
        self._writing: tuple[int, Future[None]] | None = None

    def run(self) -> None:
        """Run shards until all of the part are committed."""
        said = False
        while pending := self._part.of_shards(self._vectors.pending()):
            if self._run_one_of(pending):
                continue
            if self._writing is not None:
                self._finish_writing()
                continue
            if not said:
                logger.info("other processes are at all shards that are left (%d): waiting for them", len(pending))
                said = True
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self._finish_writing()

    def _run_one_of(self, pending: list[int]) -> bool:
        """Run a shard that nobody is at; False when there is none."""
        writing = None if self._writing is None else self._writing[0]
        free = [shard for shard in pending if shard != writing]
        # In random order: workers that cannot see each other's claims seldom meet.
        order = random.sample(free, len(free))
        if self._reading is not None and self._reading[0] in free:
            order.remove(self._reading[0])
            order.insert(0, self._reading[0])
        for place, shard in enumerate(order):
            if (mine := claim(self._vectors.lock_path(shard))) is None:
                continue
            if self._vectors.is_committed(shard):
                # Between the look at the commits and the claim.
                mine.release(remove=True)
                continue
            self._run_shard(shard, mine, read_ahead=next(iter(order[place + 1 :]), None))
            return True
        return False

    def _run_shard(self, shard: int, mine: Claim, read_ahead: int | None) -> None:
        """Embed one shard and let its vectors be written; any number of workers may do so at once."""
        try:
            texts, roles = self._texts_of(shard)
            if read_ahead is not None:
                self._reading = read_ahead, self._background.submit(self._read, read_ahead)
            vectors = embed_by_role(self._guide, texts, roles, self._embedded)
            self._finish_writing()
        except BaseException:
            mine.release(remove=False)
            raise
        self._writing = shard, self._background.submit(self._write, shard, vectors, mine)

    def _texts_of(self, shard: int) -> Texts:
        ahead, self._reading = self._reading, None
        return ahead[1].result() if ahead is not None and ahead[0] == shard else self._read(shard)

    def _read(self, shard: int) -> Texts:
        return self._vectors.texts_of(shard), self._vectors.roles_of(shard)

    def _embedded(self, done: BatchDone) -> None:
        if self._writing is not None and self._writing[1].done():
            # A full disk stops the run now, not when this shard is embedded.
            self._finish_writing()
        self._on_batch(done)

    def _write(self, shard: int, vectors: Vectors, mine: Claim) -> None:
        committed = False
        try:
            self._vectors.write(shard, vectors)
            committed = True
        finally:
            mine.release(remove=committed)
        self._on_commit(len(vectors))

    def _finish_writing(self) -> None:
        """Wait until the shard that is being written is committed.

        Raises:
            StoreError: When it could not be written.
        """
        if self._writing is None:
            return
        (_, written), self._writing = self._writing, None
        written.result()
