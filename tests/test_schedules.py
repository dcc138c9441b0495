import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_cases import ROWS, resumes_exactly, steps, train_small
from transformers import TrainerControl, TrainerState

from gistfast.errors import ConfigError
from gistfast.losses.gist_loss import GISTLoss
from gistfast.losses.schedules import LearnedTemperature, Schedule, ScheduledLoss
from gistfast.settings.stages import TrainSettings, build


@pytest.fixture
def run(make_store: Callable[..., Any], tiny_student: Path, tmp_path: Path) -> Callable[..., Any]:
    """Training with small settings."""
    return partial(train_small, store=make_store(ROWS).path, student=tiny_student, out=tmp_path / "student")


def values(folder: Path, name: str) -> list[float]:
    return [record[name] for record in steps(folder)]


# What the options of a step are.


def test_temperature_is_a_power_within_its_bounds() -> None:
    schedule = Schedule(temperature=0.5, lowest=0.1, decay=0.8)
    found = [schedule.at(step, 100)["temperature"] for step in range(15)]
    assert found == [min(max(0.1, 0.8**step), 0.5) for step in range(15)]
    assert found[0] == found[3] == 0.5
    assert found[4] == 0.8**4
    assert found[-1] == 0.1


def test_margin_moves_in_equal_steps_from_the_first_to_the_last() -> None:
    schedule = Schedule(temperature=0.1, margin=0.3, margin_end=-0.1)
    found = [schedule.at(step, 5)["margin"] for step in range(5)]
    assert found == pytest.approx([0.3, 0.2, 0.1, 0.0, -0.1])
    assert schedule.at(0, 1)["margin"] == 0.3


def test_nothing_is_scheduled_unless_asked_for() -> None:
    assert Schedule(temperature=0.1, margin=0.3).at(3, 5) == {}


def test_learned_temperature_stays_above_its_lowest_and_comes_back_from_there() -> None:
    learned = LearnedTemperature(0.05, lowest=0.02)
    assert learned().item() == pytest.approx(0.05)
    with torch.no_grad():
        learned.log.fill_(math.log(0.001))
    temperature = learned()
    assert temperature.item() == pytest.approx(0.02)
    temperature.backward()
    assert float(learned.log.grad) == pytest.approx(0.02)


def test_processes_average_the_gradient_of_a_learned_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    learned = LearnedTemperature(0.05)
    learned.log.grad = torch.tensor(1.0)
    monkeypatch.setattr("gistfast.losses.schedules.all_gather", lambda own: torch.cat([own, own + 2]))
    loss = SimpleNamespace(learned_temperature=learned, options={})
    callback = ScheduledLoss([loss], Schedule(temperature=0.05))  # type: ignore[list-item]
    for world_size, gradient in ((1, 1.0), (2, 2.0)):
        args = SimpleNamespace(world_size=world_size)
        callback.on_pre_optimizer_step(args, TrainerState(), TrainerControl())  # type: ignore[arg-type]
        assert learned.log.grad.item() == gradient


def test_loss_with_a_learned_temperature_is_that_of_its_value(
    make_store: Callable[..., Any], tiny_student: Path
) -> None:
    from gistfast.students.student import load_student

    store, model = make_store(ROWS), load_student(str(tiny_student), device="cpu").eval()
    rows = store.to_dataset("train")[:4]
    features = [model.preprocess(rows[column]) for column in ("anchor", "positive")]
    losses = [
        GISTLoss(model, store, temperature=temperature)(
            [dict(column) for column in features], torch.tensor(rows["label"])
        )
        for temperature in (0.05, LearnedTemperature(0.05))
    ]
    torch.testing.assert_close(losses[0], losses[1])


# What a run makes of it.


def test_scheduled_run_logs_and_reports_its_options_and_resumes_exactly(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    options = {"temperature_decay": 0.5, "min_temperature": 0.02, "margin": 0.1, "margin_end": 0.0}
    report, resumed = resumes_exactly(run, tmp_path, **options)
    assert values(report.path, "temperature") == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.0625, 0.03125])
    assert values(report.path, "margin") == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02, 0.0])
    assert (report.temperature, report.margin) == pytest.approx((0.03125, 0.0))
    assert values(resumed.path, "temperature") == values(report.path, "temperature")
    # The options were not only logged.
    fixed = run(temperature=0.1, margin=0.1)
    assert values(fixed.path, "loss")[:1] == values(report.path, "loss")[:1]
    assert values(fixed.path, "loss")[1:] != values(report.path, "loss")[1:]
    assert "temperature" not in steps(fixed.path)[0]
    assert (fixed.temperature, fixed.margin) == (None, None)


def test_learned_temperature_moves_at_its_own_rate_and_resumes_exactly(run: Callable[..., Any], tmp_path: Path) -> None:
    options = {"learn_temperature": True, "learning_rates": "temperature=0.05", "save_total_limit": 9}
    report, resumed = resumes_exactly(run, tmp_path, **options)
    found = values(report.path, "temperature")
    assert len(set(found)) == len(found)
    assert values(resumed.path, "temperature") == found
    kept = load_file(report.path / "checkpoints" / "checkpoint-6" / "trained.safetensors")
    assert float(kept["learned_temperature.log"].exp()) == pytest.approx(report.temperature)


def test_cached_loss_learns_the_same_temperature(run: Callable[..., Any], tmp_path: Path) -> None:
    options = {"learn_temperature": True, "learning_rates": "temperature=0.05", "dropout": 0.0}
    plain, cached = (run(cached=cached, out=tmp_path / str(cached), **options) for cached in (False, True))
    assert values(cached.path, "temperature") == pytest.approx(values(plain.path, "temperature"), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature_decay": 0.9, "learn_temperature": True}, "contradict each other"),
        ({"min_temperature": 0.001}, "--min-temperature does nothing without"),
        ({"min_temperature": 0.2, "learn_temperature": True}, r"--min-temperature 0\.2 is above --temperature 0\.01"),
        ({"temperature_decay": 1.0}, "--temperature-decay must be below 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(TrainSettings, {"store": "store", "student": "student", "out": "out", **options})
