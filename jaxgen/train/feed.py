"""Batches on the device before the step asks for them, and how long the loop waited for input.

``jax.device_put`` returns at once and copies behind the loop's back, and grain reads in a thread of
its own; so it is enough to ask for the next batch while a step runs. A thread here won nothing,
with a source that takes half as long as a step either: a batch of the default run costs the loop a
quarter of a millisecond, beside a step of tens.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import jax

from jaxgen.core.checks import positive_int

__all__ = ["Feed"]


class Feed(Iterator[Any]):
    """An iterator of placed batches that is filled while the device works.

    An exception of the source, or its end, comes at the step that the missing batch was for, after
    those that were read before it. Use it as a context manager, or ``close`` it.

    Args:
      source: batches on the host, pytrees of arrays.
      put: places one batch on the device or the mesh; default ``jax.device_put``.
      ahead: batches that ``fill`` keeps placed, at least 1.
      limit: most batches that are ever read, so that a reader that others go on with is left where
        they expect it; ``None`` for no limit.
      owns_source: also close the source, where it can be closed.

    Attributes:
      taken: batches handed out.

    Example:
      >>> import numpy as np
      >>> with Feed([np.zeros((2, 3)), np.ones((2, 3))]) as feed:
      ...     print([float(batch.sum()) for batch in feed])
      [0.0, 6.0]
    """

    def __init__(
        self,
        source: Iterable[Any],
        put: Callable[[Any], Any] = jax.device_put,
        *,
        ahead: int = 2,
        limit: int | None = None,
        owns_source: bool = False,
    ):
        self._ahead = positive_int("ahead", ahead)
        self._left = None if limit is None else positive_int("limit", limit, least=0)
        self._source, self._put, self._owns_source = iter(source), put, owns_source
        self._ready: deque[Any] = deque()
        self._end: BaseException | None = None
        self._waited = 0.0
        self.taken = 0

    def __next__(self) -> Any:
        if not self._ready:
            start = time.perf_counter()
            self._read()
            self._waited += time.perf_counter() - start
        if not self._ready:
            assert self._end is not None
            raise self._end
        self.taken += 1
        return self._ready.popleft()

    def fill(self, running: Any = None) -> None:
        """Read until ``ahead`` batches are placed; call it when a step has just been started.

        Args:
          running: an array that the step returned. If it is still being computed when the batches
            are there, the device has not waited, and the time does not count.
        """
        start = time.perf_counter()
        while len(self._ready) < self._ahead and self._end is None:
            self._read()
        if running is None or running.is_ready():
            self._waited += time.perf_counter() - start

    def take_waited(self) -> float:
        """Seconds that the loop waited for input since the last call.

        An upper bound of what the device waited: it may have worked for a part of them.
        """
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Let go of the placed batches, and close the source if it is owned."""
        self._ready.clear()
        self._end = StopIteration()
        close = getattr(self._source, "close", None)
        if self._owns_source and close is not None:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read(self) -> None:
        """Place one more batch, or keep why there is none."""
        if self._end is not None:
            return
        try:
            if self._left == 0:
                raise StopIteration
            self._ready.append(self._put(next(self._source)))
        except Exception as error:
            self._end = error
            return
        if self._left is not None:
            self._left -= 1
