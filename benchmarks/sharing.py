"""``expand`` and its gradient against ``pool[index]`` with a stored index, for each scheme.

2^24 weights in two leaves. The peer keeps an int32 slot and an int8 sign for each weight, the least
that a table can do; its gradient is XLA's scatter-add. Both sides make the same weights.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Result, compare
from jaxgen import share

MIB = 2**20


def _table(layout):
    """Slot and sign of every weight, and the scale of each leaf."""
    parts = [share.slots(spec, jnp.arange(spec.size, dtype=jnp.uint32)) for spec in layout.leaves]
    return [(at, signs.astype(jnp.int8)) for at, signs in parts]


def run(*, quick: bool) -> Iterator[Result]:
    side = 512 if quick else 4096
    shapes = {
        name: jax.ShapeDtypeStruct((side, side // 2), jnp.float32) for name in ("first", "second")
    }
    scales = {"first": 0.02, "second": 0.01}
    keys = jax.random.split(jax.random.key(0), 2)
    cotangents = {
        name: jax.random.normal(key, shapes[name].shape)
        for name, key in zip(shapes, keys, strict=True)
    }
    for scheme in ("stable", "roast", "hashednet"):
        for compression in (16,) if quick else (4, 10, 64, 1024):
            layout = share.plan(shapes, 1 / compression, scheme=scheme, scale=scales)
            pool = share.init(jax.random.key(1), layout).pool
            table = _table(layout)

            def ours(pool, layout=layout):
                return share.expand(share.Shared(pool, {}), layout)

            def peer(pool, table, layout=layout):
                return {
                    spec.path: (
                        pool.at[at].get(mode="promise_in_bounds")
                        * signs.astype(pool.dtype)
                        * spec.scale
                    ).reshape(spec.shape)
                    for spec, (at, signs) in zip(layout.leaves, table, strict=True)
                }

            for kind in ("forward", "gradient"):
                if kind == "gradient":
                    ours_f = jax.jit(lambda p, g, f=ours: jax.vjp(f, p)[1](g)[0])
                    peer_f = jax.jit(lambda p, t, g, f=peer: jax.vjp(lambda q: f(q, t), p)[1](g)[0])
                    ours_args, peer_args = (pool, cotangents), (pool, table, cotangents)
                else:
                    ours_f, peer_f = jax.jit(ours), jax.jit(peer)
                    ours_args, peer_args = (pool,), (pool, table)
                for a, b in zip(
                    jax.tree.leaves(ours_f(*ours_args)),
                    jax.tree.leaves(peer_f(*peer_args)),
                    strict=True,
                ):
                    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
                temps = [
                    f.lower(*args).compile().memory_analysis().temp_size_in_bytes / MIB
                    for f, args in ((ours_f, ours_args), (peer_f, peer_args))
                ]
                stored = sum(leaf.nbytes for leaf in jax.tree.leaves(table)) / MIB
                yield compare(
                    "sharing",
                    f"{scheme}_{kind}_{compression}x",
                    lambda f=ours_f, args=ours_args: f(*args),
                    lambda f=peer_f, args=peer_args: f(*args),
                    peer_name="a stored index",
                    note=(
                        f"stored 0 MiB against {stored:.0f}, temporary {temps[0]:.0f} against "
                        f"{temps[1]:.0f}, weights {layout.n * 4 / MIB:.0f}"
                    ),
                )
