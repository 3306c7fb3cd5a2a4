"""Each resampling scheme against blackjax and cuthbertlib: time and wrong ancestors.

Float32 weights of two kinds: skewed with dead particles everywhere and at both ends, and very
skewed with a dead tenth at the end. A run is wrong when it returns a particle of weight zero, or
one more than eight standard deviations too often. Peers run as they come: cuthbertlib shuffles the
slots of its multinomial. No peer has SSP; it is set beside their systematic, of like variance.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Missing, Result, compare
from jaxgen import smc

GOAL = 1.0


def _log_weights(n: int) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    scattered = 1.5 * rng.standard_normal(n)
    scattered[rng.random(n) < 0.4] = -np.inf
    scattered[: n // 20] = scattered[-n // 20 :] = -np.inf
    skewed = 3 * rng.standard_normal(n)
    skewed[-n // 10 :] = -np.inf
    return [jnp.asarray(v, jnp.float32) for v in (scattered, skewed)]


def _blackjax(method: str) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    from blackjax.smc import resampling

    function = getattr(resampling, method, None)
    if function is None:
        return None
    return lambda key, lw: function(key, jnp.exp(smc.normalise(lw)), lw.shape[0])


def _cuthbertlib(method: str) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    try:
        module = importlib.import_module(f"cuthbertlib.resampling.{method}")
    except ModuleNotFoundError as error:
        if error.name == "cuthbertlib":
            raise
        return None
    return lambda key, lw: module.resampling(key, lw, jnp.zeros((lw.shape[0], 0)), lw.shape[0])[0]


PEERS = {"blackjax": _blackjax, "cuthbertlib": _cuthbertlib}
STANDS_FOR = {"ssp": "systematic"}


def _wrong(function: Callable[..., jax.Array], kinds: list[jax.Array], keys: int) -> int:
    """How many runs, ``keys`` for each kind of weights, return a particle they should not."""

    @jax.jit
    def run(key: jax.Array, log_weights: jax.Array) -> jax.Array:
        n = log_weights.shape[0]
        share = n * jnp.exp(smc.normalise(log_weights))
        ancestors = function(key, log_weights)
        counts = jnp.zeros(n, jnp.int32).at[ancestors].add(1, mode="drop")
        dead = jnp.any((counts > 0) & (log_weights == -jnp.inf))
        crowded = jnp.any(counts > share + 8 * jnp.sqrt(share) + 20)
        return dead | crowded | (jnp.sum(counts) != n)

    split = jax.random.split(jax.random.key(7), keys)
    return sum(int(run(key, log_weights)) for log_weights in kinds for key in split)


def run(*, quick: bool) -> Iterator[Result | Missing]:
    sizes = (10**5,) if quick else (10**4, 10**5, 10**6)
    methods = ("systematic", "multinomial") if quick else smc.METHODS
    for n in sizes:
        kinds = _log_weights(n)
        keys = 10 if quick or n > 10**5 else 100
        for method in methods:
            ours = functools.partial(smc.resample, method=method)
            wrong = _wrong(ours, kinds, keys)
            for peer_name, find in PEERS.items():
                case = f"{method}_{n:.0e}".replace("e+0", "e")
                named = STANDS_FOR.get(method, method)
                try:
                    peer = find(named)
                except ModuleNotFoundError:
                    yield Missing("resampling", case, peer_name)
                    continue
                if peer is None:
                    continue
                yield _against(case, ours, peer, wrong, keys, kinds, peer_name, named)


def _against(
    case: str,
    ours: Callable[..., Any],
    peer: Callable[..., Any],
    wrong: int,
    keys: int,
    kinds: list[jax.Array],
    peer_name: str,
    named: str,
) -> Result:
    arguments = jax.random.key(1), kinds[0]
    n = kinds[0].shape[0]
    return compare(
        "resampling",
        f"{case}/{peer_name}",
        functools.partial(jax.jit(ours), *arguments),
        functools.partial(jax.jit(peer), *arguments),
        peer_name=f"{peer_name} {named}",
        goal=GOAL if n >= 10**5 and not case.startswith("ssp") else None,
        note=f"wrong runs of {2 * keys}: {wrong} against {_wrong(peer, kinds, keys)}",
    )
