"""What the check of a CUDA machine says where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gistfast import gpu_check

ROOT = Path(__file__).parents[1]


def test_machine_without_a_gpu_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"gpu-check: torch {torch.__version__} finds no CUDA device: run it on a machine with one")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bare_python_without_torch_is_told_how_to_name_another() -> None:
    # Without site-packages: what a checkout is when nothing is installed.
    environment = os.environ | {"PYTHONPATH": ""}
    command = [sys.executable, "-S", "-m", "gistfast.gpu_check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("has no torch: name a Python that has it, make gpu-check PYTHON=/path/to/python\n")
    assert done.stderr.count("\n") == 1


def test_packages_that_a_short_run_needs_are_found_here() -> None:
    assert gpu_check._missing(gpu_check.STUDENT_PACKAGES) == []
