"""Which kind of FAISS index a store gets: by the number of its vectors and the memory there is.

flat   every vector is compared: exact
ivf    vectors lie in lists of their neighbourhood, a query looks into some of them
pq     as ivf, and a vector is a few bytes that approximate it: only where memory forces it
"""

import logging
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gistfast.errors import ConfigError
from gistfast.store.manifest import Manifest

logger = logging.getLogger(__name__)

IndexKind = Literal["auto", "flat", "ivf", "pq", "none"]

# Up to here a flat index answers a query within milliseconds, and nothing is lost.
FLAT_AT_MOST = 200_000
# Fewer training vectors a list make poor lists; fewer in all make poor codes.
VECTORS_PER_LIST = 64
VECTORS_PER_PQ = 10_000
# The rest is for blocks of vectors, and for whatever else runs on the machine.
SHARE_OF_MEMORY = 0.8
CONTAINER = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class IndexPlan:
    """An index to be built.

    Attributes:
        kind: "flat", "ivf" or "pq".
        num_lists: Lists of its vectors, 1 for a flat one.
        code_bytes: Bytes of a vector in it.
        half: Whether vectors are kept as fp16, like those of the store.
    """

    kind: Literal["flat", "ivf", "pq"]
    num_lists: int
    code_bytes: int
    half: bool

    def num_bytes(self, num_vectors: int) -> int:
        """Memory that the index takes with so many vectors; a vector in a list has its number beside it."""
        return num_vectors * (self.code_bytes + (0 if self.kind == "flat" else 8))

    @property
    def num_training(self) -> int:
        """Vectors that it should be trained on."""
        least = VECTORS_PER_PQ if self.kind == "pq" else 0
        return 0 if self.kind == "flat" else max(self.num_lists * VECTORS_PER_LIST, least)

    def empty(self, faiss: Any, width: int) -> Any:
        """A faiss index of inner products without vectors; lists and codes are not trained yet."""
        # "np" leaves out an ordering of the codes that takes most of the training and that no search of ours uses.
        encoding = "SQfp16" if self.half else "Flat"
        lists = f"IVF{self.num_lists}"
        description = {
            "flat": encoding,
            "ivf": f"{lists},{encoding}",
            "pq": f"OPQ{self.code_bytes},{lists},PQ{self.code_bytes}np",
        }[self.kind]
        index = faiss.index_factory(width, description, faiss.METRIC_INNER_PRODUCT)
        if self.kind == "ivf":
            # A vector as it is, not its difference from the list's centre: exact for stored half precision.
            faiss.extract_index_ivf(index).by_residual = False
        return index


def plan_index(num_vectors: int, width: int, *, half: bool, kind: IndexKind, memory_gib: float | None) -> IndexPlan:
    """The index to build, chosen and explained in the log where `kind` is "auto".

    Args:
        num_vectors: Of the store.
        width: Numbers in a vector.
        half: Whether the store keeps them as fp16.
        kind: Not "none".
        memory_gib: What the index may take; four fifths of what the machine has free when None.

    Raises:
        ConfigError: When the vectors are too few for the kind, or no index fits into the memory.
    """
    plan, reason = _chosen(num_vectors, width, half, kind, memory_gib)
    if kind == "auto":
        logger.info("index of %s vectors: %s, %s", f"{num_vectors:,}", plan.kind, reason)
    return plan


def refuse_impossible_index(manifest: Manifest, kind: IndexKind, memory_gib: float | None) -> None:
    """Refuse an index that a store could not have once its vectors are there; "none" is always possible.

    Raises:
        ConfigError: As `plan_index`.
    """
    if kind != "none":
        guides = manifest.guides
        half = all(guide.dtype == "float16" for guide in guides)
        _chosen(manifest.data.num_texts, sum(guide.width for guide in guides), half, kind, memory_gib)


def _chosen(
    num_vectors: int, width: int, half: bool, kind: IndexKind, memory_gib: float | None
) -> tuple[IndexPlan, str]:
    """The index and why."""
    allowed = available_bytes() * SHARE_OF_MEMORY if memory_gib is None else memory_gib * 2**30
    lists = max(min(4 * math.isqrt(num_vectors), num_vectors // VECTORS_PER_LIST), 1)
    whole = width * (2 if half else 4)
    if kind == "flat" or (kind == "auto" and num_vectors <= FLAT_AT_MOST):
        flat = IndexPlan(kind="flat", num_lists=1, code_bytes=whole, half=half)
        return flat, f"up to {FLAT_AT_MOST:,} are compared one by one"
    plan = IndexPlan(kind="ivf", num_lists=lists, code_bytes=whole, half=half)
    reason = f"{plan.num_bytes(num_vectors) / 2**30:.2g} GiB of memory"
    if kind == "pq" or (kind == "auto" and plan.num_bytes(num_vectors) > allowed):
        reason = f"{plan.kind} would need {reason}, {allowed / 2**30:.2g} GiB may be used"
        plan = _smaller(num_vectors, width, lists, allowed, half=half)
    return plan, reason


def _smaller(num_vectors: int, width: int, lists: int, allowed: float, *, half: bool) -> IndexPlan:
    """The index with the longest codes that fit: from half a byte a number down to a 32nd."""
    if num_vectors < VECTORS_PER_PQ:
        raise ConfigError(
            f"--index pq learns its codes from {VECTORS_PER_PQ:,} vectors at least, the store has {num_vectors:,}: "
            "give flat or ivf"
        )
    lengths = (length for length in range(width // 2, 0, -1) if width % length == 0 and 32 * length >= width)
    plans = [IndexPlan(kind="pq", num_lists=lists, code_bytes=length, half=half) for length in lengths]
    for plan in plans:
        if plan.num_bytes(num_vectors) <= allowed:
            return plan
    least = f", the smallest takes {plans[-1].num_bytes(num_vectors) / 2**30:.2g}" if plans else ""
    raise ConfigError(
        f"no index of {num_vectors:,} vectors fits into {allowed / 2**30:.2g} GiB{least}: "
        "allow more by --index-memory, or leave the index out with --index none"
    )


def available_bytes() -> int:
    """Memory that this process may still take."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        # No Linux: half of what is built in.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    (free_kib,) = (
        int(line.split()[1]) for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")
    )
    return min(free_kib * 1024, _left_in_container())


def _left_in_container() -> int:
    """What the limit of this process's container leaves; a large number where there is none."""
    limit, used = CONTAINER / "memory.max", CONTAINER / "memory.current"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return sys.maxsize
    return max(int(limit.read_text()) - int(used.read_text()), 0)
