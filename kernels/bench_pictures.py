"""Pictures of a benchmark's CSV: time and memory against the batch size, one file for each device and shape."""

import csv
import re
from collections import defaultdict
from pathlib import Path

LABELS = {
    "triton": "gistfast, fused",
    "chunked": "gistfast, chunked",
    "eager": "plain matrix products",
    "compiled": "the same, torch.compile",
    "st-gist": "sentence-transformers GISTEmbedLoss",
    "st-cached-gist": "sentence-transformers CachedGISTEmbedLoss",
}


def draw(path: Path, out: Path) -> list[Path]:
    """The SVGs drawn from the CSV at `path`, one a device, dtype and shape; the newest row of each point counts.

    Raises:
        ImportError: Without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "gistfast"  # the same rows, the same file
    groups: dict[tuple[str, str, str, str], dict[str, dict[int, dict[str, str]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["pass"] == "fwd+bwd" and row["ms"]:
                groups[row["device"], row["dtype"], row["D"], row["G"]][row["loss"]][int(row["B"])] = row
    return [
        _draw_group(key, losses, out)
        for key, losses in groups.items()
        if any(len(rows) > 1 for rows in losses.values())
    ]


def _draw_group(key: tuple[str, str, str, str], losses: dict[str, dict[int, dict[str, str]]], out: Path) -> Path:
    """One picture: milliseconds on the left, MiB on the right, both axes logarithmic."""
    import matplotlib.pyplot as plt

    device, dtype, width, guide_width = key
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, field, title in zip(
        axes, ("ms", "peak_mib"), ("forward and backward, ms", "memory beyond the vectors, MiB"), strict=True
    ):
        for name, label in LABELS.items():
            points = sorted((size, float(row[field])) for size, row in losses.get(name, {}).items())
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    markersize=3.5,
                    label=label,
                    linewidth=2.4 if name == "triton" else 1.4,
                )
        axis.set(xscale="log", yscale="log", xlabel="anchors in the batch", title=title)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda size, _: f"{size / 1024:g}k" if size >= 1024 else f"{size:g}")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False)
    dates = sorted({row["date"] for rows in losses.values() for row in rows.values()})
    figure.suptitle(f"{device}, {dtype} vectors, D = {width}, guide G = {guide_width} ({dates[-1]})", fontsize=10)
    slug = re.sub(r"[^a-z0-9]+", "-", f"{device} {dtype} d{width} g{guide_width}".lower()).strip("-")
    picture = out / f"loss-{slug}.svg"
    figure.savefig(picture, metadata={"Date": None})
    plt.close(figure)
    return picture
