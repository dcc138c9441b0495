"""The fused kernel without a GPU: the tests of the kernels once more, with Triton's interpreter in the place of a card.

The interpreter is chosen when triton is imported, so the tests run in a process of their own. By hand:
`TRITON_INTERPRET=1 pytest tests/test_kernels.py tests/test_kernels_edges.py`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]


def run_under_the_interpreter(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Pytest, with the fused kernel interpreted and each array on one thread."""
    # Older interpreters turn arrays of one element into numbers in a way that NumPy calls deprecated.
    noise = "ignore:Conversion of an array with ndim:DeprecationWarning"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", noise, "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_fused_kernel_holds_what_every_backend_must() -> None:
    done = run_under_the_interpreter("tests/test_kernels.py", "tests/test_kernels_edges.py")
    if done.returncode:
        pytest.fail(f"under TRITON_INTERPRET=1:\n{done.stdout[-20_000:]}{done.stderr[-2_000:]}", pytrace=False)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 60


def test_fused_kernel_asks_for_a_card_or_the_interpreter() -> None:
    program = """
import torch
from gistfast import guided_contrastive_loss
vectors = torch.randn(2, 4)
try:
    guided_contrastive_loss(vectors, vectors, guide_anchor=None, guide_positive=None, backend="triton")
except ValueError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert "it needs a CUDA device, or TRITON_INTERPRET=1" in done.stdout
