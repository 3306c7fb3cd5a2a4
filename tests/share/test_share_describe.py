"""The table of a layout: every leaf, the counts and the bytes, within the width of a terminal."""

import jax
import jax.numpy as jnp
import pytest

from jaxgen import share


def shape(*sides, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sides, dtype)


TREE = {
    "net": {
        "first": {"kernel": shape(64, 32), "bias": shape(32)},
        "last": {"kernel": shape(32, 8), "bias": shape(8)},
        "steps": shape(2, 2, dtype=jnp.int32),
    }
}


def rows(text):
    """The rows of the leaves, by name."""
    table = text.split("\n\n")[0].splitlines()
    return {line.split()[0]: line for line in table[1:]}


def test_every_leaf_has_its_row():
    layout = share.plan(TREE, 0.1)
    text = share.describe(layout)
    found = rows(text)
    assert list(found) == ["first/bias", "first/kernel", "last/bias", "last/kernel", "steps"]
    # Scales are 1/sqrt(fan-in) over 0.04; 2048 and 256 of the 2304 weights.
    assert found["first/kernel"].split() == [
        "first/kernel",
        "(64,32)",
        "3.12",
        "88.89",
        "%",
        "pool",
    ]
    assert found["last/kernel"].split() == ["last/kernel", "(32,8)", "4.42", "11.11", "%", "pool"]
    assert found["first/bias"].endswith("passes (one axis)")
    assert found["steps"].endswith("passes (dtype int32)")
    assert text.splitlines()[0].startswith("net ")


def test_the_totals_are_the_layouts():
    layout = share.plan(TREE, 0.1, seed=3)
    text = share.describe(layout)
    assert "n = 2,304 weights of 2 leaves, m = 230 slots, n/m = 10.02" in text
    assert (
        f"stable, signs, seed 3, standard deviation 0.04; fingerprint {layout.fingerprint}" in text
    )
    assert "passing through: 44 entries of 3 leaves" in text
    assert "in all: 2,348 weights in 274 numbers, 8.569 times fewer" in text


def test_bytes_count_what_has_gradients_and_moments():
    text = share.describe(share.plan(TREE, 0.1))
    before, after = (line.split() for line in text.splitlines()[-2:])
    # 2304 weights, 40 biases, and 4 integers that have neither gradient nor moments.
    assert before == ["before", "9.392", "kB", "9.376", "kB", "18.75", "kB", "37.52", "kB"]
    # 230 + 40 floats: 1096 B of weights, 1080 of gradients, 2160 of moments.
    assert after == ["after", "1.096", "kB", "1.08", "kB", "2.16", "kB", "4.336", "kB"]
    half = share.describe(share.plan(TREE, 0.1), dtype=jnp.bfloat16)
    assert half.splitlines()[-1].split()[1:3] == ["636", "B"]


def test_pools_within_pools_are_one_table():
    outer = share.plan(TREE, 0.1, select=lambda path, _: path == "net/first/kernel")
    inner = share.plan({k.path: shape(*k.shape) for k in outer.kept}, 0.5, min_size=10)
    text = share.describe(outer, inner)
    found = rows(text)
    assert found["first/kernel"].endswith("pool 1") and found["last/kernel"].endswith("pool 2")
    # 2048 + 256 weights in 205 + 128 slots.
    assert "88.89 %" in found["first/kernel"] and "11.11 %" in found["last/kernel"]
    assert f"fingerprint {outer.fingerprint}" in text and f"fingerprint {inner.fingerprint}" in text
    assert "in all: 2,348 weights in 377 numbers" in text
    other = share.plan({"w": shape(4, 4)}, 0.5)
    with pytest.raises(ValueError, match=r"other leaves.*net/first/bias"):
        share.describe(outer, other)


def test_tiles_and_chunks_and_padding_are_said():
    tiled = share.describe(share.plan({"w": shape(12, 12)}, 0.5, tile=(8, 8)))
    assert "tiles of 8 x 8" in tiled and "padded to 256" in tiled
    chunked = share.describe(share.plan({"w": shape(12, 12)}, 0.5, scheme="roast", chunk=4))
    assert "roast, chunks of 1 x 4" in chunked


def test_hundreds_of_leaves_with_long_names_fit_a_terminal():
    block = "encoder/transformer/layers_{:03d}/self_attention_with_bias/projection/{}/kernel"
    tree = {block.format(i, n): shape(16, 16) for i in range(150) for n in ("query", "key")}
    text = share.describe(share.plan(tree, 0.01))
    table = text.split("\n\n")[0].splitlines()
    assert len(table) == 301 and max(map(len, text.splitlines())) <= 100
    # Cut in the middle, names still tell leaves apart: their common folders go first.
    assert len({line.split("  ")[0] for line in table[1:]}) == 300


def test_a_tree_of_one_leaf_and_random_keys():
    assert rows(share.describe(share.plan(shape(8, 8), 0.5)))
    tree = {"w": shape(8, 8), "key": jax.eval_shape(lambda: jax.random.key(0))}
    assert "passes (dtype key<fry>)" in share.describe(share.plan(tree, 0.5))
