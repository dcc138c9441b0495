"""Training on several stores."""

import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from train_cases import ROWS, WORDS, killed_at, records, resumes_exactly, same_weights, steps, train_small

from gistfast import guided_contrastive_loss
from gistfast.batches import MixedBatches, StoreBatches
from gistfast.errors import ConfigError, GistfastError, StoreError
from gistfast.evaluation.retrieval import MEASURES
from gistfast.neighbours.index_search import ExactSearch
from gistfast.neighbours.mining import mine
from gistfast.store import GuideStore
from gistfast.store.mined import MinedInfo
from gistfast.training.collate import MixedRows
from gistfast.training.means import StepMeans
from gistfast.training.stores import short_names

# With negatives, and fewer rows than the other store.
TRIPLES = [(f"a {word}", f"{word}, in other words", f"not a {word}") for word in (*WORDS, "anchor", "lamp")]
STEPS = {"proportional": [4, 3], "round_robin": [3, 3]}


@pytest.fixture
def stores(make_store: Callable[..., GuideStore]) -> list[GuideStore]:
    """Pairs and triples; the guides' vectors are of different widths."""
    return [make_store(ROWS, name="pairs"), make_store(TRIPLES, name="triples", width=24)]


@pytest.fixture
def held_out(make_store: Callable[..., GuideStore]) -> list[GuideStore]:
    """The same, with held-out rows."""
    pairs = make_store(ROWS, name="pairs", holdout=0.3)
    return [pairs, make_store(TRIPLES, name="triples", width=24, holdout=0.3)]


@pytest.fixture
def mine_of() -> Callable[[GuideStore], None]:
    """Mines two negatives of each row of a store."""

    def mine_two(store: GuideStore) -> None:
        info = MinedInfo(negatives=2, margin=0.0, margin_strategy="absolute", store_fingerprint=store.fingerprint)
        mine(store, info, ExactSearch(store, "cpu"))

    return mine_two


@pytest.fixture
def run(tiny_student: Path, tmp_path: Path) -> Callable[..., Any]:
    """Training of a tiny student, into tmp_path/"student" unless told otherwise."""

    def train(stores: list[GuideStore] | GuideStore, **options: Any) -> Any:
        paths = stores.path if isinstance(stores, GuideStore) else [store.path for store in stores]
        return train_small(**{"store": paths, "student": tiny_student, "out": tmp_path / "student"} | options)

    return train


def store_of(record: dict[str, Any]) -> str:
    """The one store whose loss is in a record of the log."""
    (name,) = [name.removeprefix("loss/") for name in record if name.startswith("loss/")]
    assert record[f"loss/{name}"] == round(record["loss"], 4)
    return name


# What is trained on.


@pytest.mark.parametrize("mixing", ["proportional", "round_robin"])
def test_each_store_has_its_share_of_the_steps(
    mixing: str, run: Callable[..., Any], stores: list[GuideStore], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "gistfast"):
        report = run(stores, mixing=mixing, max_steps=None, epochs=2.0)
    taken = [store_of(record) for record in steps(report.path)]
    assert [taken.count(name) for name in ("pairs", "triples")] == [2 * count for count in STEPS[mixing]]
    if mixing == "round_robin":
        assert taken == ["pairs", "triples"] * 6
    assert f"pairs: 16 rows, {STEPS[mixing][0]} of its 4 batches an epoch" in caplog.text
    assert f"26 rows, {sum(STEPS[mixing])} batches of up to 4 an epoch, {report.steps} steps" in caplog.text


@pytest.mark.parametrize("mixing", ["proportional", "round_robin"])
def test_loss_of_each_step_is_that_of_rows_and_guide_of_one_store(
    mixing: Any, run: Callable[..., Any], stores: list[GuideStore], tiny_student: Path
) -> None:
    # The student hardly moves, so that each step can be taken by itself.
    options = {"max_steps": None, "epochs": 2.0, "dropout": 0.0, "learning_rate": 1e-12}
    log = steps(run(stores, mixing=mixing, margin=0.3, margin_end=0.0, temperature_decay=0.5, **options).path)
    student = SentenceTransformer(str(tiny_student), device="cpu")
    rows = MixedRows(stores, "train")
    sampler = MixedBatches(tuple(StoreBatches(store) for store in stores), mixing)(rows, 4, False, seed=42)
    batches = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches += [rows.__getitems__(batch) for batch in sampler]
    expected = [loss_of(student, stores, *batch, record) for batch, record in zip(batches, log, strict=True)]
    assert [record["loss"] for record in log] == pytest.approx(expected, rel=1e-4)
    assert len({record["temperature"] for record in log}) > 3


def loss_of(
    student: SentenceTransformer, stores: list[GuideStore], number: int, rows: Any, record: dict[str, float]
) -> float:
    """The loss of rows of a store, in float64."""
    store = stores[number]
    ids = torch.from_numpy(store.rows[rows])
    vectors = [student.encode(store.texts.take(column), convert_to_tensor=True).double() for column in ids.T.numpy()]
    guides = [store.gather(column).double() for column in ids.T]
    identity = [store.identity(column) for column in ids.T]
    loss = guided_contrastive_loss(
        *vectors, **dict(zip(("guide_anchor", "guide_positive", "guide_negative"), guides, strict=False)),
        **dict(zip(("anchor_ids", "positive_ids", "negative_ids"), identity, strict=False)),
        temperature=record["temperature"], margin=record["margin"], backend="reference",
    )  # fmt: skip
    return float(loss)


def test_blocks_are_counted_in_the_steps_that_have_them(run: Callable[..., Any], stores: list[GuideStore]) -> None:
    report = run(stores, mixing="round_robin")
    shares = [record["dropped/an"] for record in steps(report.path) if store_of(record) == "triples"]
    assert all("dropped/an" not in record for record in steps(report.path) if store_of(record) == "pairs")
    assert report.dropped["an"] == pytest.approx(sum(shares) / 3)
    assert run(stores, mixing="round_robin", overwrite=True, logging_steps=3).dropped["an"] > 0


def test_one_store_in_a_list_is_one_store(run: Callable[..., Any], stores: list[GuideStore], tmp_path: Path) -> None:
    plain, listed = run(stores[0], out=tmp_path / "plain"), run(stores[:1])
    assert same_weights(plain.path, listed.path)
    assert [record["loss"] for record in steps(plain.path)] == [record["loss"] for record in steps(listed.path)]
    assert listed.stores == {}
    assert not any("/pairs" in name for record in records(listed.path) for name in record)


def test_learned_temperature_is_one_weight_of_all_stores(run: Callable[..., Any], stores: list[GuideStore]) -> None:
    report = run(stores, mixing="round_robin", learn_temperature=True, save_steps=3, save_total_limit=1)
    assert len({record["temperature"] for record in steps(report.path)}) == 6
    saved = load_file(report.path / "checkpoints" / "checkpoint-6" / "trained.safetensors")
    assert list(saved) == ["learned_temperature.log"]
    assert float(saved["learned_temperature.log"].exp()) == pytest.approx(report.temperature)


def test_mined_negatives_are_added_in_every_store(
    run: Callable[..., Any], stores: list[GuideStore], mine_of: Callable[..., None]
) -> None:
    mine_of(stores[0])
    with pytest.raises(StoreError, match=f"{stores[1].path} has no mined negatives"):
        run(stores, mined_negatives=1)
    mine_of(stores[1])
    with pytest.raises(ConfigError, match=f"3 mined negatives are asked for, {stores[0].path} has 2"):
        run(stores, mined_negatives=3)
    log = steps(run(stores, mined_negatives=2, mixing="round_robin", batch_size=5, max_steps=2).path)
    assert [record["texts"] for record in log] == [4 * 4, 5 * 5]
    assert all(record["dropped/an"] >= 0 for record in log)


# What is evaluated.


def test_each_store_is_evaluated_and_the_mean_is_reported(run: Callable[..., Any], held_out: list[GuideStore]) -> None:
    report = run(held_out, eval_steps=3)
    evaluated = [record for record in records(report.path) if "eval_loss" in record]
    assert [record["step"] for record in evaluated] == [0, 3, 6]
    for record in evaluated:
        for measure in MEASURES:
            name = f"eval_held_out_cosine_{measure}"
            assert record[name] == pytest.approx((record[f"{name}/pairs"] + record[f"{name}/triples"]) / 2)
        losses = record["eval_loss/pairs"], record["eval_loss/triples"]
        assert min(losses) <= record["eval_loss"] <= max(losses)
    assert report.evaluation["ndcg@10"] == evaluated[-1]["eval_held_out_cosine_ndcg@10"]
    assert report.stores["pairs"]["ndcg@10"] == evaluated[-1]["eval_held_out_cosine_ndcg@10/pairs"]
    assert {name: found["rows"] for name, found in report.stores.items()} == {
        store.path.name: int((~store.held_out).sum()) for store in held_out
    }
    assert json.loads((report.path / "report.json").read_text())["stores"] == report.stores


def test_store_without_held_out_rows_is_not_evaluated(
    run: Callable[..., Any],
    held_out: list[GuideStore],
    make_store: Callable[..., GuideStore],
    caplog: pytest.LogCaptureFixture,
) -> None:
    others = [make_store(ROWS[:12], name="a"), make_store(ROWS[4:], name="b")]
    with pytest.raises(ConfigError, match=f"needs held-out rows, {others[0].path} and {others[1].path} have none"):
        run(others, eval_steps=2)
    with caplog.at_level(logging.INFO, "gistfast"):
        report = run([others[0], held_out[1]], eval_steps=6)
    assert f"{others[0].path} has no held-out rows: it is not evaluated" in caplog.text
    last = [record for record in records(report.path) if "eval_loss" in record][-1]
    assert not any(name.endswith("/a") for name in last)
    assert last["eval_loss/triples"] == pytest.approx(last["eval_loss"], rel=0.1)
    assert last["eval_held_out_cosine_ndcg@10/triples"] == last["eval_held_out_cosine_ndcg@10"]


def test_best_student_is_that_of_the_highest_mean(
    run: Callable[..., Any], held_out: list[GuideStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {"held_out/pairs": [0.9, 0.9, 0.4, 0.2, 0.1], "held_out/triples": [0.9, 0.1, 0.8, 0.9, 0.9]}

    def given(self: Any, model: Any, output_path: Any, epoch: Any, steps: int) -> dict[str, float]:
        return {f"{self.name}_cosine_{measure}": scores[self.name][steps] for measure in MEASURES}

    monkeypatch.setattr(InformationRetrievalEvaluator, "__call__", given)
    report = run(held_out, eval_steps=1, keep_best=True, max_steps=4)
    assert (report.best_step, report.evaluation["ndcg@10"]) == (2, pytest.approx(0.6))
    assert report.stores["triples"]["ndcg@10"] == 0.8


# What is left, and going on.


@pytest.mark.parametrize(
    "options",
    [
        {"mixing": "proportional", "workers": 2},
        {"mixing": "round_robin", "cached": True, "learn_temperature": True},
        {"mixing": "round_robin", "eval_steps": 2, "keep_best": True, "batching": "length"},
        {"batching": "cluster", "clusters": 2, "logging_steps": 2},
    ],
    ids=lambda options: ",".join(map(str, options.values())),
)
def test_killed_run_resumes_mid_epoch_to_the_same_weights(
    options: dict[str, Any], run: Callable[..., Any], held_out: list[GuideStore], tmp_path: Path
) -> None:
    # Epochs of five or four steps: the fifth, where the power goes, follows a checkpoint in the midst of one.
    undisturbed, resumed = resumes_exactly(partial(run, held_out, batch_size=3), tmp_path, max_steps=7, **options)
    assert (undisturbed.dropped, undisturbed.stores) == (resumed.dropped, resumed.stores)


def test_run_is_resumed_with_the_same_stores_in_the_same_order(
    run: Callable[..., Any], stores: list[GuideStore], make_store: Callable[..., GuideStore]
) -> None:
    report = run(stores)
    with pytest.raises(ConfigError, match="its stores come in another order than pairs, "):
        run(stores[::-1], resume=True)
    with pytest.raises(ConfigError, match="it had 2 stores, found 1: resume"):
        run(stores[:1], resume=True)
    with pytest.raises(ConfigError, match="pairs: guide of the store had width 16, found 24"):
        run([make_store(ROWS, name="wider", width=24), stores[1]], resume=True)
    with pytest.raises(ConfigError, match="--mixing was None, found round_robin"):
        run(stores, resume=True, mixing="round_robin")
    assert run(stores, resume=True) == report


def test_resumed_run_calls_moved_stores_as_before(
    run: Callable[..., Any], stores: list[GuideStore], tmp_path: Path
) -> None:
    with killed_at(5):
        run(stores, save_steps=2, mixing="round_robin")
    moved = [GuideStore.open(store.path.rename(tmp_path / f"moved-{store.path.name}")) for store in stores]
    resumed = run(moved, save_steps=2, mixing="round_robin", resume=True)
    assert list(resumed.stores) == ["pairs", "triples"]
    assert [store_of(record) for record in steps(resumed.path)] == ["pairs", "triples"] * 3


def test_card_names_every_guide_and_all_data(run: Callable[..., Any], held_out: list[GuideStore]) -> None:
    card = (run(held_out, eval_steps=6, mixing="round_robin", query_prompt="word: ").path / "README.md").read_text()
    section = card[card.index("## Guided Training") : card.index("## Training Details")]
    for store in held_out:
        assert f"### Store {store.path.name}\n" in section
        for fact in (store.fingerprint, f"{store.width} wide", f"{store.path.name}.jsonl", f"{store.num_rows} with"):
            assert fact in section
        # Sentence-transformers tells of each data set, with its own loss.
        assert card.count(f'"store": "{store.fingerprint}"') == 2
        assert f"{store.manifest.data.description}, held-out rows" in card
    assert "**Mixing:** round_robin; no batch has rows of two stores" in section
    assert "`multi_dataset_batch_sampler`: round_robin" in card


# Wrong input: one line, nothing written.


def test_wrong_stores_are_refused_by_their_paths(
    run: Callable[..., Any], stores: list[GuideStore], make_store: Callable[..., GuideStore], tmp_path: Path
) -> None:
    pairs, triples = stores
    copied = shutil.copytree(pairs.path, tmp_path / "copied")
    tasks = make_store([(f"{one} {other}", other) for one, other in ROWS], name="tasks", tasks=["a", "b"] * 8)
    unfinished = make_store(ROWS[:9], name="unfinished")
    (unfinished.path / "store.json").rename(unfinished.path / "next.json")
    one_row = make_store(ROWS[:1], name="one row")
    same = "hold the same rows and guide vectors: give one of them"
    for paths, options, error, message in (
        ([pairs.path, triples.path, copied], {}, ConfigError, f"{pairs.path} and {copied} {same}"),
        ([pairs.path, pairs.path], {}, ConfigError, same),
        ([pairs.path, unfinished.path], {}, StoreError, f"{unfinished.path} is not finished"),
        ([pairs.path, tmp_path / "none"], {}, StoreError, f"{tmp_path / 'none'} has no store.json"),
        ([], {}, ConfigError, "STORE is needed"),
        ([pairs.path], {"mixing": "round_robin"}, ConfigError, "--mixing round_robin does nothing with one store"),
        ([pairs.path, triples.path], {"batch_size": 12}, ConfigError, f"{triples.path} has 10 rows to train on"),
        (
            [pairs.path, one_row.path],
            {},
            ConfigError,
            f"{one_row.path} has 1 rows to train on: a step needs 2 at least",
        ),
        ([tasks.path, pairs.path], {"batching": "task"}, ConfigError, f"{pairs.path} has none"),
    ):
        with pytest.raises(error, match=message) as caught:
            run(pairs, store=paths, **options)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, GistfastError)
        assert not (tmp_path / "student").exists()


# Names and means.


def test_names_are_as_long_as_it_takes_to_tell_stores_apart() -> None:
    assert short_names([Path("/data/pairs"), Path("/data/triples")]) == ["pairs", "triples"]
    assert short_names([Path("/one/store"), Path("/two/store")]) == ["one/store", "two/store"]
    assert short_names([Path("/a/b/store"), Path("/c/b/store"), Path("/store")])[0] == "a/b/store"
    assert short_names([Path("/data/pairs")]) == ["pairs"]


def test_means_are_over_the_steps_that_have_a_value() -> None:
    means = StepMeans()
    assert means.take() == {}
    means.add({"one": torch.tensor(1.0), "two": torch.tensor(4.0)})
    means.add({"one": torch.tensor(2.0)})
    assert means.take() == {"one": 1.5, "two": 4.0}
    means.add({"two": torch.tensor(1.0)})
    assert means.take() == {"two": 1.0}


def test_means_are_over_the_steps_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(found: list[Any], own: dict[str, Any]) -> None:
        # The other process has had two steps, and no value of "one".
        found[:] = [own, {"two": [6.0, 2.0]}]

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    means = StepMeans()
    means.add({"one": torch.tensor(1.0), "two": torch.tensor(3.0)})
    assert means.take() == {"one": 1.0, "two": 3.0}
