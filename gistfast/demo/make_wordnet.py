"""Makes wordnet.parquet from WordNet's database files (Debian's package wordnet-base has them).

    python -m gistfast.demo.make_wordnet /usr/share/wordnet gistfast/demo/wordnet.parquet

A row is an anchor and its positive: a term or an example sentence, and the definition it belongs to. Only
definitions with several terms and at least one example are taken, so that, as in real data, one positive
has several anchors and one anchor ("run") may fit several positives.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

NUM_ROWS = 10_000
MIN_TERMS = 2
MIN_EXAMPLES = 1
MAX_ROWS_PER_DEFINITION = 6
# A demonstration need not teach slurs.
UNWANTED = re.compile(r"\b(offensive|slur|obscene|vulgar|derogatory|disparag\w+|taboo)\b", re.IGNORECASE)
QUOTED = re.compile(r'"([^"]+)"')


class Synset(NamedTuple):
    """One meaning: its terms, its definition, and sentences that use it."""

    terms: list[str]
    definition: str
    examples: list[str]


def read_synsets(folder: Path) -> Iterator[Synset]:
    """The meanings in data.noun, data.verb, data.adj and data.adv, in order."""
    for part in ("noun", "verb", "adj", "adv"):
        with (folder / f"data.{part}").open(encoding="ascii") as lines:
            # The licence heads each file, indented.
            yield from (parse_synset(line) for line in lines if not line.startswith("  "))


def parse_synset(line: str) -> Synset:
    """The meaning in one line: `offset file type count term id ... | definition; "example"`."""
    head, _, gloss = line.partition("|")
    parts = head.split()
    num_terms = int(parts[3], 16)
    # An adjective's term may carry its position: `due(p)`.
    terms = [re.sub(r"\(\w+\)$", "", term).replace("_", " ") for term in parts[4 : 4 + 2 * num_terms : 2]]
    definition = gloss.partition('"')[0].strip().rstrip(";:").strip()
    return Synset(terms, definition, [example.strip() for example in QUOTED.findall(gloss)])


def wanted(synset: Synset) -> bool:
    """Whether a meaning has a definition, several terms and an example, and offends nobody."""
    full = len(synset.terms) >= MIN_TERMS and len(synset.examples) >= MIN_EXAMPLES and synset.definition
    return bool(full) and not UNWANTED.search(synset.definition)


def choose_rows(synsets: list[Synset], num_rows: int = NUM_ROWS) -> list[tuple[str, str]]:
    """About `num_rows` rows (anchor, positive) of whole definitions, drawn by a hash of the definition."""
    drawn = sorted(synsets, key=lambda synset: hashlib.sha256(synset.definition.encode()).digest())
    rows: dict[tuple[str, str], None] = {}
    for synset in drawn:
        if len(rows) >= num_rows:
            break
        anchors = [*synset.examples[:3], *synset.terms][:MAX_ROWS_PER_DEFINITION]
        rows.update(dict.fromkeys((anchor, synset.definition) for anchor in anchors))
    return list(rows)


def main(folder: str, out: str) -> None:
    """Write the sample."""
    rows = choose_rows([synset for synset in read_synsets(Path(folder)) if wanted(synset)])
    anchors, positives = zip(*rows, strict=True)
    pq.write_table(pa.table({"anchor": anchors, "positive": positives}), out, compression="zstd")


if __name__ == "__main__":
    main(*sys.argv[1:])
