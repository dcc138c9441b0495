"""The rows of `gistfast.training.bench`: docstrings of the installed packages, or a file, and a guide store of them."""

import json
import random
import re
import sysconfig
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from gistfast.demo.docstrings import docstrings_in
from gistfast.rows.dataset import read_rows
from gistfast.stages.precompute import precompute

# What follows the first line where it is not a sentence: "Args: ...", "Parameters ------ ...", code and lists.
_HEADING = re.compile(r"[^A-Z]|\w+( \w+)?\s*(:|---|===)")


def docstring_pairs(num_rows: int) -> Iterator[tuple[str, str]]:
    """First line and text of docstrings of the installed packages, always the same for the same packages."""
    files = sorted(Path(sysconfig.get_paths()["purelib"]).glob("*/**/*.py"))
    random.Random(0).shuffle(files)
    seen: set[str] = set()
    for file in files:
        for docstring in docstrings_in(file):
            first, _, rest = docstring.partition("\n\n")
            text = " ".join(rest.split())
            new = first.endswith(".") and "\n" not in first and seen.isdisjoint({first, text[:50]})
            if new and len(first) > 20 and len(text) > 40 and not _HEADING.match(text):
                seen |= {first, text[:50]}
                yield first, text
                if len(seen) == 2 * num_rows:
                    return


def file_pairs(source: str, num_rows: int) -> Iterator[tuple[str, str]]:
    """The first anchors and positives of a source of rows."""
    batches = read_rows(source).batches()
    return islice(chain.from_iterable(zip(*rows.texts[:2], strict=True) for rows in batches), num_rows)


def make_store(
    folder: Path,
    name: str,
    guide: Path,
    num_rows: int,
    *,
    source: str | None = None,
    equal_length: int | None = None,
    holdout: float = 0.0,
) -> Path:
    """A guide store of pairs, made unless it is there.

    Args:
        folder: Of the stores.
        name: Of the guide.
        guide: Folder of the guide.
        num_rows: How many.
        source: Where they come from; docstrings when None.
        equal_length: Tokens that every text has at least; None to take the texts as they are.
        holdout: Share of the positives to hold out.
    """
    parts = [Path(source).stem if source else "docstrings", str(num_rows)]
    parts += [f"{equal_length}-tokens"] if equal_length else []
    parts += [f"{holdout}-held-out"] if holdout else []
    rows = folder / f"{'-'.join(parts)}.jsonl"
    store = folder / f"{name}-{rows.stem}"
    if not (store / "store.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        found = file_pairs(source, num_rows) if source else docstring_pairs(num_rows)
        # A word is a token at least: a text that is repeated so often is as long as can be.
        pairs = [[" ".join([text] * (equal_length or 1)) for text in pair] for pair in found]
        lines = [json.dumps({"anchor": anchor, "positive": positive}) for anchor, positive in pairs]
        rows.write_text("\n".join(lines), encoding="utf-8")
        precompute(rows, guide=guide, out=store, index="none", device="cpu", holdout=holdout, resume=True)
    return store
