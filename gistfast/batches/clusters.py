"""Clusters of a store's anchors, as the guide sees them: rows of one cluster are each other's hard negatives.

    STORE/
      clusters/FINGERPRINT-COUNT-SEED.npy    place of each training row's cluster on the ring

Written once, by the first who asks, and read ever after: the same clusters for every process, and for a run that is
resumed on another machine.

Shapes: R training rows, A distinct anchors among them, K clusters, G guide width.
"""

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gistfast.batches.orders import Array
from gistfast.errors import ConfigError, StoreError
from gistfast.neighbours.index import import_faiss
from gistfast.progress import progress
from gistfast.store import GuideStore
from gistfast.store.files import create_file, one_line_write_errors

logger = logging.getLogger(__name__)

# Batches that a cluster fills: enough that its rows meet others in each epoch.
BATCHES_PER_CLUSTER = 8
# The work grows with rows x clusters.
MOST_CLUSTERS = 4096
ANCHORS_PER_CLUSTER = 64
ITERATIONS = 20
ANCHORS_PER_BLOCK = 65_536


def default_count(num_rows: int, rows_of_step: int) -> int:
    """Clusters for so many rows: of eight steps each, two at least, 4,096 at most."""
    return min(max(num_rows // (BATCHES_PER_CLUSTER * rows_of_step), 2), MOST_CLUSTERS)


def cluster_places(store: GuideStore, count: int, *, seed: int) -> Array:
    """The place of each training row's cluster on a ring of similar clusters, (R,) integers below `count`.

    K-means on the directions of the guide's vectors of the distinct anchors. Places follow a walk from each
    cluster to the nearest one that is left, so that neighbours on the ring are alike.

    Args:
        store: Whose training rows are clustered.
        count: Clusters (K).
        seed: Decides where k-means begins.

    Raises:
        ConfigError: When there are fewer distinct anchors than clusters.
        DependencyError: When faiss is not installed.
        StoreError: When the clusters cannot be written, or what is there is damaged.
    """
    path = store.path / "clusters" / f"{store.fingerprint}-{count}-{seed}.npy"
    num_rows = int(np.count_nonzero(~store.held_out))
    if not path.is_file():
        anchors, anchor_of_row = np.unique(store.rows[~store.held_out, 0], return_inverse=True)
        if len(anchors) < count:
            raise ConfigError(
                f"--clusters {count} is more than the {len(anchors)} distinct anchors of {store.path}: give fewer"
            )
        logger.info("sorting %d rows into %d clusters of their anchors", num_rows, count)
        places = _places_of(store, anchors, count, seed)[anchor_of_row]
        _write(path, places.astype(np.min_scalar_type(count - 1)))
    return _read(path, num_rows)


def _places_of(store: GuideStore, anchors: Array, count: int, seed: int) -> Array:
    """Places on the ring of the anchors with these ids, (A,) int64."""
    faiss = import_faiss("--batching cluster", "choose another --batching")
    chosen = np.random.default_rng(seed).choice(len(anchors), min(len(anchors), ANCHORS_PER_CLUSTER * count), False)
    centres = _centres(faiss, _directions(store, anchors[np.sort(chosen)]), count, seed)
    places = np.empty(count, np.int64)
    places[_walk(centres)] = np.arange(count)
    index = faiss.IndexFlatIP(store.width)
    index.add(centres)
    nearest = np.empty(len(anchors), np.int64)
    with progress("sorting anchors into clusters", total=len(anchors), unit="anchors") as bar:
        for first in range(0, len(anchors), ANCHORS_PER_BLOCK):
            block = anchors[first : first + ANCHORS_PER_BLOCK]
            nearest[first : first + len(block)] = index.search(_directions(store, block), 1)[1][:, 0]
            bar.advance(len(block))
    return places[nearest]


def _directions(store: GuideStore, ids: Array) -> Array:
    """Guide vectors of length 1, (len(ids), G) fp32."""
    vectors = store.gather(torch.from_numpy(ids)).float()
    directions: Array = torch.nn.functional.normalize(vectors, dim=-1).numpy()
    return directions


def _centres(faiss: Any, directions: Array, count: int, seed: int) -> Array:
    """Centres of `count` clusters, (K, G) fp32 of length 1."""
    # All that is given takes part: the sample was drawn before. faiss keeps seeds in 32 bits.
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": len(directions)}
    kmeans = faiss.Kmeans(directions.shape[1], count, niter=ITERATIONS, spherical=True, seed=seed % 2**31, **limits)
    kmeans.train(directions)
    centres: Array = kmeans.centroids
    return centres


def _walk(centres: Array) -> Array:
    """The numbers of all clusters, (K,): from the first to the nearest that is left, and so on."""
    left = np.ones(len(centres), dtype=bool)
    walk = np.zeros(len(centres), np.int64)
    for step in range(1, len(centres)):
        here = walk[step - 1]
        left[here] = False
        walk[step] = np.argmax(np.where(left, centres @ centres[here], -np.inf))
    return walk


def _write(path: Path, places: Array) -> None:
    buffer = io.BytesIO()
    np.save(buffer, places, allow_pickle=False)
    with one_line_write_errors(path):
        path.parent.mkdir(exist_ok=True)
    create_file(path, buffer.getvalue())


def _read(path: Path, num_rows: int) -> Array:
    """The places in `path`.

    Raises:
        StoreError: When the file is damaged or made for other rows.
    """
    try:
        places: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(f"{path} is damaged: delete it, and the clusters are made anew") from error
    if places.shape != (num_rows,):
        raise StoreError(f"{path} has shape {places.shape}, expected ({num_rows},): delete it to have it made anew")
    return places
