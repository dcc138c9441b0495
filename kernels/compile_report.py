"""What the kernel takes on cards that need not be here: registers, spills and shared memory, compiled ahead of time.

    python -m gistfast.kernels.compile_report [sm_90 ...]

Exit status 1 when a variant does not fit its card, or one that training meets spills on sm_90. Not in the interpreter.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gistfast.kernels.exp_tiles import _exp_tiles, tile_shape
from gistfast.kernels.triton_backend import ALIGN_WIDTH

# The most shared memory one block may use, in bytes, by compute capability (CUDA C++ programming guide).
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# With this version of Triton none of these variants spills on sm_90; others schedule and allocate differently.
CLEAN_TRITON = "3.7.1"
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Variant:
    """One specialisation of the kernel.

    Attributes:
        capability: Of the card, 90 for an H100.
        student: Dtype of the student's vectors: fp32 ones are split in two halves.
        guide: Dtype of the guide's vectors, or None for no guide.
        width: D, and `guide_width` that of each guide.
        guides: How many guides judge one by one.
        guide_min: Whether the lowest of their scores counts.
        gradients: Whether E is written.
        redo: Whether it is the second pass, over rows that a low temperature lost.
        hard_only: As in `gistfast.guided_contrastive_loss`.
        ragged: Whether the number of rows is no multiple of 16: then addresses are not known to be aligned.
    """

    capability: int
    student: torch.dtype = torch.float16
    guide: torch.dtype | None = torch.float16
    width: int = 384
    guide_width: int = 384
    guides: int = 1
    guide_min: bool = False
    gradients: bool = True
    redo: bool = False
    hard_only: bool = False
    ragged: bool = False

    @property
    def precise(self) -> bool:
        """Whether vectors are split, so that row and column operands differ."""
        return torch.float32 in (self.student, self.guide)

    @property
    def e_dtype(self) -> torch.dtype:
        """Dtype of E."""
        return torch.float32 if self.student == torch.float32 else torch.bfloat16

    def __str__(self) -> str:
        guide = "none" if self.guide is None else f"{_NAMES[self.guide]} {self.guide_width}"
        if self.guides > 1:
            guide = f"{self.guides} x {guide} {'min' if self.guide_min else 'max'}"
        flags = [name for name in ("gradients", "redo", "hard_only", "ragged") if getattr(self, name)]
        student = f"sm_{self.capability} {_NAMES[self.student]} {self.width}"
        return f"{student}, guide {guide}, {' '.join(flags) or 'loss alone'}"


@dataclass(frozen=True)
class Usage:
    """What one compiled variant takes: registers a thread, spilled bytes a thread, shared bytes a block."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def default_variants(capability: int) -> Iterator[Variant]:
    """What a run with default options meets on a card: both precisions, with gradients and without, both passes."""
    for student, gradients, redo in product((torch.float16, torch.float32), (True, False), (False, True)):
        yield Variant(capability, student, gradients=gradients, redo=redo)


def several_guides(capability: int) -> Iterator[Variant]:
    """What a training run with two guides of their own judgement meets."""
    for student, guide_min, redo in product((torch.float16, torch.float32), (False, True), (False, True)):
        yield Variant(capability, student, guides=2, guide_min=guide_min, redo=redo)


def further_variants(capability: int) -> Iterator[Variant]:
    """Other widths, guides and options."""
    for student in (torch.float16, torch.float32):
        for width, guide_width in ((384, 1024), (768, 768), (1024, 4096), (64, 64)):
            yield Variant(capability, student, width=width, guide_width=guide_width)
        yield Variant(capability, student, guide=None)
        yield Variant(capability, student, guide=torch.float32)
        yield Variant(capability, student, guides=3)
        yield Variant(capability, student, guides=2, gradients=False)
        yield Variant(capability, student, hard_only=True)
        yield Variant(capability, student, ragged=True)


def usage(variant: Variant) -> Usage:
    """Compile `variant` and read what it takes from the binary."""
    shape = tile_shape(torch.float32 if variant.precise else torch.bfloat16, variant.capability)
    guide_steps = _stack_width(variant.guide, variant.guide_width) // shape.block_k
    student_steps = _stack_width(variant.student, variant.width) // shape.block_k
    constants = {
        "GUIDE_STEPS": tuple(number * guide_steps for number in range(variant.guides + 1)),
        "GUIDE_MIN": variant.guide_min, "STEPS": variant.guides * guide_steps + student_steps,
        "BLOCK_M": shape.block_m, "BLOCK_N": shape.block_n, "BLOCK_K": shape.block_k,
        "HARD_ONLY": variant.hard_only, "REDO": variant.redo, "WRITE_E": variant.gradients,
    }  # fmt: skip
    types = dict.fromkeys(constants, "constexpr") | {
        "rows_desc": f"tensordesc<fp16[{shape.block_m}, {shape.block_k}]>",
        "columns_desc": f"tensordesc<fp16[{shape.block_n}, {shape.block_k}]>",
        "e_desc": f"tensordesc<{_NAMES[variant.e_dtype]}[{shape.block_m}, {shape.block_n // 2}]>",
        "ids_ptr": "*i32",
        "segments_ptr": "*i32",
        "lost_ptr": "*i32",
        "kept_ptr": "*i32",
    }
    names = _exp_tiles.arg_names
    signature = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
    numbers = {(names.index(name),): value for name, value in constants.items()}
    # By number of argument, as the compiler asks: what is known to be a multiple of 16.
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in _aligned(names, variant)}
    compiled = triton.compile(
        ASTSource(_exp_tiles, signature, numbers, aligned),
        target=GPUTarget("cuda", variant.capability, 32),
        # Fusion is what kernels run with by default; Triton 3.9 asks to have it said.
        options={"num_warps": shape.num_warps, "num_stages": shape.num_stages, "enable_fp_fusion": True},
    )
    registers, spilled = _resources(compiled.asm["cubin"])
    return Usage(registers, spilled, int(compiled.metadata.shared))


def problems(variant: Variant, used: Usage) -> list[str]:
    """Why `variant` must not be shipped: it does not fit the card, or training meets it and it spills on an H100."""
    found = []
    if used.shared_bytes > SHARED_LIMIT[variant.capability]:
        found.append(f"{used.shared_bytes} bytes of shared memory, the card has {SHARED_LIMIT[variant.capability]}")
    if used.spilled_bytes and variant in (*default_variants(90), *several_guides(90)):
        known = "" if triton.__version__ == CLEAN_TRITON else f"; {CLEAN_TRITON} is known not to"
        found.append(f"spills {used.spilled_bytes} bytes a thread with triton {triton.__version__}{known}")
    return found


def _stack_width(dtype: torch.dtype | None, width: int) -> int:
    """How wide vectors are in the stack: fp32 ones take three parts, no vectors one block of zeros."""
    if dtype is None:
        return ALIGN_WIDTH
    return -(-width // ALIGN_WIDTH) * ALIGN_WIDTH * (3 if dtype == torch.float32 else 1)


def _aligned(names: list[str], variant: Variant) -> list[str]:
    """Arguments known to be multiples of 16: whole tensors always, parts of one and counts unless rows are ragged."""
    parts = ("threshold_ptr", "ref_ptr", "own_ptr")
    counts = ("num_rows", "first_row", "first_positive")
    aligned = [name for name in names if name.endswith("_ptr") or name in counts]
    return [name for name in aligned if not (variant.ragged and name in (*parts, "num_rows"))]


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and local-memory bytes a thread of a binary, by the cuobjdump that Triton brings."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", listing)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {listing!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def main(cards: list[str]) -> int:
    """Print the table for the cards named, or all; 1 when a variant does not fit."""
    failed = 0
    print(f"triton {triton.__version__}\n{'variant':<60} registers  spilled B  shared KiB")
    for capability in [int(card.removeprefix("sm_")) for card in cards] or SHARED_LIMIT:
        for variant in (*default_variants(capability), *several_guides(capability), *further_variants(capability)):
            used = usage(variant)
            wrong = problems(variant, used)
            failed += bool(wrong)
            numbers = f"{used.registers:>9}  {used.spilled_bytes:>9}  {used.shared_bytes / 1024:>10.1f}"
            print(f"{variant!s:<60} {numbers}  {'; '.join(wrong)}".rstrip(), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
