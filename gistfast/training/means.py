"""Means of what steps count, over the steps since they were last taken."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed


class StepMeans:
    """Means of named values, each over the steps that have it, which need not be all."""

    def __init__(self) -> None:
        """Begin with no step."""
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add the values of a step, scalar tensors; NaN stands for a value that the step does not have."""
        if not values:
            return
        stack = torch.stack([value.detach().float() for value in values.values()])
        # Of the values and of the steps; nothing waits for the device.
        entries = torch.stack([stack, torch.ones_like(stack)], dim=1).where(~stack.isnan()[:, None], 0)
        for name, entry in zip(values, entries, strict=True):
            self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def take(self) -> dict[str, float]:
        """The means over the steps of all processes, which must ask together; none is left."""
        own = dict(zip(self._sums, torch.stack(list(self._sums.values())).tolist(), strict=True)) if self._sums else {}
        self._sums = {}
        totals: dict[str, tuple[float, float]] = {}
        for sums in _of_all_processes(own):
            for name, (value, steps) in sums.items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + value, before[1] + steps)
        return {name: round(value / steps, 4) for name, (value, steps) in totals.items() if steps}


def _of_all_processes(own: dict[str, Any]) -> list[dict[str, Any]]:
    """What each process has; not all have the same names."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    found: list[dict[str, Any]] = [{}] * distributed.get_world_size()
    distributed.all_gather_object(found, own)
    return found
