from itertools import chain

import pytest

from gistfast.batches import EvenBatchSampler, num_batches


def sampler(num_rows: int, batch_size: int, *, drop_last: bool = False, seed: int = 0) -> EvenBatchSampler:
    return EvenBatchSampler(range(num_rows), batch_size=batch_size, drop_last=drop_last, seed=seed)


# 1 row; a prime; one less and one more than a multiple; one batch; batches of one row.
@pytest.mark.parametrize(("num_rows", "batch_size"), [(1, 4), (101, 7), (127, 64), (129, 64), (3, 8), (5, 1)])
def test_every_row_comes_once_in_batches_of_nearly_one_size(num_rows: int, batch_size: int) -> None:
    batches = list(sampler(num_rows, batch_size))
    sizes = [len(batch) for batch in batches]
    assert sorted(chain(*batches)) == list(range(num_rows))
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert len(batches) == len(sampler(num_rows, batch_size)) == num_batches(num_rows, batch_size)


def test_full_batches_where_several_processes_need_them() -> None:
    batches = list(sampler(100, 64, drop_last=True))
    assert [len(batch) for batch in batches] == [64]


def test_order_follows_from_seed_and_epoch_alone() -> None:
    first, second = sampler(50, 8), sampler(50, 8)
    for epoch in (0, 1):
        first.set_epoch(epoch)
        undisturbed = list(first)
    # Straight to the second epoch, as a resumed run goes.
    second.set_epoch(1)
    assert list(second) == undisturbed
    second.set_epoch(0)
    assert list(second) != undisturbed
    assert list(sampler(50, 8, seed=1)) != list(sampler(50, 8, seed=0))
