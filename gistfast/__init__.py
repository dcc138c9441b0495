"""Guided contrastive training for small text-embedding models.

The guide embeds the corpus once (`precompute`), training reads its vectors from the store (`train`).
Names load on first use, so that `import gistfast` and the command line answer at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gistfast.losses.cached_gist_loss import CachedGISTLoss
    from gistfast.losses.functional import guided_contrastive_loss
    from gistfast.losses.gist_loss import GISTLoss
    from gistfast.stages.precompute import precompute
    from gistfast.stages.train import train
    from gistfast.store import GuideStore

__version__ = "0.1.0"
__all__ = ["CachedGISTLoss", "GISTLoss", "GuideStore", "guided_contrastive_loss", "precompute", "train"]

_HOME = {
    "CachedGISTLoss": "gistfast.losses.cached_gist_loss",
    "GISTLoss": "gistfast.losses.gist_loss",
    "GuideStore": "gistfast.store",
    "guided_contrastive_loss": "gistfast.losses.functional",
    "precompute": "gistfast.stages.precompute",
    "train": "gistfast.stages.train",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'gistfast' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*__all__, "__version__"])
