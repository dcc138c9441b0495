"""The fused kernel as compiled for cards that need not be here."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter takes the compiler's place", allow_module_level=True)

from triton.runtime.driver import driver

from gistfast.kernels import compile_report, exp_tiles, fused, triton_backend
from gistfast.kernels.compile_report import (
    SHARED_LIMIT,
    Usage,
    Variant,
    default_variants,
    problems,
    several_guides,
    usage,
)


@pytest.mark.parametrize("variant", list(default_variants(90)), ids=str)
def test_default_variant_fits_an_h100_without_spilling(variant: Variant) -> None:
    found = problems(variant, usage(variant))
    assert not found, f"{variant}: {'; '.join(found)}"


@pytest.mark.parametrize("variant", [variant for variant in several_guides(90) if not variant.redo], ids=str)
def test_several_guides_fit_an_h100_without_spilling(variant: Variant) -> None:
    found = problems(variant, usage(variant))
    assert not found, f"{variant}: {'; '.join(found)}"


@pytest.mark.parametrize("capability", [80, 89, 100])
@pytest.mark.parametrize("student", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_variant_with_most_to_hold_fits_the_card(capability: int, student: torch.dtype) -> None:
    variant = Variant(capability, student)
    used = usage(variant)
    assert not problems(variant, used)
    assert 0 < used.registers <= 255
    assert 0 < used.shared_bytes <= SHARED_LIMIT[capability]


class AbsentCard:
    """What Triton asks its driver before it compiles, answered for an H100."""

    def get_current_target(self) -> Any:
        return compile_report.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


class Compiled:
    """A kernel whose launches are compiled and left at that."""

    def __init__(self, kernel: Any, launched: list[str]) -> None:
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid: Any) -> Any:
        def compile_launch(*arguments: Any, **constants: Any) -> None:
            assert self.kernel.warmup(*arguments, grid=grid, **constants).asm["cubin"]
            self.launched.append(self.kernel.__name__)

        return compile_launch


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels launched in the test, on a card that is not there."""
    launched: list[str] = []
    driver.set_active(AbsentCard())
    monkeypatch.setattr(exp_tiles, "_exp_tiles", Compiled(exp_tiles._exp_tiles, launched))
    for name in ("_stack_role", "_own_terms", "_second_ref", "_row_terms", "_finish_gradients"):
        monkeypatch.setattr(triton_backend, name, Compiled(getattr(triton_backend, name), launched))
    yield launched
    if torch.cuda.is_available():  # elsewhere there is no driver to go back to
        driver.reset_active()


@pytest.mark.parametrize("widths", [(), (64,), (64, 100, 384)], ids=["no guide", "one guide", "three guides"])
def test_every_launch_compiles_as_it_is_called(widths: tuple[int, ...], launched: list[str]) -> None:
    num_rows, several = 128, len(widths) > 1
    vectors = [torch.ones(num_rows, 64) for _ in range(2)]
    guide = [torch.ones(num_rows, sum(widths)).half() for _ in range(2)] if widths else []
    ids = [torch.arange(num_rows, dtype=torch.int32)] * 2
    settings = fused.Settings(
        row_offset=0, num_rows=num_rows, margin=0.0, relative=False, contrast_anchors=True, contrast_positives=True,
        hard_only=False, guide_widths=widths if several else (), guide_min=several, half=False, lowest_temperature=0.01,
        with_gradients=True, learn_temperature=False, mean=True, chunk_bytes=0, backend="triton",
    )  # fmt: skip
    layout = fused.Layout(num_rows, 0, True, True, 128)
    e, temperature = torch.empty(num_rows, layout.e_columns), torch.tensor(0.01)
    prepared = triton_backend.prepare(vectors, guide, ids, temperature, layout, settings)
    rows = triton_backend.rows(prepared, 0, num_rows, temperature, None, e)
    triton_backend.gradients(prepared, rows.weight, temperature)
    tiles = ["_exp_tiles", "_second_ref", "_exp_tiles", "_row_terms"]
    assert launched == [*["_stack_role"] * 2, "_own_terms", *tiles, *["_finish_gradients"] * 2]


def test_spill_on_an_h100_names_a_version_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    spilling = Usage(registers=255, spilled_bytes=40, shared_bytes=1024)
    monkeypatch.setattr(compile_report.triton, "__version__", "9.9.9")
    assert problems(Variant(90), spilling) == [
        f"spills 40 bytes a thread with triton 9.9.9; {compile_report.CLEAN_TRITON} is known not to"
    ]
    # Elsewhere, and in what few runs use, a spill is a matter of speed that was not measured.
    assert not problems(Variant(80), spilling)
    assert not problems(Variant(90, hard_only=True), spilling)


def test_too_much_shared_memory_is_a_problem_on_any_card() -> None:
    for capability, limit in SHARED_LIMIT.items():
        fits = Usage(registers=128, spilled_bytes=0, shared_bytes=limit)
        assert not problems(Variant(capability), fits)
        assert problems(Variant(capability), replace(fits, shared_bytes=limit + 1))


def test_table_says_what_each_variant_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compile_report, "usage", lambda variant: Usage(200, 40 * variant.redo, 96 * 1024))
    assert compile_report.main(["sm_90"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["variant", "registers", "spilled", "B", "shared", "KiB"]
    assert any(line.split("  ")[0] == "sm_90 fp16 384, guide fp16 384, gradients" for line in lines)
    assert sum("spills 40 bytes" in line for line in lines) == 8
    assert compile_report.main(["sm_89"]) == 0
