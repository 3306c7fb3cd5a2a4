"""Sampling text by absorbing diffusion: calls of the network, and time, against every step's call.

A transformer without time (width 64, depth 2, random parameters: what is drawn does not matter to
the time) writes sequences of 256 tokens in 1024 steps of the log-linear schedule; ours calls it
where a token unmasks, the peer is the same sampler with a call at every step (``cache=False``),
which draws the same tokens. Two cases of each batch: time for the batch, and evaluations that a
sequence needed, whose goal is the expected count in closed form.

Two busy CPU cores, jax 0.10.2: a sequence of 256 tokens in 1024 steps took 226 evaluations (226.6
expected) and 2.2 s against 10.2 s, 4.7 times as fast [3.3, 6.2].
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Result, compare
from jaxgen.nets.radd import RADDTransformer
from jaxgen.process.absorbing import absorbing, expected_nfe
from jaxgen.solve.discrete import DiscreteSample, radd_sample

VOCABULARY = 96


def sampler(
    width: int, depth: int, batch: int, length: int, steps: int, cache: bool
) -> Callable[[jax.Array], DiscreteSample]:
    """A compiled sampler of one key."""
    process = absorbing(VOCABULARY)
    net = RADDTransformer(VOCABULARY, width, depth, heads=max(1, width // 32))
    params = net.init(jax.random.key(0), jnp.zeros((1, length), jnp.int32))

    @jax.jit
    def run(key: jax.Array) -> DiscreteSample:
        return radd_sample(
            key, lambda x: net.apply(params, x), process, (batch, length), steps, cache=cache
        )

    return run


def evaluations(case: str, ours: DiscreteSample, steps: int, length: int) -> Result:
    """Evaluations of a sequence against the steps; the goal is the expected ratio."""
    nfe = np.asarray(ours.nfe, float)
    expected = float(expected_nfe(absorbing(VOCABULARY), steps, length))
    error = nfe.std(ddof=1) / np.sqrt(len(nfe)) if len(nfe) > 1 else float("nan")
    return Result(
        bench="discrete",
        case=f"{case}_evaluations",
        ours=float(nfe.mean()),
        peer=float(steps),
        peer_name="a call at every step",
        unit="evaluations of a sequence",
        ratio=steps / float(nfe.mean()),
        note=(
            f"expected {expected:.1f}, standard error {error:.2g} over {len(nfe)} sequences; "
            f"{int(ours.calls)} calls of the network with the whole batch"
        ),
    )


def run(*, quick: bool) -> Iterator[Result]:
    width, depth, length, steps = (32, 1, 32, 128) if quick else (64, 2, 256, 1024)
    for batch in (1, 4):
        case = f"length{length}_steps{steps}_batch{batch}"
        ours, peer = (sampler(width, depth, batch, length, steps, c) for c in (True, False))
        yield compare(
            "discrete",
            case,
            lambda ours=ours: ours(jax.random.key(0)),
            lambda peer=peer: peer(jax.random.key(0)),
            peer_name="a call at every step",
            goal=1.0,
            note=f"{batch} sequences",
        )
        # Counts need more sequences than a batch has.
        many = [ours(jax.random.key(i)) for i in range(1, 2 + 16 // batch)]
        together: Any = jax.tree.map(
            lambda *x: np.concatenate([np.atleast_1d(v) for v in x]), *many
        )
        yield evaluations(case, together._replace(calls=many[0].calls), steps, length)
