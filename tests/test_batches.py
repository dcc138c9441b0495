import pickle
import sys
from collections.abc import Callable
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch.utils.data import ConcatDataset

from gistfast.batches import (
    ClusterBatchSampler,
    EvenBatchSampler,
    LengthBatchSampler,
    MixedBatches,
    ProportionalBatchSampler,
    RoundRobinBatchSampler,
    StoreBatches,
    TaskBatchSampler,
    num_batches,
)
from gistfast.batches import clusters as clusters_module
from gistfast.batches.bench import main as bench_main
from gistfast.batches.choice import row_lengths
from gistfast.batches.clusters import cluster_places, default_count
from gistfast.batches.compare import _scores, compare
from gistfast.batches.compare import main as compare_main
from gistfast.engines.shards import embed_shards
from gistfast.errors import ConfigError, DependencyError, StoreError
from gistfast.losses.gist_loss import GISTLoss
from gistfast.rows.dataset import read_rows
from gistfast.settings.stages import TrainSettings, build
from gistfast.stages.train import train
from gistfast.store import GuideStore, StoreWriter
from gistfast.training.collate import MixedRows
from gistfast.training.trainer import GuidedTrainer


def sampler(num_rows: int, batch_size: int, *, drop_last: bool = False, seed: int = 0) -> EvenBatchSampler:
    return EvenBatchSampler(range(num_rows), batch_size=batch_size, drop_last=drop_last, seed=seed)


def every_way(keys: list[int], batch_size: int, **options: Any) -> list[EvenBatchSampler]:
    """One sampler of each kind over rows with these keys."""
    options = {"drop_last": False} | options
    keyed = (LengthBatchSampler, TaskBatchSampler, ClusterBatchSampler)
    made = [cls(range(len(keys)), batch_size, keys=np.array(keys, np.int64), **options) for cls in keyed]
    return [EvenBatchSampler(range(len(keys)), batch_size, **options), *made]


PROPERTY = settings(deadline=None, derandomize=True, database=None)
# Small numbers collide, large ones do not fit 16 bits.
KEYS = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 100_000)), min_size=1, max_size=120)
SIZES = st.integers(1, 40)


@PROPERTY
@given(KEYS, SIZES, st.integers(0, 2**40), st.integers(0, 3))
def test_every_row_comes_once_in_every_mode(keys: list[int], batch_size: int, seed: int, epoch: int) -> None:
    for each in every_way(keys, batch_size, seed=seed):
        each.set_epoch(epoch)
        batches = list(each)
        assert sorted(chain(*batches)) == list(range(len(keys)))
        assert max(map(len, batches)) <= batch_size
        assert len(batches) == len(each)


@PROPERTY
@given(KEYS, SIZES)
def test_sizes_differ_by_one_row_where_all_rows_may_meet(keys: list[int], batch_size: int) -> None:
    for each in every_way(keys, batch_size):
        sizes = [len(batch) for batch in each]
        if not isinstance(each, TaskBatchSampler):
            assert max(sizes) - min(sizes) <= 1
            assert len(sizes) == num_batches(len(keys), batch_size)


@PROPERTY
@given(KEYS, SIZES, st.integers(0, 3))
def test_tasks_never_meet_and_each_is_cut_evenly(keys: list[int], batch_size: int, epoch: int) -> None:
    tasks = TaskBatchSampler(range(len(keys)), batch_size, drop_last=False, keys=np.array(keys))
    tasks.set_epoch(epoch)
    sizes: dict[int, list[int]] = {}
    for batch in tasks:
        (task,) = {keys[row] for row in batch}
        sizes.setdefault(task, []).append(len(batch))
    for task, found in sizes.items():
        assert max(found) - min(found) <= 1
        assert len(found) == num_batches(keys.count(task), batch_size)


@PROPERTY
@given(KEYS, SIZES, st.integers(0, 3))
def test_clusters_meet_only_with_those_next_to_them(keys: list[int], batch_size: int, epoch: int) -> None:
    clusters = ClusterBatchSampler(range(len(keys)), batch_size, drop_last=False, keys=np.array(keys))
    clusters.set_epoch(epoch)
    ring = sorted(set(keys))
    for batch in clusters:
        places = [place for place, _ in groupby(ring.index(keys[row]) for row in batch)]
        # One after the other around the ring, and every cluster between the first and the last is there whole.
        assert all((first + 1) % len(ring) == second for first, second in pairwise(places))
        for place in places[1:-1]:
            assert sum(keys[row] == ring[place] for row in batch) == keys.count(ring[place])


@PROPERTY
@given(KEYS, SIZES, st.integers(1, 3))
def test_several_processes_get_full_batches_and_what_meets_in_a_step_keeps_to_the_mode(
    keys: list[int], batch_size: int, processes: int
) -> None:
    for each in every_way(keys, batch_size, drop_last=True, processes=processes):
        shards = [list(BatchSamplerShard(each, processes, process, even_batches=False)) for process in range(processes)]
        steps = [list(chain(*batches)) for batches in zip(*shards, strict=True)]
        assert all(len(batch) == batch_size for shard in shards for batch in shard)
        assert len(steps) * processes == len(each)
        rows = list(chain(*steps))
        assert len(set(rows)) == len(rows)
        if isinstance(each, TaskBatchSampler):
            assert all(len({keys[row] for row in step}) == 1 for step in steps)
        else:
            assert len(steps) == len(keys) // (batch_size * processes)


def test_long_rows_are_shared_among_the_processes_of_a_step() -> None:
    lengths = np.arange(4096)
    lengthwise = LengthBatchSampler(range(4096), 16, drop_last=True, keys=lengths, processes=4)
    batches = list(lengthwise)
    for step in range(0, len(batches), 4):
        means = [lengths[batch].mean() for batch in batches[step : step + 4]]
        others = lengths[list(chain(*batches[step : step + 4]))]
        assert max(means) - min(means) < np.ptp(others) / 4


def test_several_processes_without_full_batches_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 processes need full batches, found drop_last=False"):
        EvenBatchSampler(range(10), 4, drop_last=False, processes=2)


def test_full_batches_where_several_processes_need_them() -> None:
    assert [len(batch) for batch in sampler(100, 64, drop_last=True)] == [64]


def test_full_batches_leave_other_rows_out_in_each_epoch() -> None:
    for each in every_way([0] * 50 + [1] * 50, 32, drop_last=True):
        left_out = []
        for epoch in range(4):
            each.set_epoch(epoch)
            left_out.append(frozenset(range(100)) - set(chain(*each)))
        assert len(set(left_out)) == 4


def test_order_follows_from_seed_and_epoch_alone() -> None:
    keys = [row % 3 for row in range(50)]
    for first, second, other in zip(*(every_way(keys, 8, seed=seed) for seed in (0, 0, 1)), strict=True):
        for epoch in (0, 1):
            first.set_epoch(epoch)
            undisturbed = list(first)
        # Straight to the second epoch, as a resumed run goes.
        second.set_epoch(1)
        torch.rand(3)
        assert list(second) == undisturbed == list(second)
        second.set_epoch(0)
        assert list(second) != undisturbed
        other.set_epoch(0)
        assert list(other) != list(second)


def test_rows_meet_others_in_each_epoch() -> None:
    for each in every_way([row // 100 for row in range(400)], 10):
        partners: list[set[int]] = []
        for epoch in range(3):
            each.set_epoch(epoch)
            partners.append(next({*batch} - {7} for batch in each if 7 in batch))
        assert partners[0] != partners[1] != partners[2]


def test_rows_of_similar_length_meet_in_random_order() -> None:
    lengths = np.random.default_rng(0).lognormal(4, 1, 10_000).astype(np.int64)
    lengthwise = list(LengthBatchSampler(range(10_000), 20, drop_last=False, keys=lengths))
    at_random = list(sampler(10_000, 20))

    def spread(batches: list[list[int]]) -> float:
        return float(np.mean([np.ptp(np.log(lengths[batch])) for batch in batches]))

    assert spread(lengthwise) < spread(at_random) / 5
    # No trend: the first half of an epoch is as long as the second.
    means = np.array([lengths[batch].mean() for batch in lengthwise])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.15


def test_keys_of_other_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"prepared for 3 rows, the data set has 4: .*to_dataset\('train'\)"):
        LengthBatchSampler(range(4), 2, drop_last=False, keys=np.arange(3))


def test_ten_million_rows_are_held_as_numbers_of_four_bytes() -> None:
    # 2**20 rows show it as well.
    places = np.random.default_rng(0).integers(0, 500, 2**20)
    clusters = ClusterBatchSampler(range(2**20), 64, drop_last=False, keys=places)
    steps = clusters._steps(torch.Generator().manual_seed(0))
    assert steps.rows.dtype == np.int32
    assert clusters._keys.dtype == np.uint16
    assert np.array_equal(np.sort(steps.rows), np.arange(2**20))


# Several stores in one epoch.

STORES = st.lists(st.integers(1, 60), min_size=1, max_size=4)


def mixed(
    mixer: Callable[..., Any], sizes: list[int], batch_size: int, *, seed: int = 0, **options: Any
) -> tuple[Any, np.ndarray[Any, Any]]:
    """A mixer over stores of these sizes, each batched by its own mode, and the store of each row."""
    stores = [list(range(size)) for size in sizes]
    kinds = (EvenBatchSampler, LengthBatchSampler, TaskBatchSampler, ClusterBatchSampler)
    options = {"drop_last": False, "seed": seed} | options
    samplers = []
    for number, (store, cls) in enumerate(zip(stores, kinds, strict=False)):
        keyed = {"keys": np.arange(len(store)) // 7} if number else {}
        samplers.append(cls(store, batch_size, **keyed, **options))
    dataset: ConcatDataset[int] = ConcatDataset(stores)  # type: ignore[arg-type]
    return mixer(dataset, samplers, torch.Generator(), seed), np.repeat(np.arange(len(sizes)), sizes)


@PROPERTY
@given(STORES, SIZES, st.integers(0, 2))
def test_proportional_batches_take_all_rows_and_never_mix_stores(sizes: list[int], batch_size: int, epoch: int) -> None:
    mixer, store_of_row = mixed(ProportionalBatchSampler, sizes, batch_size)
    mixer.set_epoch(epoch)
    batches = list(mixer)
    assert sorted(chain(*batches)) == list(range(sum(sizes)))
    assert all(len(set(store_of_row[batch])) == 1 for batch in batches)
    assert len(batches) == len(mixer)


@PROPERTY
@given(STORES, SIZES, st.integers(0, 2))
def test_round_robin_takes_stores_in_turn_until_the_smallest_is_used_up(
    sizes: list[int], batch_size: int, epoch: int
) -> None:
    mixer, store_of_row = mixed(RoundRobinBatchSampler, sizes, batch_size)
    mixer.set_epoch(epoch)
    batches = list(mixer)
    turns = [int(store) for batch in batches for store in set(store_of_row[batch])]
    fewest = min(len(each) for each in mixer.batch_samplers)
    assert turns == list(range(len(sizes))) * fewest
    assert len(batches) == len(mixer)
    assert len(set(chain(*batches))) == len(list(chain(*batches)))


@pytest.mark.parametrize("mixer", [ProportionalBatchSampler, RoundRobinBatchSampler])
def test_processes_take_a_step_in_one_store(mixer: Callable[..., Any]) -> None:
    made, store_of_row = mixed(mixer, [40, 60, 20], 4, drop_last=True, processes=2)
    batches = list(made)
    assert len(batches) == len(made)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert len(set(store_of_row[first + second])) == 1


@pytest.mark.parametrize("mixer", [ProportionalBatchSampler, RoundRobinBatchSampler])
def test_mixed_order_follows_from_seed_and_epoch_alone(mixer: Callable[..., Any]) -> None:
    first, second, other = (mixed(mixer, [40, 60, 20], 4, seed=seed)[0] for seed in (0, 0, 1))
    for epoch in (0, 1):
        first.set_epoch(epoch)
        undisturbed = list(first)
    second.set_epoch(1)
    second.generator.manual_seed(99)
    torch.rand(3)
    assert list(second) == undisturbed
    second.set_epoch(0)
    assert list(second) != undisturbed
    other.set_epoch(1)
    assert list(other) != undisturbed


def test_held_out_rows_are_all_taken_however_stores_are_mixed(make_store: Callable[..., GuideStore]) -> None:
    stores = [make_store(TEXTS[:rows], name=f"of {rows}", holdout=0.3) for rows in (40, 20)]
    made = MixedBatches(tuple(StoreBatches(store, "length") for store in stores), "round_robin")
    train, held_out = (MixedRows(stores, split) for split in ("train", "held_out"))
    assert len(made(train, 4, False)) == sum(made.num_batches(4))
    assert len(set(made.num_batches(4))) == 1
    assert sorted(chain(*made(held_out, 4, False))) == list(range(len(held_out)))
    assert len(pickle.dumps(made)) < 2000


def test_tasks_do_not_meet_in_batches_of_several_stores(make_store: Callable[..., GuideStore]) -> None:
    stores = [make_store(TEXTS[:rows], name=f"of {rows}", tasks=TASKS[:rows]) for rows in (60, 30)]
    rows = MixedRows(stores, "train")
    sampler = MixedBatches(tuple(StoreBatches(store, "task") for store in stores))(rows, 6, False)
    batches = [rows.__getitems__(batch) for batch in sampler]
    assert all(len(set(stores[store].task_of_rows[numbers])) == 1 for store, numbers in batches)
    assert sorted((store, row) for store, numbers in batches for row in numbers) == [
        (store, row) for store in range(2) for row in range(stores[store].num_rows)
    ]


def test_rows_of_two_stores_are_no_batch(make_store: Callable[..., GuideStore]) -> None:
    rows = MixedRows([make_store(TEXTS[:rows], name=f"of {rows}") for rows in (40, 20)], "train")
    store, numbers = rows.__getitems__([40, 43])
    assert (store, numbers.tolist()) == (1, [0, 3])
    with pytest.raises(AssertionError, match="a batch is of one store"):
        rows.__getitems__([39, 40])


# The samplers of a store.

TEXTS = [(f"anchor {'word ' * (row % 9)}{row}", f"positive {row // 2}") for row in range(60)]


@pytest.fixture
def store(make_store: Callable[..., GuideStore]) -> GuideStore:
    """Sixty pairs, some of which are held out."""
    return make_store(TEXTS, holdout=0.2)


def test_lengths_are_those_of_the_longest_text_of_each_training_row(store: GuideStore) -> None:
    rows = store.to_dataset("train")
    longest = [max(len(row["anchor"]), len(row["positive"])) for row in rows]
    assert row_lengths(store).tolist() == longest


def test_lengths_are_counted_in_characters(make_store: Callable[..., GuideStore]) -> None:
    store = make_store([("é", "日本語"), ("a" * 5, "b")])
    assert row_lengths(store).tolist() == [3, 5]
    assert store.texts.num_characters().dtype == np.int32


def test_numbers_of_clusters_suit_the_data() -> None:
    assert default_count(100_000, 64) == 195
    assert default_count(10, 4) == 2
    assert default_count(10_000_000, 64) == 4096


def test_anchors_of_one_cluster_are_alike(store: GuideStore) -> None:
    places = cluster_places(store, 6, seed=0)
    anchors = store.gather(torch.from_numpy(store.rows[~store.held_out, 0])).float()
    anchors = torch.nn.functional.normalize(anchors, dim=-1)
    scores = (anchors @ anchors.T).numpy()
    together = places[:, None] == places[None]
    np.fill_diagonal(together, False)
    apart = places[:, None] != places[None]
    assert scores[together].mean() > scores[apart].mean() + 0.2
    # Next on the ring is nearer than elsewhere.
    steps = np.abs(places[:, None].astype(int) - places[None].astype(int))
    near, far = np.minimum(steps, 6 - steps) == 1, np.minimum(steps, 6 - steps) > 1
    assert scores[near].mean() > scores[far].mean()


def test_clusters_follow_from_the_seed_and_are_kept(store: GuideStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cluster_places(store, 5, seed=3)
    (path,) = (store.path / "clusters").iterdir()
    path.unlink()
    assert np.array_equal(cluster_places(store, 5, seed=3), first)
    # The first who writes them decides, whatever another machine would have found.
    monkeypatch.setattr(clusters_module, "_places_of", lambda *given: pytest.fail("made again"))
    assert np.array_equal(cluster_places(store, 5, seed=3), first)
    assert not store.verify()


def test_clusters_of_another_writer_are_taken_over(store: GuideStore, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = np.zeros(int((~store.held_out).sum()), np.uint8)
    made = clusters_module._places_of

    def too_late(*given: Any) -> Any:
        clusters_module._write(store.path / "clusters" / f"{store.fingerprint}-5-3.npy", theirs)
        return made(*given)

    monkeypatch.setattr(clusters_module, "_places_of", too_late)
    assert np.array_equal(cluster_places(store, 5, seed=3), theirs)


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_damaged_clusters_are_refused(store: GuideStore, content: bytes) -> None:
    cluster_places(store, 5, seed=3)
    (path,) = (store.path / "clusters").iterdir()
    path.write_bytes(content)
    with pytest.raises(StoreError, match="is damaged: delete it"):
        cluster_places(store, 5, seed=3)


def test_more_clusters_than_anchors_are_refused(store: GuideStore) -> None:
    with pytest.raises(ConfigError, match=r"--clusters 61 is more than the \d+ distinct anchors"):
        cluster_places(store, 61, seed=0)


def test_clusters_without_their_mode_are_refused() -> None:
    with pytest.raises(ConfigError, match="--clusters 4 does nothing with --batching random"):
        build(TrainSettings, {"store": "s", "student": "m", "out": "o", "clusters": 4})


def test_missing_faiss_is_said_when_clusters_are_asked_for(store: GuideStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DependencyError, match=r"--batching cluster needs faiss.*or choose another --batching"):
        StoreBatches(store, "cluster")


def test_store_without_tasks_is_refused_by_name(store: GuideStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--batching task needs a task for each row, .* has none"):
        train(store.path, student="unused", out=tmp_path / "out", batching="task", batch_size=4)
    assert not (tmp_path / "out").exists()


TASKS = ["nli"] * 30 + ["qa"] * 20 + [None] * 9 + ["lone"]


def test_rows_of_one_task_meet_and_those_without_one_are_a_task(make_store: Callable[..., GuideStore]) -> None:
    store = make_store(TEXTS, holdout=0.2, tasks=TASKS)
    rows = store.to_dataset("train")
    task_of_anchor = {anchor: task for (anchor, _), task in zip(TEXTS, TASKS, strict=True)}
    made = StoreBatches(store, "task")
    batches = [{task_of_anchor[anchor] for anchor in rows[batch]["anchor"]} for batch in made(rows, 6, False)]
    assert all(len(tasks) == 1 for tasks in batches)
    assert set.union(*batches) == {task_of_anchor[anchor] for anchor in rows["anchor"]}
    assert made.num_batches(6) == len(batches)


def test_tasks_too_small_for_a_step_are_named(
    make_store: Callable[..., GuideStore], caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(TEXTS, tasks=TASKS)
    StoreBatches(store, "task", processes=2)(store.to_dataset("train"), 6, True)
    assert "fewer rows than a step of 12, so left out: no task, lone" in caplog.text
    caplog.clear()
    StoreBatches(store, "task")(store.to_dataset("train"), 6, False)
    assert not caplog.text


def test_held_out_rows_are_always_drawn_at_random(store: GuideStore) -> None:
    made = StoreBatches(store, "cluster", clusters=4, processes=2)
    assert type(made(store.to_dataset("held_out"), 4, False)) is EvenBatchSampler
    assert type(made(store.to_dataset("train"), 4, True)) is ClusterBatchSampler


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("batching", ["random", "length", "cluster"])
def test_announced_batches_are_those_of_an_epoch(store: GuideStore, batching: Any, processes: int) -> None:
    made = StoreBatches(store, batching, processes=processes)
    sampler = made(store.to_dataset("train"), 7, processes > 1)
    assert made.num_batches(7) == len(sampler) / processes == len(list(sampler)) / processes


def test_announced_batches_of_tasks_are_those_of_an_epoch(make_store: Callable[..., GuideStore]) -> None:
    store = make_store(TEXTS, tasks=TASKS)
    made = StoreBatches(store, "task", processes=2)
    assert made.num_batches(6) == len(list(made(store.to_dataset("train"), 6, True))) / 2 == 3


def test_comparison_counts_what_the_guide_drops(store: GuideStore) -> None:
    found = dict(compare(store, batch_size=100, num_batches=5))
    rows = store.rows[~store.held_out]
    vectors = torch.nn.functional.normalize(store.gather(torch.from_numpy(rows)).double(), dim=-1)
    scores = (vectors[:, 0] @ vectors[:, 1].T).numpy()
    same = rows[:, None, 1] == rows[None, :, 1]
    dropped = (scores > np.diag(scores)[:, None] + 1e-7) | same
    np.fill_diagonal(dropped, False)
    kept = np.where(dropped | np.eye(len(rows), dtype=bool), -np.inf, scores).max(1)
    # One batch holds all rows, whichever way.
    assert set(found) == {"random", "length", "cluster"}
    for meetings in found.values():
        assert (meetings.batches, meetings.rows) == (1, len(rows))
        assert meetings.dropped_per_row == pytest.approx(dropped.sum(1).mean())
        assert meetings.dropped == pytest.approx(dropped.sum() / (len(rows) * (len(rows) - 1)))
        assert meetings.hardest == pytest.approx(kept[np.isfinite(kept)].mean(), abs=1e-5)


@pytest.mark.parametrize("how", ["mean", "min", "max"])
def test_comparison_scores_as_several_guides_do(
    store: GuideStore, tmp_path: Path, random_guide: Callable[..., Any], how: str
) -> None:
    guide = random_guide(width=8, weights_hash="1")
    source = read_rows(tmp_path / "store.jsonl")
    options: Any = {"mode": "add_guide", "guide_score": how, "guide_weight": 3.0}
    with StoreWriter.create(store.path, guide=guide.info, source=source, **options) as writer:
        embed_shards(writer.vectors, guide)
        both = GuideStore.open(writer.publish())
    ids = both.rows[:9]
    cosines = []
    for vectors in torch.split(both.gather(torch.from_numpy(ids)).double(), both.guide_widths, dim=-1):
        anchors, positives = torch.nn.functional.normalize(vectors, dim=-1).unbind(1)
        cosines.append(anchors @ positives.T)
    expected = {
        "mean": 0.25 * cosines[0] + 0.75 * cosines[1],
        "min": torch.minimum(*cosines),
        "max": torch.maximum(*cosines),
    }
    torch.testing.assert_close(_scores(both, ids).double(), expected[how], rtol=0, atol=2e-3)


def test_comparison_prints_a_line_for_each_way(store: GuideStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_main([str(store.path), "--batch-size", "8"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["batching", "random", "length", "cluster"]
    padding = {line[0]: float(line[-1]) for line in lines[1:]}
    assert padding["length"] < padding["random"]


def test_comparison_of_no_store_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        compare_main([str(tmp_path)])
    assert left.value.code == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"gistfast: {tmp_path} has no store.json: make a guide store with `gistfast precompute`\n"


def test_benchmark_prints_a_line_for_each_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_main(["--rows", "1000"]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["batching", "random", "length", "task", "cluster"]


# In training.


def dying_at(number: int) -> Callable[..., torch.Tensor]:
    """A step of training that fails at its n-th call."""
    training_step, taken = GuidedTrainer.training_step, []

    def step(self: GuidedTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        taken.append(None)
        if len(taken) == number:
            raise RuntimeError("the power went")
        return training_step(self, *arguments, **options)

    return step


def arguments(folder: Path, **options: Any) -> SentenceTransformerTrainingArguments:
    """Of sentence-transformers' own trainer: three epochs in batches of six."""
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=6,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=5,
        **options,
    )


def test_sentence_transformers_own_trainer_takes_stores_in_turn(
    make_store: Callable[..., GuideStore], tiny_student: Path, tmp_path: Path
) -> None:
    stores = [make_store(TEXTS[:rows], name=f"of {rows}") for rows in (40, 20)]
    model = SentenceTransformer(str(tiny_student), device="cpu")
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments(tmp_path, batch_sampler=EvenBatchSampler, multi_dataset_batch_sampler=RoundRobinBatchSampler),
        train_dataset=DatasetDict({store.path.name: store.to_dataset("train") for store in stores}),
        loss={store.path.name: GISTLoss(model, store) for store in stores},
    )
    batches = list(trainer.get_train_dataloader().batch_sampler)
    assert [min(batch) >= 40 for batch in batches] == [False, True] * 4
    assert sorted(row for batch in batches[1::2] for row in batch) == list(range(40, 60))


def test_sentence_transformers_own_trainer_sees_the_clusters_of_each_epoch(
    store: GuideStore, tiny_student: Path, tmp_path: Path
) -> None:
    model = SentenceTransformer(str(tiny_student), device="cpu")
    seen: list[list[int]] = []

    class Loss(GISTLoss):
        def forward(self, features: Any, labels: torch.Tensor) -> torch.Tensor:
            seen.append(labels[:, 0].tolist())
            return super().forward(features, labels)

    rows = store.to_dataset("train")
    batches = StoreBatches(store, "cluster", clusters=4)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments(tmp_path, batch_sampler=batches),
        train_dataset=rows,
        loss=Loss(model, store),
    )
    trainer.train()
    expected = batches(rows, 6, False, seed=5)
    assert isinstance(expected, ClusterBatchSampler)
    orders = []
    for epoch in range(3):
        expected.set_epoch(epoch)
        orders += [[row["label"][0] for row in map(rows.__getitem__, batch)] for batch in expected]
    assert seen == orders
    assert pickle.loads(pickle.dumps(batches)).batching == "cluster"


@pytest.mark.parametrize(("batching", "workers"), [("length", 0), ("task", 1), ("cluster", 2)])
def test_killed_run_resumes_mid_epoch_to_the_same_weights(
    make_store: Callable[..., GuideStore], tiny_student: Path, tmp_path: Path, batching: str, workers: int
) -> None:
    store = make_store(TEXTS, holdout=0.2, tasks=TASKS)

    def run(out: Path, **options: Any) -> Any:
        settings = {"batch_size": 6, "epochs": 2.0, "device": "cpu", "trackers": ()}
        return train(store.path, student=tiny_student, out=out, batching=batching, **settings | options)

    undisturbed = run(tmp_path / "undisturbed", save_steps=0)
    steps_of_epoch = undisturbed.steps // 2
    saved_at = steps_of_epoch + steps_of_epoch // 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuidedTrainer, "training_step", dying_at(saved_at + 2))
        with pytest.raises(RuntimeError, match="the power went"):
            run(tmp_path / "killed", save_steps=saved_at, workers=workers)
    resumed = run(tmp_path / "killed", save_steps=saved_at, workers=workers, resume=True)
    assert resumed.loss == undisturbed.loss
    found, wanted = (load_file(report.path / "model.safetensors") for report in (resumed, undisturbed))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
