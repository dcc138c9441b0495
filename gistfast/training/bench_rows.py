"""The rows of `gistfast.training.bench`: docstrings of the installed packages, and a guide store of them."""

import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gistfast.demo.docstrings import docstrings_in
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


def make_store(folder: Path, name: str, guide: Path, num_rows: int, equal_length: int | None = None) -> Path:
    """A guide store of docstrings, made unless it is there.

    Args:
        folder: Of the stores.
        name: Of the guide.
        guide: Folder of the guide.
        num_rows: How many.
        equal_length: Tokens that every text has at least; None to take the texts as they are.
    """
    rows = folder / f"{num_rows}{f'-of-{equal_length}-tokens' if equal_length else ''}.jsonl"
    store = folder / f"{name}-{rows.stem}"
    if not (store / "store.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # A word is a token at least: a text that is repeated so often is as long as can be.
        pairs = [[" ".join([text] * (equal_length or 1)) for text in pair] for pair in docstring_pairs(num_rows)]
        lines = [json.dumps({"anchor": anchor, "positive": positive}) for anchor, positive in pairs]
        rows.write_text("\n".join(lines), encoding="utf-8")
        precompute(rows, guide=guide, out=store, index="none", device="cpu", resume=True)
    return store
