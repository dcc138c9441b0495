"""The fused kernel as compiled for cards that need not be here."""

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter takes the compiler's place", allow_module_level=True)

from gistfast.kernels import compile_report
from gistfast.kernels.compile_report import SHARED_LIMIT, Usage, Variant, default_variants, problems, usage


@pytest.mark.parametrize("variant", list(default_variants(90)), ids=str)
def test_default_variant_fits_an_h100_without_spilling(variant: Variant) -> None:
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
    assert sum("spills 40 bytes" in line for line in lines) == 4
    assert compile_report.main(["sm_89"]) == 0
