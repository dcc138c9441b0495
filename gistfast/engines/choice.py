"""Which engine the settings ask for."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from gistfast.engines.job import stored_info
from gistfast.engines.processes import LocalProcesses, local_devices
from gistfast.engines.ray_actors import RayCluster
from gistfast.engines.shards import Part, embed_shards
from gistfast.guides.batch_done import advancing
from gistfast.guides.guide import Guide
from gistfast.guides.kinds import guide_kind
from gistfast.guides.open_guide import open_guide
from gistfast.progress import Bar
from gistfast.store import GuideInfo
from gistfast.store.vectors import VectorShards


class Engine(Protocol):
    """Embeds the texts of a store whose rows are complete."""

    @property
    def guide(self) -> Guide | None:
        """The guide, if it is in this process."""

    def guide_info(self) -> GuideInfo:
        """What the store records of the guide."""

    def embed(self, vectors: VectorShards, part: Part, bar: Bar) -> None:
        """Embed the shards of a part that have no vectors yet; returns when all of them are committed."""


class ThisProcess:
    """The guide in this process."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Load the guide that the settings name."""
        self.guide: Guide = open_guide(settings)
        self._info = stored_info(self.guide, settings)

    def guide_info(self) -> GuideInfo:
        """What the store records of the guide."""
        return self._info

    def embed(self, vectors: VectorShards, part: Part, bar: Bar) -> None:
        """Embed the shards of a part that have no vectors yet; returns when all of them are committed."""
        embed_shards(vectors, self.guide, part=part, on_batch=advancing(bar))


@contextmanager
def start_engine(settings: Mapping[str, Any]) -> Iterator[Engine]:
    """The engine for the settings of precompute, given as JSON knows them.

    Raises:
        ConfigError: When there is no such device, or the cluster has fewer slots than processes are asked for.
        DependencyError: When Ray is asked for and not installed.
        ModelError: When the guide cannot be loaded.
        WorkerError: When the cluster cannot be reached.
    """
    if settings["engine"] == "ray":
        with RayCluster(settings, address=settings["address"], processes=settings["processes"]) as cluster:
            yield cluster
        return
    if guide_kind(settings["guide"]) == "model":
        devices = local_devices(settings["device"], settings["processes"])
    else:
        # Servers compute elsewhere, and ready vectors are there: devices do not count.
        devices = ["cpu"] * (settings["processes"] or 1)
    yield LocalProcesses(settings, devices) if len(devices) > 1 else ThisProcess({**settings, "device": devices[0]})
