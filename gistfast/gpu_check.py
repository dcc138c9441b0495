"""Everything worth knowing about a CUDA machine, in one go: GPU tests, loss benchmark, and a short training run.

    python -m gistfast.gpu_check --out gpu-check

Runs from a bare checkout: gistfast need not be installed, and a part whose packages are missing is left out by name.
What it finds is left in one folder. Exit status 1 when a part fails.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TEXT_TOKENS = 64
STEPS = 50
STUDENT_PACKAGES = ("accelerate", "datasets", "rich", "sentence_transformers", "tokenizers")
RUNS: dict[str, dict[str, Any]] = {
    "padded": {"attention": "padded"},
    "unpadded": {"attention": "unpadded"},
    "compiled": {"compile": True},
}


def main(argv: list[str] | None = None) -> int:
    """Run the parts one after the other; returns 1 when one fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of the results")
    parser.add_argument("--only", choices=("tests", "bench", "train"), help="run one part alone")
    options = parser.parse_args(argv)
    if (lacking := _lacking()) is not None:
        print(f"gpu-check: {lacking}", file=sys.stderr)
        return 1
    import torch

    options.out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, tuple[tuple[str, ...], Callable[[Path], bool]]] = {
        "tests": (("pytest",), run_tests),
        "train": (STUDENT_PACKAGES, run_training),
        "bench": (("matplotlib",), run_benchmark),
    }
    summary: dict[str, object] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name, (packages, part) in parts.items():
        if options.only not in (None, name):
            continue
        missing = _missing(packages)
        begin = time.perf_counter()
        outcome = (
            f"left out: {', '.join(missing)} not installed" if missing else "passed" if part(options.out) else "FAILED"
        )
        summary[name] = {"outcome": outcome, "elapsed_s": round(time.perf_counter() - begin, 1)}
        print(f"gpu-check: {name}: {outcome} in {time.perf_counter() - begin:.0f} s", flush=True)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if "FAILED" in json.dumps(summary) else 0


def _lacking() -> str | None:
    """What keeps every part from running here, and what to do; None for nothing."""
    if _missing(["torch"]):
        return f"{sys.executable} has no torch: name a Python that has it, make gpu-check PYTHON=/path/to/python"
    import torch

    if not torch.cuda.is_available():
        found = f"torch {torch.__version__} finds no CUDA device"
        return f"{found}: run it on a machine with one, by a torch that is built for CUDA"
    return None


def run_tests(out: Path) -> bool:
    """The tests marked gpu: of the loss, and, where its packages are installed, of the student."""
    files, missing = ["tests/test_gpu.py"], _missing(STUDENT_PACKAGES)
    if missing:
        print(f"gpu-check: tests of the student left out: {', '.join(missing)} not installed", flush=True)
    else:
        files.append("tests/test_gpu_attention.py")
    return _logged(
        [sys.executable, "-m", "pytest", *files, "-m", "gpu", "-q", "--import-mode=importlib", "-rs"], out / "tests.txt"
    )


def _missing(packages: Sequence[str]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


def run_benchmark(out: Path) -> bool:
    """The loss benchmark: every loss at D = G = 384, ours at other widths."""
    bench = [sys.executable, "-m", "gistfast.kernels.bench", "--out", str(out)]
    wider = ["--losses", "triton", "--batch-sizes", "1024", "16384", "65536", "131072"]
    return (
        _logged(bench, out / "bench.txt")
        and _logged([*bench, *wider, "--guide-widths", "1024"], out / "bench.txt")
        and _logged([*bench, *wider, "--widths", "768", "--guide-widths", "384", "1024"], out / "bench.txt")
    )


def _logged(command: list[str], log: Path) -> bool:
    """Whether `command` succeeds; what it prints goes to the terminal and is appended to `log`."""
    with (
        log.open("a") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run,
    ):
        assert run.stdout is not None  # asked for by PIPE
        for line in run.stdout:
            print(line, end="", flush=True)
            file.write(line)
    return run.returncode == 0


def run_training(out: Path) -> bool:
    """Fifty steps of `gistfast train` in bf16: an untrained student of 33 M parameters, a store of random vectors.

    What the student learns is not the point; that it trains on the card through the fused loss is, and how fast, with
    texts padded, in one row where the card can do that, and compiled.
    """
    from gistfast.errors import ConfigError

    work = out / "work"
    store, student = make_store(work / "store"), make_student(work / "student")
    found: dict[str, Any] = {}
    for name, options in RUNS.items():
        try:
            found[name] = _train(store, student, work / name, **options)
        except ConfigError as error:
            found[name] = {"left_out": str(error)}
        print(f"training, {name}: {found[name]}", flush=True)
    (out / "train.json").write_text(json.dumps(found, indent=1) + "\n")
    ran = [run for run in found.values() if "left_out" not in run]
    return found["padded"] in ran and all(run["steps"] == STEPS and run["last_loss"] < run["first_loss"] for run in ran)


def _train(store: Path, student: Path, out: Path, **options: Any) -> dict[str, Any]:
    import torch

    from gistfast.stages.train import train

    torch.cuda.reset_peak_memory_stats()
    # Variable-length attention knows no dropout.
    report = train(
        store, student=str(student), out=out, max_steps=STEPS, batch_size=1024, bf16=True, backend="triton",
        temperature=0.05, learning_rate=3e-4, dropout=0.0, logging_steps=1, trackers=(), overwrite=True, **options,
    )  # fmt: skip
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    return {
        "steps": report.steps,
        "elapsed_s": round(report.elapsed_s, 1),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "dropped": report.dropped,
        "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20),
    }


def make_store(path: Path) -> Path:
    """A store of the demo's rows with random guide vectors of width 384."""
    import numpy as np

    from gistfast.demo.data import wordnet_pairs
    from gistfast.rows.dataset import read_rows
    from gistfast.store import GuideInfo, StoreWriter

    guide = GuideInfo.of_vectors("random", "random", width=384, dtype="float16")
    random = np.random.default_rng(0)
    source = read_rows(wordnet_pairs())
    with StoreWriter.create(path, guide=guide, source=source, mode="resume") as writer:
        if writer.needs_rows:
            for rows in source.batches():
                writer.add_rows(rows)
            writer.finish_rows()
        for shard in writer.vectors.pending():
            vectors = random.standard_normal((len(writer.vectors.texts_of(shard)), 384), dtype=np.float32)
            writer.vectors.write(shard, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        writer.publish()
    return path


def make_student(path: Path) -> Path:
    """An untrained encoder of 12 layers of 384 with a vocabulary made of the demo's texts."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from gistfast.demo.data import wordnet_pairs
    from gistfast.rows.dataset import read_rows

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    texts = (text for rows in read_rows(wordnet_pairs()).batches() for column in rows.texts for text in column)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=8000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", special.index("[CLS]")), ("[SEP]", special.index("[SEP]"))]
    )
    encoder = path / "encoder"
    config = BertConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536, vocab_size=30522
    )
    BertModel(config).save_pretrained(encoder)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    wrapped: Any = PreTrainedTokenizerFast  # its signature is untyped
    wrapped(tokenizer_object=tokenizer, model_max_length=TEXT_TOKENS, **names).save_pretrained(encoder)
    transformer = Transformer(str(encoder), max_seq_length=TEXT_TOKENS)
    SentenceTransformer(modules=[transformer, Pooling(384)]).save(str(path))
    return path


if __name__ == "__main__":
    sys.exit(main())
