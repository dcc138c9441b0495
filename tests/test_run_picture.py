import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from train_cases import ROWS, train_small
from typer.testing import CliRunner

from gistfast.cli.main import app
from gistfast.errors import DataError, DependencyError
from gistfast.training.run_picture import _lines, _panels, _smooth, _thinned, draw_run

LOG: list[dict[str, Any]] = [
    {"eval_loss": 2.0, "eval_held_out_cosine_ndcg@10": 0.5, "step": 0},
    {"loss": 1.0, "dropped/ap": 0.01, "score/positive": 0.5, "score/hardest": 0.25, "step": 1},
    {"loss": 0.5, "dropped/ap": 0.02, "score/positive": 0.75, "step": 2},
    {"eval_loss": 1.5, "eval_held_out_cosine_ndcg@10": 0.75, "step": 2},
    {"train_loss": 0.75, "step": 2},
]
PNG = b"\x89PNG"


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in LOG))
    return path


def test_each_line_has_its_steps_and_values() -> None:
    panels = _panels(LOG)
    assert panels["loss"] == {"training": ((1, 2), (1.0, 0.5)), "held-out rows": ((0, 2), (2.0, 1.5))}
    assert panels["candidates dropped"] == {"anchor-positive": ((1, 2), (0.01, 0.02))}
    assert panels["evaluation on held-out rows"] == {"nDCG@10": ((0, 2), (0.5, 0.75))}
    assert panels["student's scores"] == {"own positive": ((1, 2), (0.5, 0.75)), "hardest candidate": ((1,), (0.25,))}
    assert panels["temperature"] == {}
    assert _lines(LOG, {"margin": "margin"}) == {}


def test_stores_have_lines_of_their_own() -> None:
    of_stores = [
        {"loss": 1.0, "loss/one": 1.0, "step": 1},
        {"loss": 3.0, "loss/a/b": 3.0, "step": 2},
        {"eval_loss": 1.5, "eval_loss/one": 1.0, "eval_held_out_cosine_ndcg@10": 0.5, "step": 2}
        | {"eval_held_out_cosine_ndcg@10/one": 0.25, "eval_held_out_cosine_ndcg@10/a/b": 0.75},
    ]
    panels = _panels(of_stores)
    assert panels["loss"] == {"training": ((1, 2), (1.0, 3.0)), "held-out rows": ((2,), (1.5,))}
    assert panels["evaluation on held-out rows"] == {"nDCG@10": ((2,), (0.5,))}
    assert panels["loss of each store"] == {"one": ([1], [1.0]), "a/b": ([2], [3.0])}
    assert panels["nDCG@10 of each store"] == {"one": ([2], [0.25]), "a/b": ([2], [0.75])}
    assert not _panels(LOG)["loss of each store"]


def test_long_lines_are_drawn_as_means_of_neighbours() -> None:
    assert _thinned([1.0, 2.0]) == [1.0, 2.0]
    found = _thinned([float(value) for value in range(1000)])
    assert len(found) == 400
    assert sum(found[:2]) / 2 == pytest.approx(1.75)
    assert found[0] < found[-1]
    assert _smooth([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]


def test_picture_is_drawn_and_leaves_a_line_without_end_out(metrics: Path, tmp_path: Path) -> None:
    with metrics.open("a") as file:
        file.write('{"loss": 0.')
    assert draw_run(metrics, tmp_path / "run.png").read_bytes().startswith(PNG)


def test_log_of_no_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not there: give the folder of a training run"):
        draw_run(tmp_path / "metrics.jsonl", tmp_path / "run.png")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="has no step to draw"):
        draw_run(tmp_path / "metrics.jsonl", tmp_path / "run.png")


def test_missing_matplotlib_says_what_to_install(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DependencyError, match=r"pip install gistfast\[plot\]"):
        draw_run(metrics, metrics.parent / "run.png")


def test_command_draws_a_run_that_goes_on(metrics: Path) -> None:
    assert CliRunner().invoke(app, ["picture", str(metrics.parent)]).exit_code == 0
    assert (metrics.parent / "training.png").read_bytes().startswith(PNG)


def test_run_leaves_a_picture_unless_told_otherwise(
    make_store: Callable[..., Any],
    tiny_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"store": make_store(ROWS).path, "student": tiny_student, "max_steps": 1}
    assert (train_small(**options, picture=True, out=tmp_path / "one").path / "training.png").is_file()
    assert not (train_small(**options, picture=False, out=tmp_path / "two").path / "training.png").exists()
    monkeypatch.setattr("gistfast.stages.train.find_spec", lambda name: None)
    with caplog.at_level("INFO", "gistfast"):
        report = train_small(**options, picture=True, out=tmp_path / "three")
    assert not (report.path / "training.png").exists()
    assert caplog.text.count("matplotlib is not installed: no picture of the run") == 1
