import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from gistfast.guides.ahead import run_ahead


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as made:
        yield made


def test_results_come_in_the_order_of_the_items(pool: ThreadPoolExecutor) -> None:
    def slow_at_first(item: int) -> int:
        time.sleep(0.02 / (item + 1))
        return item * item

    assert list(run_ahead(pool, slow_at_first, range(20), num_ahead=5)) == [item * item for item in range(20)]


def test_no_more_items_are_drawn_than_are_worked_on(pool: ThreadPoolExecutor) -> None:
    drawn = []

    def items() -> Iterator[int]:
        for item in range(100):
            drawn.append(item)
            yield item

    results = run_ahead(pool, str, items(), num_ahead=2)
    assert drawn == []
    next(results)
    assert len(drawn) == 3
    next(results)
    assert len(drawn) == 4


def test_work_goes_on_while_a_result_is_used() -> None:
    second_began = threading.Event()

    def work(item: int) -> int:
        if item == 1:
            second_began.set()
        return item

    with ThreadPoolExecutor(1) as pool:
        results = run_ahead(pool, work, range(5), num_ahead=1)
        assert next(results) == 0
        assert second_began.wait(60)


def test_error_of_the_work_is_raised_where_its_result_is_due(pool: ThreadPoolExecutor) -> None:
    results = run_ahead(pool, lambda item: 1 // (3 - item), range(10), num_ahead=4)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_error_of_the_items_is_raised(pool: ThreadPoolExecutor) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        list(run_ahead(pool, str, items(), num_ahead=2))


def test_ending_early_cancels_what_has_not_begun() -> None:
    begun: list[int] = []
    go_on = threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item:
            go_on.wait(60)
        return item

    with ThreadPoolExecutor(1) as pool:
        results = run_ahead(pool, work, range(10), num_ahead=5)
        next(results)
        results.close()  # type: ignore[attr-defined]
        go_on.set()
    assert begun in ([0], [0, 1])
