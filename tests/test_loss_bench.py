"""The benchmark of the loss, where it cannot measure."""

from pathlib import Path

import pytest
import torch

from gistfast.kernels import bench


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--losses", "triton", "chunked"], "--losses triton needs a CUDA device, and there is none"),
        (["--draw-only"], "loss.csv is not there to be drawn: leave --draw-only out"),
    ],
    ids=["no card", "nothing to draw"],
)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([*options, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_loss_that_is_wrong_gets_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = bench.loss_function("eager")
    monkeypatch.setattr(bench, "Machine", lambda device, dtype: None)
    monkeypatch.setattr(bench, "loss_function", lambda name: lambda *vectors: 1.1 * right(*vectors))
    assert bench.main(["--losses", "eager", "--dtype", "float32", "--out", str(tmp_path)]) == 1
    assert "no figures: eager: the loss is off by 0.1 relative to float64" in capsys.readouterr().err
    assert not (tmp_path / "loss.csv").exists()
