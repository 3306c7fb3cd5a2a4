"""Batches arrive in order and ahead of need, errors come at their step, and waiting is counted."""

import threading
import time

import jax
import numpy as np
import pytest

from jaxgen import train
from jaxgen.train import data as datasets
from jaxgen.train.feed import Feed


def numbered(n, log=None, *, fail_at=None):
    for i in range(n):
        if i == fail_at:
            raise OSError(f"batch {i} cannot be read")
        if log is not None:
            log.append(i)
        yield {"x": np.full((8, 2), i, np.float32)}


def first(batch):
    return int(batch["x"][0, 0])


class Computing:
    """Stands for a result of a step that runs, or has run."""

    def __init__(self, done):
        self.done = done

    def is_ready(self):
        return self.done


def test_batches_come_in_order_as_device_arrays_and_end():
    with Feed(numbered(5)) as feed:
        seen = []
        for batch in feed:
            assert isinstance(batch["x"], jax.Array)
            seen.append(first(batch))
            feed.fill()
    assert seen == [0, 1, 2, 3, 4] and feed.taken == 5
    with pytest.raises(StopIteration):
        next(feed)


@pytest.mark.parametrize("ahead", [1, 3])
def test_fill_reads_so_many_ahead_and_no_more(ahead):
    log = []
    feed = Feed(numbered(20, log), ahead=ahead)
    next(feed)
    assert log == [0]
    feed.fill()
    feed.fill()
    assert len(log) == 1 + ahead
    next(feed)
    assert len(log) == 1 + ahead, "a placed batch was there, so none is read"


def test_what_lies_beyond_the_limit_stays_in_the_source():
    source = numbered(10)
    with Feed(source, ahead=4, limit=3) as feed:
        feed.fill()
        assert [first(b) for b in feed] == [0, 1, 2]
    assert first(next(source)) == 3


def test_an_error_comes_at_the_step_that_it_belongs_to():
    feed = Feed(numbered(10, fail_at=3), ahead=4)
    feed.fill()
    assert [first(next(feed)) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(OSError, match="batch 3 cannot be read"):
            next(feed)
    feed.fill()


def test_an_error_of_placing_comes_at_its_step_too():
    mesh = train.data_mesh()
    odd = [{"x": np.zeros((8, 1))}, {"x": np.zeros((9, 1))}]
    feed = Feed(odd, lambda batch: train.shard_batch(batch, mesh))
    feed.fill()
    assert next(feed)["x"].sharding.num_devices == 8
    with pytest.raises(ValueError, match="does not divide"):
        next(feed)


def test_an_owned_source_is_closed_and_another_is_left():
    for owns in (True, False):
        source = numbered(9)
        feed = Feed(source, owns_source=owns)
        next(feed)
        feed.fill()
        feed.close()
        feed.close()
        if owns:
            assert next(source, None) is None
        else:
            assert first(next(source)) == 3
        with pytest.raises(StopIteration):
            next(feed)


def test_no_thread_is_left_behind():
    before = set(threading.enumerate())
    data = datasets.Dataset("ten", np.arange(10, dtype=np.float32)[:, None])
    with Feed(datasets.batches(data, 4, seed=0)(0), owns_source=True) as feed:
        for _ in range(3):
            next(feed)
            feed.fill()
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_only_waiting_that_the_device_may_have_felt_is_counted():
    def slow():
        for batch in numbered(10):
            time.sleep(0.02)
            yield batch

    feed = Feed(slow(), ahead=1)
    next(feed)
    assert feed.take_waited() >= 0.02, "nothing was placed: the loop waited"
    assert feed.take_waited() == 0
    feed.fill(Computing(done=False))
    next(feed)
    assert feed.take_waited() < 0.02, "a step was running all the while"
    feed.fill(Computing(done=True))
    assert feed.take_waited() >= 0.02, "the step was over before the batch came"


def test_with_a_feed_a_step_needs_no_implicit_transfer():
    @jax.jit
    def step(total, batch):
        return total + batch["x"].sum()

    total = jax.device_put(np.float32(0))
    with Feed(numbered(4)) as feed, jax.transfer_guard("disallow"):
        for batch in feed:
            total = step(total, batch)
            feed.fill(total)
    assert float(total) == 16 * (0 + 1 + 2 + 3)


@pytest.mark.parametrize("bad", [{"ahead": 0}, {"limit": -1}])
def test_counts_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Feed([], **bad)
