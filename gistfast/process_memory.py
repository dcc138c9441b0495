"""Memory of this process, as Linux counts it."""

from pathlib import Path


def memory_mib(name: str) -> float:
    """A figure of /proc/self/status in MiB: "VmHWM" (highest), "RssAnon" (its own), "RssFile" (mapped files)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) / 1024
