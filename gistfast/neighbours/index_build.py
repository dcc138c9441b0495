"""Vectors into a FAISS index, shard by shard, so that a killed build goes on.

What takes long is training, and finding the list of each vector. Both are kept beside the index while it is built:

    index/<store>.building/
      trained-<kind><bytes>.faiss    the index without vectors; of several builders the first one's stands
      00012-<lists>.npy              the list of each vector of a shard, for these lists

The rest is memory bandwidth: the index is filled anew from shards and lists, and is the same, bit for bit.

# N vectors of a shard, G numbers in a vector
"""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from gistfast.neighbours.index_types import IndexPlan
from gistfast.neighbours.scorer import Scorer
from gistfast.progress import progress
from gistfast.store import GuideStore
from gistfast.store.files import ChecksumWriter, durable_file, one_line_write_errors

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]


class IndexBuilder:
    """Fills an index with the vectors of a store."""

    def __init__(self, faiss: Any, store: GuideStore, plan: IndexPlan, folder: Path) -> None:
        """Keep what takes long in `folder`, which need not exist."""
        self._faiss = faiss
        self._store = store
        self._plan = plan
        self._folder = folder
        # An inner product is the mean of the guides' cosines, however they are joined for a score.
        self._scorer = Scorer(store.guide_widths)

    def empty(self) -> Any:
        """The index without vectors, trained, by an earlier builder if there was one."""
        if self._plan.kind == "flat":
            return self._plan.empty(self._faiss, self._store.width)
        path = self._folder / f"trained-{self._plan.kind}{self._plan.code_bytes}.faiss"
        if path.is_file():
            logger.info("going on with the index in %s", self._folder)
        else:
            with one_line_write_errors(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                self._write_once(path, self._trained())
        return self._faiss.read_index(str(path))

    def fill(self, index: Any) -> None:
        """Add the vectors that the index does not have yet: it has those of the first shards, or none."""
        sizes = self._store.manifest.plan.texts
        ends = np.cumsum(sizes)
        missing = [shard for shard, end in enumerate(ends) if end > index.ntotal]
        lists = None if self._plan.kind == "flat" else ListsOfVectors(self._faiss, index, self._folder)
        with progress("building the index", total=sum(sizes[shard] for shard in missing), unit="vectors") as bar:
            for shard in missing:
                vectors = self._vectors(np.arange(ends[shard] - sizes[shard], ends[shard]))
                if lists is None:
                    index.add(vectors)
                else:
                    lists.add(shard, vectors)
                bar.advance(sizes[shard])

    def _vectors(self, ids: Array) -> Array:
        """Unit vectors (N, G) of entries, fp32."""
        vectors: Array = self._scorer.unit(self._store.gather(torch.from_numpy(ids))).numpy()
        return vectors

    def _trained(self) -> Any:
        num_texts = self._store.num_texts
        size = min(self._plan.num_training, num_texts)
        sample = np.sort(np.random.default_rng(0).choice(num_texts, size, replace=False))
        index = self._plan.empty(self._faiss, self._store.width)
        ivf = self._faiss.extract_index_ivf(index)
        logger.info("training %d lists of the index on %d vectors", self._plan.num_lists, size)
        # Kept in a variable as long as it is used: faiss holds no reference.
        clusters = on_gpus(self._faiss, self._faiss.IndexFlatIP(ivf.d))
        ivf.clustering_index = clusters
        index.train(self._vectors(sample))
        ivf.clustering_index = None
        return index

    def _write_once(self, path: Path, index: Any) -> None:
        """Write the index unless another builder has written one."""
        own = path.with_name(f".{path.name}.{os.getpid()}")
        write_index(self._faiss, index, own)
        with suppress(FileExistsError):
            os.link(own, path)
        own.unlink()


class ListsOfVectors:
    """Adds vectors to the lists of an index; which list a vector belongs to is kept in a file a shard."""

    def __init__(self, faiss: Any, index: Any, folder: Path) -> None:
        self._faiss = faiss
        self._index = index
        self._folder = folder
        self._ivf = faiss.extract_index_ivf(index)
        quantizer = faiss.downcast_index(self._ivf.quantizer)
        self._quantizer = on_gpus(faiss, quantizer)
        # Files of other lists are of no use to these.
        self._token = xxhash.xxh3_64_hexdigest(faiss.serialize_index(quantizer))[:8]

    def add(self, shard: int, vectors: Array) -> None:
        """Add the unit vectors (N, G) of a shard behind those that are there."""
        if isinstance(self._index, self._faiss.IndexPreTransform):
            vectors = self._faiss.downcast_VectorTransform(self._index.chain.at(0)).apply(vectors)
        ids = np.arange(self._index.ntotal, self._index.ntotal + len(vectors))
        arrays = (vectors, ids, self._lists_of(shard, vectors))
        self._ivf.add_core(len(vectors), *map(self._faiss.swig_ptr, arrays))
        self._index.ntotal = self._ivf.ntotal

    def _lists_of(self, shard: int, vectors: Array) -> Array:
        """The list of each vector, (N,) int64."""
        path = self._folder / f"{shard:05d}-{self._token}.npy"
        if path.is_file():
            kept: Array = np.load(path)
            return kept
        _, found = self._quantizer.search(vectors, 1)
        lists = np.ascontiguousarray(found[:, 0])
        with one_line_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with durable_file(path) as file:
                np.save(file, lists)
        return lists


def write_index(faiss: Any, index: Any, path: Path) -> tuple[int, str]:
    """Write an index to `path`, whole or not at all; the size and the xxh3_128 of the file."""
    with durable_file(path) as file:
        sink = ChecksumWriter(file)
        faiss.write_index(index, faiss.PyCallbackIOWriter(sink.write))
    return sink.num_bytes, sink.hexdigest()


def on_gpus(faiss: Any, index: Any) -> Any:
    """A copy of the index on all GPUs, or the index itself where faiss sees none."""
    return faiss.index_cpu_to_all_gpus(index) if faiss.get_num_gpus() else index
