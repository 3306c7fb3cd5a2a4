"""A progress meter that a compiled loop can move."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.core import progress

__all__ = ["Ticker"]

# Reports of one loop.
_REPORTS = 20


class Ticker:
    """Shows a loop of ``total`` steps: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, total: int, description: str):
        self._total, self._description = total, description
        self._every = max(1, total // _REPORTS)
        self._meter: Any = None
        self._done = 0

    def _show(self, done: Any) -> None:
        done = int(np.max(done))
        if self._meter is None or done < self._done:
            self._done = 0
            self._meter = progress.meter(self._total, description=self._description, every=1.0)
            self._meter.__enter__()
        self._meter.update(done - self._done)
        self._done = done
        if done >= self._total:
            self._meter.__exit__(None, None, None)
            self._meter = None

    def __call__(self, n: jax.Array) -> None:
        """Called in the loop after step ``n``, counted from 0."""
        done = n + 1
        due = (done % self._every == 0) | (done == self._total)

        def show(done: jax.Array) -> None:
            jax.debug.callback(self._show, done, ordered=False)

        jax.lax.cond(due, show, lambda done: None, jnp.asarray(done))
