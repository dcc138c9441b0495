"""A loss that changes during a run: temperature and margin by the step's number, or a temperature that is learned.

A scheduled value follows from the number of the step alone, so a resumed run goes on as an undisturbed one. A learned
temperature is a weight of the loss, and lies in the checkpoints.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.util import all_gather
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from gistfast.losses.gist_loss import GISTLoss

logger = logging.getLogger(__name__)

# As in the system that GISTEmbed was made with.
LOWEST_TEMPERATURE = 0.001


class LearnedTemperature(nn.Module):
    """A temperature with a gradient of its own, learned as its logarithm.

    Attributes:
        lowest: It does not fall below this.
    """

    def __init__(self, initial: float, lowest: float = LOWEST_TEMPERATURE) -> None:
        """Begin with a temperature above 0, and end above another one."""
        super().__init__()
        self.lowest = lowest
        self.log = nn.Parameter(torch.tensor(math.log(initial)))

    def forward(self) -> Tensor:
        """The temperature, a scalar."""
        # The weight itself is kept in its range: cut off behind it, the gradient would be 0 from there on.
        with torch.no_grad():
            self.log.clamp_(min=math.log(self.lowest))
        return self.log.exp()


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Temperature and margin of each step of a run.

    Attributes:
        temperature: The highest one.
        lowest: The lowest temperature.
        decay: Its factor from step to step, 1 for a fixed temperature: that of step s is decay ** s, within the two.
        margin: Of the first step.
        margin_end: Of the last step; on the way the margin changes by the same amount each step.
    """

    temperature: float
    lowest: float = LOWEST_TEMPERATURE
    decay: float | None = None
    margin: float = 0.0
    margin_end: float | None = None

    def at(self, step: int, num_steps: int) -> dict[str, float]:
        """The options of the loss that change, in the step after `step` others of `num_steps`."""
        options = {}
        if self.decay is not None:
            options["temperature"] = min(max(self.lowest, self.decay**step), self.temperature)
        if self.margin_end is not None:
            share = min(step / max(num_steps - 1, 1), 1.0)
            options["margin"] = (1 - share) * self.margin + share * self.margin_end
        return options


class ScheduledLoss(TrainerCallback):
    """Gives the losses their options before each step, and a learned temperature one gradient in all processes."""

    def __init__(self, losses: Sequence["GISTLoss"], schedule: Schedule) -> None:
        """Take the losses, which have the same options and share a learned temperature."""
        self.losses = losses
        self.schedule = schedule

    def options(self) -> dict[str, float]:
        """Temperature and margin as they are now, where they change during the run."""
        changing = {name: float(self.losses[0].options[name]) for name in self.schedule.at(0, 1)}
        learned = self.losses[0].learned_temperature
        return changing if learned is None else {**changing, "temperature": learned().item()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say where the options begin and where they will end."""
        self._set(state)
        first, last = (self.schedule.at(step, state.max_steps) for step in (0, state.max_steps - 1))
        for name, value in first.items():
            logger.info("%s: %.4g in the first step, %.4g in the last", name, value, last[name])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the options of the step."""
        self._set(state)

    def _set(self, state: TrainerState) -> None:
        for loss in self.losses:
            loss.options.update(self.schedule.at(state.global_step, state.max_steps))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average the gradient of a learned temperature over the processes: only the student's is averaged for us."""
        learned = self.losses[0].learned_temperature
        if learned is not None and learned.log.grad is not None and args.world_size > 1:
            learned.log.grad.copy_(all_gather(learned.log.grad[None]).mean())
