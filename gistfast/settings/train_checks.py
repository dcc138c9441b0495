"""Which settings of a training run do nothing beside others."""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gistfast.errors import ConfigError
from gistfast.settings.base import refuse_both

if TYPE_CHECKING:
    from gistfast.settings.stages import TrainSettings


def refuse_useless_options(settings: "TrainSettings") -> None:
    """Refuse options that do nothing without another one, or that another one takes the sense from.

    Raises:
        ConfigError: Naming both.
    """
    if settings.mixing is not None and len(settings.store) == 1:
        raise ConfigError(f"--mixing {settings.mixing} does nothing with one store: leave it out")
    if settings.triplet_margin is not None and settings.triplet is None:
        raise ConfigError("--triplet-margin does nothing without --triplet: give both")
    _check_matryoshka(settings.matryoshka_dims, settings.matryoshka_weights)
    if settings.lora_rank is None and (settings.lora_alpha or settings.lora_dropout or settings.lora_targets):
        raise ConfigError("--lora-alpha, --lora-dropout and --lora-targets do nothing without --lora-rank: give a rank")
    if settings.lora_rank is not None and settings.freeze:
        raise ConfigError("--lora-rank freezes all of the student's transformer: leave --freeze out")
    if settings.eval_sts is not None and not settings.eval_steps:
        raise ConfigError(f"--eval-sts {settings.eval_sts} does nothing without evaluations: give --eval-steps")
    if settings.compile and settings.attention == "unpadded":
        raise ConfigError("--compile compiles padded passes: leave it out, or --attention unpadded")
    if settings.keep_best and not settings.eval_steps:
        raise ConfigError("--keep-best needs evaluations to compare: give --eval-steps")
    if settings.patience is not None and not settings.keep_best:
        raise ConfigError("--patience does nothing without --keep-best: give both")
    refuse_both(settings, "temperature_decay", "learn_temperature")
    if settings.min_temperature is not None:
        if settings.temperature_decay is None and not settings.learn_temperature:
            raise ConfigError(
                "--min-temperature does nothing without --temperature-decay or --learn-temperature: leave it out"
            )
        if settings.min_temperature > settings.temperature:
            raise ConfigError(
                f"--min-temperature {settings.min_temperature} is above --temperature {settings.temperature}, where "
                "the run begins: give less"
            )
    for pattern, rate in (settings.learning_rates or {}).items():
        _check_learning_rate(pattern, rate)


def _check_matryoshka(dims: Sequence[int], weights: Sequence[float]) -> None:
    if weights and not dims:
        raise ConfigError("--matryoshka-weights does nothing without --matryoshka-dims: give both")
    if min(dims, default=1) < 1 or len(set(dims)) < len(dims):
        raise ConfigError(f"--matryoshka-dims must be different widths of at least 1, found {_listed(dims)}")
    if weights and (len(weights) != len(dims) or not min(weights) > 0):
        raise ConfigError(
            f"--matryoshka-weights must be a number above 0 for each of --matryoshka-dims {_listed(dims)}, "
            f"found {_listed(weights)}"
        )


def _listed(numbers: Sequence[float]) -> str:
    return ",".join(format(number, "g") for number in numbers)


def _check_learning_rate(pattern: str, rate: float) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--learning-rates: {pattern!r} is no regular expression: {error}") from None
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < math.inf:
        raise ConfigError(f"--learning-rates: {pattern} must have a finite rate of at least 0, found {rate!r}")
