"""Workers on a Ray cluster: one actor for each GPU, or for each CPU slot where there is none.

Ray places the actors; each loads the guide itself and takes shards by itself, as everywhere. The store must lie on a
file system that all machines share, and gistfast and the guide must be there on each of them.
"""

import logging
import os
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from gistfast.engines.job import describe_guide, embed_part
from gistfast.engines.shards import Part
from gistfast.errors import ConfigError, DependencyError, GistfastError, WorkerError, first_line
from gistfast.guides.batch_done import BatchDone
from gistfast.guides.kinds import guide_kind
from gistfast.progress import Bar
from gistfast.store import GuideInfo
from gistfast.store.vectors import VectorShards

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_ANSWER = 10.0
# Read when ray is imported: no usage report, and a cluster of this machine alone stays on its loopback address,
# for which Ray has no other switch. A cluster that is joined knows its own addresses.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}
_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# How a call ends whose process or machine is gone: killed, by Ray's own watch over memory, too.
_DEATHS = ("RayActorError", "WorkerCrashedError", "NodeDiedError", "OutOfMemoryError")
# Nothing passes through Ray's object store but a few numbers; this is about the least that Ray admits.
_OBJECT_STORE_BYTES = 100 << 20


class EmbedActor:
    """One worker; it can be asked how far it is while it embeds."""

    def __init__(self) -> None:
        self._embedded = 0
        self._committed = 0

    def embed(self, settings: Mapping[str, Any], store: str, part: Part) -> None:
        """Embed the shards of a part, as `embed_shards` says."""

        def count_embedded(done: BatchDone) -> None:
            self._embedded += done.num_texts

        def count_committed(texts: int) -> None:
            self._committed += texts

        embed_part(settings, store, part, on_batch=count_embedded, on_commit=count_committed)

    def counts(self) -> tuple[int, int]:
        """Texts embedded so far, and texts in shards that are committed."""
        return self._embedded, self._committed


class RayCluster:
    """A Ray cluster, joined or started on this machine for the length of a `with` block."""

    guide = None

    def __init__(self, settings: Mapping[str, Any], *, address: str | None, processes: int | None) -> None:
        """Connect.

        Args:
            settings: Of precompute, as JSON knows them.
            address: Of a running cluster, as Ray writes it; that of RAY_ADDRESS when None, and without that a
                cluster of this machine alone is started. A cluster that this process has joined is used as it is.
            processes: Number of actors; one for each GPU, else for each CPU slot, when None.

        Raises:
            ConfigError: When more actors are asked for than the cluster has slots.
            DependencyError: When ray is not installed.
            WorkerError: When the cluster cannot be reached.
        """
        self._settings = dict(settings)
        self._ray, self._is_ours = _connected(address or os.environ.get("RAY_ADDRESS"), processes)
        self._resources, self._num_actors = self._slots(processes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_ours:
            self._ray.shutdown()

    def guide_info(self) -> GuideInfo:
        """The guide as a worker finds it, which may have a GPU where this process has none.

        Raises:
            GistfastError: What the worker raised.
            WorkerError: When the worker died.
        """
        describe = self._ray.remote(describe_guide).options(**self._resources, max_retries=0)
        try:
            info: GuideInfo = self._result(describe.remote(self._settings))
        except _deaths(self._ray) as error:
            raise WorkerError(
                f"the Ray worker that loaded the guide died ({first_line(error)}): "
                "give it more memory, with fewer --processes where they share a machine"
            ) from error
        return info

    def embed(self, vectors: VectorShards, part: Part, bar: Bar) -> None:
        """Embed the shards of a part; returns when all of them are committed.

        Raises:
            GistfastError: The first that an actor met; the others are stopped.
            WorkerError: When all actors died before.
        """
        make = self._ray.remote(EmbedActor).options(**self._resources, max_concurrency=2)
        pending = part.of_shards(vectors.pending())
        actors = [make.remote() for _ in range(min(self._num_actors, len(pending)))]
        logger.info("Ray: %d actors for %d shards", len(actors), len(pending))
        runs = {actor.embed.remote(self._settings, str(vectors.store), part): actor for actor in actors}
        counts = _Counts(self._ray, actors, bar)
        try:
            while runs:
                ended, _ = self._ray.wait(list(runs), timeout=SECONDS_BETWEEN_LOOKS)
                counts.look()
                for run in ended:
                    actor = runs.pop(run)
                    try:
                        self._result(run)
                        # It found nothing left: all shards are committed, whoever did them.
                        return
                    except _deaths(self._ray):
                        counts.forget(actor)
                        others = "others take its shard" if runs else "none is left"
                        logger.warning("Ray actor %d died: %s", actors.index(actor), others)
        finally:
            for actor in actors:
                self._ray.kill(actor)
        left = len(part.of_shards(vectors.pending()))
        raise WorkerError(
            f"all {len(actors)} Ray actors died with {left} shards left: what is committed is kept; go on with --resume"
        )

    def _result(self, ref: Any) -> Any:
        """What a remote call gave, or the error that it raised, as if it had been a call."""
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, GistfastError):
                raise error.cause from None
            raise

    def _slots(self, processes: int | None) -> tuple[dict[str, float], int]:
        """What one actor takes, and how many there are."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        on_gpus = guide_kind(self._settings["guide"]) == "model" and self._settings["device"] != "cpu"
        gpus = int(sum(node.get("GPU", 0) for node in nodes)) if on_gpus else 0
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        slots = gpus or sum(cpus)
        if processes is not None and processes > slots:
            kind = "GPUs" if gpus else "CPU slots"
            raise ConfigError(f"--processes {processes}: the Ray cluster has {slots} {kind}: give at most that")
        count = processes or slots
        logger.info("Ray: %d slots on %d machines with %d GPUs and %d CPUs", count, len(nodes), gpus, sum(cpus))
        if gpus:
            return {"num_gpus": 1}, count
        # An actor computes with as many threads as it takes CPUs, and fits on one machine.
        return {"num_cpus": min(sum(cpus) // count, max(cpus))}, count


class _Counts:
    """Asks actors how far they are and moves the bar."""

    def __init__(self, ray: Any, actors: Sequence[Any], bar: Bar) -> None:
        self._ray = ray
        self._bar = bar
        self._asked = {actor: actor.counts.remote() for actor in actors}
        self._counts = dict.fromkeys(actors, (0, 0))

    def look(self) -> None:
        """Take the answers that are there, and ask again."""
        answered, _ = self._ray.wait(list(self._asked.values()), num_returns=len(self._asked), timeout=0)
        for actor, ref in list(self._asked.items()):
            if ref in answered:
                with suppress(*_deaths(self._ray)):
                    counts = self._ray.get(ref)
                    self._bar.advance(counts[0] - self._counts[actor][0])
                    self._counts[actor] = counts
                self._asked[actor] = actor.counts.remote()

    def forget(self, actor: Any) -> None:
        """Take back what a dead actor had embedded and not committed."""
        embedded, committed = self._counts[actor]
        self._bar.advance(committed - embedded)
        del self._asked[actor]


def _deaths(ray: Any) -> tuple[type[Exception], ...]:
    return tuple(getattr(ray.exceptions, name) for name in _DEATHS)


def _connected(address: str | None, processes: int | None) -> tuple[Any, bool]:
    """The module ray, connected to a cluster, and whether it was connected here."""
    here = address is None or address.startswith(("127.", "localhost"))
    for name, value in {**_QUIET, **(_ON_LOOPBACK if here else {})}.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise DependencyError('--engine ray needs ray: pip install "gistfast[ray]"') from error
    if ray.is_initialized():
        return ray, False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        small = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        ray.init(num_cpus=processes or os.cpu_count(), _node_ip_address="127.0.0.1", **small, **quiet)
        return ray, True
    try:
        _knock(address)
        ray.init(address=address, **quiet)
    except (OSError, ValueError) as error:
        raise WorkerError(f"no Ray cluster answers at {address} ({first_line(error)}): check --address") from error
    return ray, True


def _knock(address: str) -> None:
    """Fail at once where nothing listens: Ray itself tries for minutes."""
    if found := re.fullmatch(r"([\w.-]+):(\d+)", address):
        socket.create_connection((found[1], int(found[2])), timeout=SECONDS_TO_ANSWER).close()
