"""Memory that this process takes."""

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def memory_mib(name: str) -> float:
    """A figure of Linux's /proc/self/status in MiB.

    Args:
        name: "VmHWM" (highest), "RssAnon" (its own), "RssFile" (mapped files).
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) / 1024


def peak_mib(device: "torch.device") -> float:
    """Memory at its highest so far, in MiB: what was allocated on a GPU, else that of this process."""
    if device.type == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    if sys.platform == "linux":
        # getrusage has the memory of whatever started this process in it.
        return memory_mib("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
