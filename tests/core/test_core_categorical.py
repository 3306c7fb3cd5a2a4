"""Filters of logits: what stays is what the definition says, ties and ends included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.core.categorical import filter_logits


def kept(logits, top_p=None, top_k=None):
    """By the definition, one row at a time."""
    order = sorted(range(len(logits)), key=lambda v: (-logits[v], v))
    order = order[: len(order) if top_k is None else top_k]
    if top_p is not None:
        p = np.exp(np.array([logits[v] for v in order], np.float64))
        p /= p.sum()
        order = order[: int(np.searchsorted(np.cumsum(p), top_p - 1e-9)) + 1]
    return set(order)


@pytest.mark.parametrize(("top_p", "top_k"), [(0.6, None), (None, 3), (0.8, 4), (1e-6, None)])
def test_filters_keep_what_their_definition_says(key, top_p, top_k):
    logits = 2 * jax.random.normal(key, (5, 7, 11))
    out = jax.jit(lambda x: filter_logits(x, top_p=top_p, top_k=top_k))(logits)
    for row, filtered in zip(logits.reshape(-1, 11), out.reshape(-1, 11), strict=True):
        stays = np.isfinite(filtered)
        assert set(np.flatnonzero(stays)) == kept(row.tolist(), top_p, top_k)
        assert (filtered[stays] == row[stays]).all()


def test_ties_let_no_more_through():
    assert np.isfinite(filter_logits(jnp.zeros(6), top_k=2)).tolist() == [1, 1, 0, 0, 0, 0]
    assert np.isfinite(filter_logits(jnp.zeros(6), top_p=0.5)).tolist() == [1, 1, 1, 0, 0, 0]


def test_nothing_to_do_is_nothing_done():
    logits = jnp.array([1.0, -jnp.inf, 0.5])
    for options in ({}, {"top_k": 3}, {"top_k": 9}, {"top_p": 1.0}):
        assert (filter_logits(logits, **options) == logits).all()


def test_what_is_no_number_spreads():
    logits = jnp.array([[0.0, jnp.nan, 1.0], [0.0, 0.5, 1.0]])
    for options in ({"top_k": 2}, {"top_p": 0.5}):
        out = filter_logits(logits, **options)
        assert np.isnan(out[0]).all() and not np.isnan(out[1]).any()
    many = -jnp.arange(3000.0) / 100
    out = jax.vmap(lambda p: filter_logits(many, top_p=p))(jnp.array([0.0, jnp.nan, 2.0, 1.0]))
    assert np.isnan(out[:3]).all() and (out[3] == many).all()


def test_a_traced_share_compiles_once_and_bad_filters_are_named():
    sweep = jax.vmap(lambda p: filter_logits(jnp.zeros(10), top_p=p))(jnp.array([0.05, 0.95]))
    assert np.isfinite(sweep).sum(1).tolist() == [1, 10]
    for options, match in (({"top_p": 0.0}, "top_p is 0"), ({"top_p": 1.1}, "top_p is 1.1")):
        with pytest.raises(ValueError, match=match):
            filter_logits(jnp.zeros(3), **options)
    with pytest.raises(ValueError, match="top_k is 0"):
        filter_logits(jnp.zeros(3), top_k=0)
