"""Hashes against big integers, in numpy, in jitted JAX and inside a Pallas kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jaxgen.share import hashing

P = 2**31 - 1
EDGES = [0, 1, 2, 0x7FFF, 0x8000, 0xFFFF, 0x10000, P - 1, P, P + 1, 2**32 - 2, 2**32 - 1]
KEYS = [(1, 0), (P - 1, P - 1), (0x10000, 1), (0x7FFF0000, 0x7FFFFFFE), (123456789, 987654321)]


@pytest.fixture(scope="module")
def x():
    draw = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint64)
    return np.concatenate([np.array(EDGES, np.uint64), draw]).astype(np.uint32)


def fmix_by_hand(v, seed):
    v ^= seed
    v = (v ^ (v >> 16)) * 0x85EBCA6B % 2**32
    v = (v ^ (v >> 13)) * 0xC2B2AE35 % 2**32
    return v ^ (v >> 16)


CASES = {
    "mersenne31": (
        lambda x, k: hashing.mersenne31(x, *k),
        lambda v, k: (k[0] * v + k[1]) % P,
        KEYS,
    ),
    "quadratic31": (
        lambda x, k: hashing.quadratic31(x, *k),
        lambda v, k: (k[0] * v + k[1] * v * v + k[2]) % P,
        [(0, 1, 0), (P - 1, P - 1, P - 1), (17, 123456789, 5)],
    ),
    "fmix32": (lambda x, k: hashing.fmix32(x, k), fmix_by_hand, [0, 1, 2**32 - 1, 77]),
    "sign": (
        lambda x, k: hashing.sign(x, k),
        lambda v, k: 1 - 2 * (fmix_by_hand(v, k) & 1),
        [0, 99],
    ),
}


def in_kernel(function, x):
    """``function`` of the words inside a Pallas kernel, eight rows of 128 at a time."""
    padded = np.zeros((-len(x) % 1024 + len(x)) // 128 * 128, np.uint32)
    padded[: len(x)] = x
    blocks = padded.reshape(-1, 128)
    shape = jax.eval_shape(function, jnp.zeros(blocks.shape, jnp.uint32))

    def body(x_ref, out_ref):
        out_ref[...] = function(x_ref[...])

    spec = pl.BlockSpec((8, 128), lambda i: (i, 0))
    call = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(shape.shape, shape.dtype),
        grid=(blocks.shape[0] // 8,),
        in_specs=[spec],
        out_specs=spec,
        interpret=True,
    )
    return np.asarray(call(blocks)).ravel()[: len(x)]


@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_big_integers_everywhere(name, x):
    function, by_hand, keys = CASES[name]
    for k in keys:
        expected = np.array([by_hand(int(v), k) for v in x])
        here = function(x, k)
        assert isinstance(here, np.ndarray)
        assert here.dtype == (np.int32 if name == "sign" else np.uint32)
        np.testing.assert_array_equal(here, expected)
        np.testing.assert_array_equal(jax.jit(lambda v, k=k: function(v, k))(x), expected)
    np.testing.assert_array_equal(in_kernel(lambda v: function(v, keys[-1]), x), expected)


def test_keys_may_be_traced_and_mapped(x):
    a = np.array([k[0] for k in KEYS], np.uint32)
    b = np.array([k[1] for k in KEYS], np.uint32)
    found = jax.jit(jax.vmap(lambda a, b: hashing.mersenne31(jnp.asarray(x[:64]), a, b)))(a, b)
    expected = [[(k[0] * int(v) + k[1]) % P for v in x[:64]] for k in KEYS]
    np.testing.assert_array_equal(found, expected)


def test_the_mixed_hashes_load_slots_as_a_random_function_does():
    """Consecutive indices into 512 slots: chi-square is 511 +- 32; a linear hash misses it."""
    n, m = 2**16, 512

    def chi2(hashed):
        load = np.bincount(np.asarray(hashed) % m, minlength=m)
        return float(((load - n / m) ** 2 / (n / m)).sum())

    i = np.arange(n)
    spread = np.sqrt(2 * (m - 1))
    for hashed in (hashing.fmix32(i, 5), hashing.quadratic31(i, 1234567, 987654321, 11)):
        assert abs(chi2(hashed) - (m - 1)) < 4 * spread
    assert abs(chi2(hashing.mersenne31(i, 987654321, 11)) - (m - 1)) > 4 * spread
    s = hashing.sign(i, 3)
    assert abs(s.sum()) < 4 * np.sqrt(n) and abs((s[1:] * s[:-1]).sum()) < 4 * np.sqrt(n)
    assert len(np.unique(hashing.fmix32(i, 5))) == n


def test_scalars_and_bad_input():
    assert int(hashing.mersenne31(2**32 - 1, P - 1, P - 1)) == ((P - 1) * (2**32 - 1) + P - 1) % P
    for call in (
        lambda: hashing.mersenne31(1, 0, 0),
        lambda: hashing.mersenne31(1, P, 0),
        lambda: hashing.mersenne31(1, 1, P),
        lambda: hashing.quadratic31(1, 1, 0, 0),
        lambda: hashing.fmix32(2**32),
    ):
        with pytest.raises(ValueError, match=r"expected|32 bits"):
            call()
    for bad in (np.ones(2), jnp.ones(2), np.array([-1])):
        with pytest.raises(TypeError):
            hashing.fmix32(bad)
