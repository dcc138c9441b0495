"""Pairs of Debian's package descriptions, short and long, as JSON lines.

curl -s http://deb.debian.org/debian/dists/bookworm/main/i18n/Translation-en.xz | python debian_pairs.py > pairs.jsonl
"""

import json
import lzma
import random
import re
import sys

ENTRY = re.compile(r"^Description-en: (.+)\n((?: .*\n)+)", re.MULTILINE)


def main() -> None:
    """Read the descriptions from standard input, write the pairs in random order, always the same."""
    pairs: dict[str, tuple[str, str]] = {}
    for short, lines in ENTRY.findall(lzma.decompress(sys.stdin.buffer.read()).decode()):
        text = " ".join(line.strip() for line in lines.splitlines() if line.strip() != ".")
        # The packages of one source begin alike.
        pairs.setdefault(text[:80], (short, text))
    distinct = list(dict(pairs.values()).items())
    random.Random(0).shuffle(distinct)
    for short, text in distinct:
        print(json.dumps({"anchor": short, "positive": text}))


if __name__ == "__main__":
    main()
