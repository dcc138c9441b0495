"""Time and memory of the guided loss against batch size, for our backends and what else there is.

    python -m gistfast.kernels.bench                  # what makes sense on this machine; appends to a CSV, draws SVGs
    python -m gistfast.kernels.bench --help

Figures are refused when the correctness gate fails. Every row of the CSV carries device, versions, commit and date; the
pictures are views of it.
"""

import argparse
import csv
import datetime
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gistfast.errors import OneLineParser

if TYPE_CHECKING:
    import torch

    from gistfast.kernels.baselines import LossFunction

FIELDS = (
    "date", "commit", "device", "torch", "triton", "loss", "pass", "dtype", "B", "D", "G",
    "ms", "ms_p20", "ms_p80", "peak_mib", "share_of_peak", "share_of_step", "note",
)  # fmt: skip
OURS = ("triton", "chunked")
LOSSES = (*OURS, "eager", "compiled", "st-gist", "st-cached-gist")
PATIENCE_MS = 1000.0  # a loss that takes longer is not taken to larger batches
DEFAULT_OUT = Path("docs/benchmarks")


def parser() -> argparse.ArgumentParser:
    """The options; kept free of heavy imports so that --help answers at once."""
    parser = OneLineParser(
        prog="python -m gistfast.kernels.bench", description=__doc__.split("\n\n")[0] if __doc__ else None
    )
    numbers: dict[str, Any] = {"type": int, "nargs": "+"}
    parser.add_argument(
        "--batch-sizes", **numbers, help="anchors a batch (default: 1k to 128k on a GPU, 256 to 2k on a CPU)"
    )
    parser.add_argument("--widths", **numbers, default=[384], help="student widths D")
    parser.add_argument("--guide-widths", **numbers, default=[384], help="guide widths G")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="of student vectors (default: bfloat16 on a GPU)"
    )
    parser.add_argument("--losses", nargs="+", choices=LOSSES, help="which to measure (default: all that run here)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of loss.csv and the pictures")
    parser.add_argument("--draw-only", action="store_true", help="measure nothing, draw loss.csv again")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, append to the CSV, draw, print a table; 1 when the gate fails, 2 for what cannot be done here."""
    options = parser().parse_args(argv)
    path = options.out / "loss.csv"
    if (refusal := _refusal(options, path)) is not None:
        print(f"no figures: {refusal}", file=sys.stderr)
        return 2
    if not options.draw_only:
        options.out.mkdir(parents=True, exist_ok=True)
        try:
            measure_all(options, path)
        except GateError as error:
            print(f"no figures: {error}", file=sys.stderr)
            return 1
    from gistfast.kernels.bench_pictures import draw

    for picture in draw(path, options.out):
        print(f"wrote {picture}")
    return 0


def _refusal(options: argparse.Namespace, path: Path) -> str | None:
    """What the options ask for and this machine has not, and what to do; None for nothing."""
    if options.draw_only:
        return None if path.is_file() else f"{path} is not there to be drawn: leave --draw-only out, or give its --out"
    import torch

    if "triton" in (options.losses or ()) and not torch.cuda.is_available():
        return "--losses triton needs a CUDA device, and there is none: leave it out, or measure where one is"
    return None


class GateError(Exception):
    """A loss differs from the reference by more than its precision explains."""


def measure_all(options: argparse.Namespace, path: Path) -> None:
    """Measure every loss at every shape, smallest batch first, and append a row for each as it comes."""
    import torch

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    sizes = options.batch_sizes or [2**k for k in (range(10, 18) if on_gpu else range(8, 12))]
    losses = options.losses or [name for name in LOSSES if on_gpu or name != "triton"]
    if not on_gpu:
        print(f"no CUDA device: the fused kernel is left out, and vectors are {str(dtype)[6:]}", file=sys.stderr)
    machine = Machine(device, dtype)
    functions = {name: loss_function(name) for name in losses}
    for name, function in functions.items():
        gate(name, function, device, dtype)
    print(f"{machine.name}, torch {torch.__version__}, {str(dtype)[6:]}")
    print(f"{machine.peak_tflops:.3g} TFLOP/s in one large matrix product")
    print(
        f"{'loss':<15} {'pass':<8} {'B':>7} {'D':>4} {'G':>4} {'ms':>10} {'peak MiB':>9} {'of peak':>7} {'of step':>7}"
    )
    for width in options.widths:
        for guide_width in options.guide_widths:
            for name, function in functions.items():
                for row in measure_loss(name, function, sizes, width, guide_width, machine):
                    append(path, row)
                    print(line(row))


class Machine:
    """What is measured on: its name, the rate of one large matrix product, and a student's texts a second."""

    def __init__(self, device: "torch.device", dtype: "torch.dtype") -> None:
        """Measure the machine's own rates first."""
        import torch
        import triton

        self.device, self.dtype = device, dtype
        self.name = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        )
        size = 8192 if device.type == "cuda" else 1024
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        self.peak_tflops = 2 * size**3 / quantiles(lambda: left @ right, device)[0] / 1e9
        self.student_texts_per_ms = student_rate(device)
        self.origin = {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), "commit": commit(), "device": self.name,
            "torch": torch.__version__, "triton": triton.__version__, "dtype": str(dtype)[6:],
        }  # fmt: skip


def commit() -> str:
    """The checkout's commit, with a + if files have changed since; "unknown" outside one."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def student_rate(device: "torch.device", tokens: int = 64) -> float:
    """Texts of `tokens` tokens a millisecond, forward and backward, of a 33 M student (12 layers of 384)."""
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536)
    student = BertModel(config).train()
    student.to(device)
    texts = 512 if device.type == "cuda" else 4
    ids = torch.randint(1000, 20_000, (texts, tokens), device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            student(input_ids=ids).last_hidden_state.float().mean().backward()

    return texts / quantiles(step, device)[0]


def loss_function(name: str) -> "LossFunction":
    """The loss of that name as a function of vectors."""
    from functools import partial

    from gistfast.kernels import baselines

    if name in OURS:
        return partial(_ours, name)
    if name == "compiled":
        return baselines.compiled()
    return {
        "eager": baselines.plain,
        "st-gist": baselines.sentence_transformers_gist,
        "st-cached-gist": baselines.sentence_transformers_cached_gist,
    }[name]


def _ours(backend: str, *tensors: "torch.Tensor") -> "torch.Tensor":
    """Our loss by `backend`, without text ids, as the others have none."""
    import torch

    from gistfast.kernels import baselines, fused, operator

    vectors, guide = list(tensors[:2]), list(tensors[2:])
    anchor = vectors[0]
    ids = list(torch.arange(2 * len(anchor), dtype=torch.int32, device=anchor.device).split(len(anchor)))
    settings = fused.Settings(
        row_offset=0, num_rows=len(anchor), margin=0.0, relative=False, contrast_anchors=True, contrast_positives=True,
        hard_only=False, guide_widths=(), guide_min=False, half=False, lowest_temperature=baselines.TEMPERATURE,
        with_gradients=anchor.requires_grad, learn_temperature=False, mean=True, chunk_bytes=0, backend=backend,
    )  # fmt: skip
    temperature = torch.full((), baselines.TEMPERATURE, device=anchor.device)
    return operator.guided_contrastive(vectors, guide, ids, temperature, settings)[0]


def vectors(
    size: int, width: int, guide_width: int, device: "torch.device", dtype: "torch.dtype"
) -> "list[torch.Tensor]":
    """Anchors and positives near each other, and guide vectors in fp16 that hold some false negatives."""
    import torch

    generator = torch.Generator(device).manual_seed(size)

    def normal(columns: int) -> "torch.Tensor":
        return torch.randn(size, columns, device=device, generator=generator)

    anchor, guide = normal(width), normal(guide_width)
    made = [anchor, anchor + 4 * normal(width), guide, guide + 1.5 * normal(guide_width)]
    guide_dtype = torch.float16 if device.type == "cuda" else torch.float32
    return [tensor.to(dtype if index < 2 else guide_dtype) for index, tensor in enumerate(made)]


def gate(name: str, function: "LossFunction", device: "torch.device", dtype: "torch.dtype") -> None:
    """Compare loss and gradients with the plain formula in float64 at B = 192, D = G = 128.

    Raises:
        GateError: When they differ by more than the precision explains.
    """
    import torch

    from gistfast.kernels import baselines

    inputs = vectors(192, 128, 128, device, dtype)
    tolerance = 2e-3 if dtype == torch.float32 else 0.15  # guide scores at the threshold fall either way
    results = []
    for candidate, precision in ((function, dtype), (baselines.plain, torch.float64)):
        students = [tensor.to(precision).detach().requires_grad_() for tensor in inputs[:2]]
        guides = [tensor.to(torch.float64) if precision == torch.float64 else tensor for tensor in inputs[2:]]
        loss = candidate(*students, *guides)
        loss.backward()
        results.append([loss.detach(), *(tensor.grad for tensor in students)])
    for what, found, expected in zip(("loss", "anchor gradient", "positive gradient"), *results, strict=True):
        error = float((found.double() - expected).norm() / expected.norm())
        if not error <= tolerance:
            raise GateError(f"{name}: the {what} is off by {error:.2g} relative to float64, {tolerance:.2g} is allowed")


def measure_loss(
    name: str, function: "LossFunction", sizes: list[int], width: int, guide_width: int, machine: Machine
) -> Iterator[dict[str, Any]]:
    """A row for each batch size and pass, until the memory does not suffice."""
    import torch

    for size in sizes:
        for with_backward in (False, True):
            row = {
                **machine.origin,
                "loss": name,
                "pass": "fwd+bwd" if with_backward else "fwd",
                "B": size,
                "D": width,
                "G": guide_width,
            }
            needed = 12 * size**2 * width * 4 if name == "st-gist" else 60 * size**2 if name == "eager" else 0
            if machine.device.type == "cpu" and needed > 6 * 2**30:
                yield {**row, "note": f"left out: would take about {needed / 2**30:.0f} GiB"}
                return
            try:
                measured = figures(function, size, width, guide_width, with_backward, machine)
                yield {**row, **measured}
            except torch.OutOfMemoryError:
                yield {**row, "note": "out of memory"}
                return
            finally:
                if machine.device.type == "cuda":
                    torch.cuda.empty_cache()
            if float(measured["ms"]) > PATIENCE_MS:
                yield {**row, "note": f"larger batches left out: this one took {float(measured['ms']) / 1e3:.0f} s"}
                return


def figures(
    function: "LossFunction", size: int, width: int, guide_width: int, with_backward: bool, machine: Machine
) -> dict[str, Any]:
    """Time, peak memory beyond the inputs, and what share they are of the machine's peak and of a training step."""
    anchor, positive, *guides = vectors(size, width, guide_width, machine.device, machine.dtype)
    students = [tensor.requires_grad_(with_backward) for tensor in (anchor, positive)]

    def run() -> None:
        for tensor in students:
            tensor.grad = None
        loss = function(*students, *guides)
        if with_backward:
            loss.backward()

    run()
    peak_mib = peak_memory_mib(run, machine.device)
    median, low, high = quantiles(run, machine.device)
    # Three blocks of scores for student and guide, and two products on each block for the student's gradient.
    flops = 2 * 3 * size**2 * (width + guide_width + (2 * width if with_backward else 0))
    student_ms = 2 * size / machine.student_texts_per_ms
    return {
        "ms": f"{median:.4g}", "ms_p20": f"{low:.4g}", "ms_p80": f"{high:.4g}", "peak_mib": f"{peak_mib:.0f}",
        "share_of_peak": f"{flops / median / 1e9 / machine.peak_tflops:.3f}",
        "share_of_step": f"{median / (median + student_ms):.4f}" if with_backward else "",
    }  # fmt: skip


def quantiles(run: Callable[[], Any], device: "torch.device") -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the milliseconds that `run` takes, warm-up apart."""
    if device.type == "cuda":
        from triton.testing import do_bench

        median, low, high = do_bench(run, warmup=30, rep=150, quantiles=[0.5, 0.2, 0.8])
        return median, low, high
    import time

    run()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 1000 and len(times) < 50):
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3)
    times.sort()
    return times[len(times) // 2], times[len(times) // 5], times[-1 - len(times) // 5]


def peak_memory_mib(run: Callable[[], Any], device: "torch.device") -> float:
    """The most memory that one run holds beyond what was there before."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # PyTorch keeps no peak for a CPU: add up what its allocator says of every operation.
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = lowest = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        # What a run before has left, such as gradients, is freed at the start: that is no part of this run.
        lowest = min(lowest, held)
        most = max(most, held - lowest)
    return most / 2**20


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row to the CSV, with the header first if it is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        if new:
            writer.writeheader()
        writer.writerow(row)


def line(row: dict[str, Any]) -> str:
    """A row as the table shows it."""
    head = f"{row['loss']:<15} {row['pass']:<8} {row['B']:>7} {row['D']:>4} {row['G']:>4}"
    if "ms" not in row:
        return f"{head} {row['note']}"
    return f"{head} {row['ms']:>10} {row['peak_mib']:>9} {row['share_of_peak']:>7} {row['share_of_step']:>7}"


if __name__ == "__main__":
    sys.exit(main())
