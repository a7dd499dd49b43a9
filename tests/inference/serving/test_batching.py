"""Dynamic batching."""

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from project.inference.serving.batching import Batcher


class Doubler:
    """Doubles numbers, as soon as its gate is open; records the batches.

    Attributes:
        batches: Batches in the order of their computation.
        entered: Released once per batch that has begun.
        gate: Holds back all batches until it is set.
    """

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append([*items])
        self.entered.release()
        assert self.gate.wait(20)
        return [2 * item for item in items]


@pytest.fixture
def doubler() -> Doubler:
    return Doubler()


@pytest.fixture
def batcher(doubler: Doubler) -> Iterator[Callable[..., Batcher[int, int]]]:
    """Makes batchers, which are closed at the end."""
    made: list[Batcher[int, int]] = []

    def make(size: int, wait: float = 0.0, workers: int = 1) -> Batcher[int, int]:
        made.append(Batcher(doubler, size, wait, workers))
        return made[-1]

    yield make
    doubler.gate.set()
    for item in made:
        item.close()


def test_items_accumulate_while_a_batch_is_computed(
    batcher: Callable[..., Batcher[int, int]], doubler: Doubler
) -> None:
    batches = batcher(size=3)
    first = batches.submit(1)
    assert doubler.entered.acquire(timeout=20)
    further = [batches.submit(item) for item in (2, 3, 4, 5)]
    doubler.gate.set()
    assert [future.result(20) for future in (first, *further)] == [2, 4, 6, 8, 10]
    assert doubler.batches == [[1], [2, 3, 4], [5]]


def test_an_item_waits_for_others(batcher: Callable[..., Batcher[int, int]], doubler: Doubler) -> None:
    doubler.gate.set()
    batches = batcher(size=3, wait=20)
    futures = [batches.submit(item) for item in (1, 2, 3)]
    assert [future.result(10) for future in futures] == [2, 4, 6], "a full batch does not wait"
    assert doubler.batches == [[1, 2, 3]]


def test_an_item_does_not_wait_longer_than_stated(batcher: Callable[..., Batcher[int, int]], doubler: Doubler) -> None:
    doubler.gate.set()
    assert batcher(size=3, wait=0.01).submit(1).result(20) == 2


def test_cancelled_items_are_not_computed(batcher: Callable[..., Batcher[int, int]], doubler: Doubler) -> None:
    batches = batcher(size=8)
    batches.submit(1)
    assert doubler.entered.acquire(timeout=20)
    cancelled, kept = batches.submit(2), batches.submit(3)
    assert cancelled.cancel()
    doubler.gate.set()
    assert kept.result(20) == 6
    assert doubler.batches == [[1], [3]]


def test_workers_compute_batches_at_the_same_time(batcher: Callable[..., Batcher[int, int]], doubler: Doubler) -> None:
    batches = batcher(size=1, workers=2)
    futures = [batches.submit(item) for item in (1, 2)]
    assert doubler.entered.acquire(timeout=20) and doubler.entered.acquire(timeout=20), "before the gate opens"
    doubler.gate.set()
    assert [future.result(20) for future in futures] == [2, 4]


def test_an_error_reaches_the_items_of_its_batch_only() -> None:
    batches = Batcher(lambda items: [1 // item for item in items], 1, 0.0)
    wrong, right = batches.submit(0), batches.submit(1)
    with pytest.raises(ZeroDivisionError):
        wrong.result(20)
    assert right.result(20) == 1
    batches.close()


def test_closing_computes_what_is_waiting(batcher: Callable[..., Batcher[int, int]], doubler: Doubler) -> None:
    batches = batcher(size=1, wait=20)
    futures = [batches.submit(item) for item in (1, 2, 3)]
    doubler.gate.set()
    batches.close()
    assert [future.result(0) for future in futures] == [2, 4, 6]
    with pytest.raises(RuntimeError, match="closed"):
        batches.submit(4)
