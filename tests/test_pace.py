from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from gistfast.training.pace import Pace, in_words

CPU = torch.device("cpu")
RECORD = {
    "loss": 0.25,
    "dropped/ap": 0.125,
    "score/positive": 0.75,
    "score/hardest": 0.5,
    "padding": 0.02,
    "tokens_per_s": 12345.0,
    "pairs_per_s": 64.0,
    "step_ms": 500.0,
    "data_wait_ms": 5.0,
    "peak_mib": 1024.0,
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still; its time is the only element."""
    now = [0.0]
    monkeypatch.setattr("gistfast.training.pace.time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def step(pace: Pace, clock: list[float], *, wait_s: float, work_s: float) -> None:
    with pace.fetching():
        clock[0] += wait_s
    clock[0] += work_s
    pace.on_step_end(TrainingArguments(), TrainerState(), TrainerControl())


def test_pace_is_that_of_the_steps_and_not_of_what_lies_between(clock: list[float]) -> None:
    pace = Pace()
    step(pace, clock, wait_s=0.25, work_s=0.75)
    clock[0] += 100.0  # An evaluation.
    step(pace, clock, wait_s=0.75, work_s=2.25)
    found = pace.take({"tokens": 500.0, "rows": 8.0}, CPU)
    assert found.pop("peak_mib") > 100
    assert found == {"step_ms": 2000.0, "data_wait_ms": 500.0, "tokens_per_s": 250.0, "pairs_per_s": 4.0}


def test_pace_begins_anew_when_it_was_taken(clock: list[float]) -> None:
    pace = Pace()
    step(pace, clock, wait_s=5.0, work_s=5.0)
    pace.take({"tokens": 500.0, "rows": 8.0}, CPU)
    step(pace, clock, wait_s=0.0, work_s=0.5)
    assert pace.take({"tokens": 500.0, "rows": 8.0}, CPU)["step_ms"] == 500.0


def test_bar_shows_all_of_a_record() -> None:
    assert in_words(RECORD) == (
        "loss 0.2500, 12.5% dropped, scores 0.75 own, 0.50 hardest, 2.0% padding, 12,345 tokens/s, 64 pairs/s, "
        "1.0% waiting for data, 1,024 MiB"
    )


def test_bar_says_where_no_row_had_a_candidate() -> None:
    record = {name: value for name, value in RECORD.items() if name != "score/hardest"}
    assert "scores 0.75 own, no candidate, 2.0% padding" in in_words(record)
