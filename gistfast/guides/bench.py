"""Texts embedded a second, against sentence-transformers: `python -m gistfast.guides.bench`.

The same guide, texts and threads, in turns within one run: `SentenceTransformer.encode` with its default settings,
which sorts by characters, and the guide as `gistfast precompute` runs it, each in fp32 and bf16; with several values of
--attention once for each. The texts are docstrings of installed packages: English of every length. Vectors are compared
first; wrong ones give no figures.
"""

import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from gistfast.demo.docstrings import docstrings_in
from gistfast.demo.models import demo_guide
from gistfast.errors import OneLineParser
from gistfast.guides.batch_done import BatchDone
from gistfast.guides.directions import Vectors
from gistfast.guides.guide import ModelGuide, load_guide
from gistfast.guides.precision import cpu_multiplies_bfloat16
from gistfast.models.folder import model_folder
from gistfast.models.packed_texts import Attention
from gistfast.models.pretrained import load_sentence_transformer, pick_device

# gistfast depends on them, so they are there.
PACKAGES = ("numpy", "pandas", "torch", "transformers")
BASELINE = "encode, float32"
# The largest difference that a score, a cosine of two texts, may have from encode's in fp32.
LARGEST_ERROR = {"float32": 1e-5, "bfloat16": 0.006}


@dataclass(frozen=True)
class Contender:
    """One way to embed the texts.

    Attributes:
        name: As the table shows it.
        dtype: Precision that it computes in.
        embed: Gives vectors of length 1.
        done: What gistfast embedded so far.
    """

    name: str
    dtype: str
    embed: Callable[[list[str]], Vectors]
    done: list[BatchDone] = field(default_factory=list)

    @property
    def padding(self) -> float:
        """Tokens computed for each token of a text."""
        return sum(batch.num_padded for batch in self.done) / sum(batch.num_tokens for batch in self.done)


def docstrings(count: int, seed: int = 0) -> list[str]:
    """`count` different docstrings, drawn at random from the packages' files; the same in each run.

    Raises:
        SystemExit: When the packages hold fewer.
    """
    roots = [Path(place) for name in PACKAGES for place in getattr(find_spec(name), "submodule_search_locations", [])]
    files = sorted(path for root in roots for path in root.rglob("*.py") if "tests" not in path.parts)
    draw = random.Random(seed)
    draw.shuffle(files)
    found: dict[str, None] = {}
    for path in files:
        # Several times more than wanted, so that no file decides.
        if len(found) >= 4 * count:
            break
        found.update(dict.fromkeys(docstrings_in(path)))
    if len(found) < count:
        raise SystemExit(f"found {len(found)} docstrings in {', '.join(PACKAGES)}: give --texts {len(found)} or fewer")
    return draw.sample(list(found), count)


def contenders(
    guide: str, device: str, tokens_per_batch: int | None, attentions: Sequence[Attention]
) -> list[Contender]:
    """All ways to compare, the baseline first; bf16 only where the device multiplies it.

    Args:
        guide: Folder or hub id.
        device: As PyTorch names it.
        tokens_per_batch: Token budget; chosen for the device when None.
        attentions: Of gistfast, one way for each.
    """
    fast = device != "cpu" or cpu_multiplies_bfloat16()
    made = []
    for dtype in ("float32", "bfloat16") if fast else ("float32",):
        peer = load_sentence_transformer(model_folder(guide), dtype=getattr(torch, dtype), device=device)
        made.append(Contender(f"encode, {dtype}", dtype, _encoder(peer)))
        for attention in attentions:
            mine = load_guide(guide, dtype=dtype, device=device, tokens_per_batch=tokens_per_batch, attention=attention)
            name = "gistfast" if attention == "auto" else f"gistfast {attention}"
            done: list[BatchDone] = []
            made.append(Contender(f"{name}, {dtype}", dtype, _embedder(mine, done), done))
    return made


def _encoder(model: SentenceTransformer) -> Callable[[list[str]], Vectors]:
    return lambda texts: model.encode(texts, normalize_embeddings=True, show_progress_bar=False)


def _embedder(guide: ModelGuide, done: list[BatchDone]) -> Callable[[list[str]], Vectors]:
    return lambda texts: guide.embed(texts, "document", done.append)


def score_errors(vectors: Vectors, exact: Vectors) -> "np.ndarray[Any, Any]":
    """How far the score of each pair of two texts is from the exact one."""
    pairs = np.triu_indices(len(exact), 1)
    return np.abs(vectors @ vectors.T - exact @ exact.T)[pairs]


def check(errors: dict[str, "np.ndarray[Any, Any]"], ways: Sequence[Contender]) -> None:
    """Refuse figures when the vectors of gistfast are not those of encode.

    Raises:
        SystemExit: When a score is too far off.
    """
    for way in ways:
        largest, limit = errors[way.name].max(), LARGEST_ERROR[way.dtype]
        if way.name.startswith("gistfast") and not largest <= limit:
            raise SystemExit(
                f"{way.name}: a score is {largest:.1e} from encode's, at most {limit} is right: no figures"
            )


def measure(ways: Sequence[Contender], texts: list[str], repeats: int) -> dict[str, "np.ndarray[Any, Any]"]:
    """Seconds of each way in each of `repeats` rounds; who begins a round changes."""
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for repeat in range(repeats):
        first = repeat % len(ways)
        for way in (*ways[first:], *ways[:first]):
            begun_s = time.perf_counter()
            way.embed(texts)
            seconds[way.name].append(time.perf_counter() - begun_s)
    return {name: np.array(values) for name, values in seconds.items()}


def report(
    ways: Sequence[Contender], seconds: dict[str, "np.ndarray[Any, Any]"], errors: dict[str, Any], num_texts: int
) -> str:
    """The table: rates, how many times as fast as the baseline in the same round, and score errors."""
    lines = [
        "| | texts/s | times encode in fp32 | largest score error | mean |",
        "|---|---|---|---|---|",
    ]
    for way in ways:
        rate = _spread(num_texts / seconds[way.name], ".1f")
        times = _spread(seconds[BASELINE] / seconds[way.name], ".2f")
        lines.append(
            f"| {way.name} | {rate} | {times} | {errors[way.name].max():.1e} | {errors[way.name].mean():.1e} |"
        )
    return "\n".join(lines)


def _spread(values: "np.ndarray[Any, Any]", form: str) -> str:
    low, median, high = np.percentile(values, [20, 50, 80])
    return f"{median:{form}} ({low:{form}} to {high:{form}})"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the exit code."""
    parser = OneLineParser(prog="python -m gistfast.guides.bench", description=__doc__)
    parser.add_argument("--guide", help="folder or hub id (default: all-MiniLM-L6-v2, from gistfast[demo])")
    parser.add_argument("--texts", type=int, default=1000, help="texts to embed (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds to time (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--tokens-per-batch", type=int, help="token budget (default: as precompute chooses)")
    parser.add_argument(
        "--attention", nargs="+", choices=get_args(Attention), default=["auto"], help="one or several (default: auto)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    guide, device = options.guide or str(demo_guide()), pick_device(options.device)
    texts = docstrings(options.texts)
    ways = contenders(guide, device, options.tokens_per_batch, options.attention)
    vectors = {way.name: way.embed(texts) for way in ways}
    errors = {name: score_errors(given, vectors[BASELINE]) for name, given in vectors.items()}
    check(errors, ways)
    mine = [way for way in ways if way.done]
    tokens_a_text = sum(batch.num_tokens for batch in mine[0].done) / len(texts)
    padding = ", ".join(f"{way.padding:.3f} ({way.name})" for way in mine)
    seconds = measure(ways, texts, options.repeats)
    where = (
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        if device == "cpu"
        else device
    )
    print(f"{model_folder(guide).name}, {len(texts)} docstrings of {tokens_a_text:.0f} tokens on average, {where}")
    print(f"padding factor {padding}; median of {options.repeats} rounds, 20th to 80th percentile in brackets\n")
    print(report(ways, seconds, errors, len(texts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
