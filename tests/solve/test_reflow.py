"""Pairs of a flow against its closed-form map, on and off the disk; straightness."""

import functools
import json
import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import process, score
from jaxgen.solve.reflow import Pairs, reflow_pairs
from jaxgen.solve.straightness import straightness

MEAN, STD = np.asarray([0.5, -1.0], np.float32), 0.6


def gaussian(sde):
    return score.closed_form.gaussian(sde, jnp.asarray(MEAN), STD**2)


def joined(chunks):
    return Pairs(*map(np.concatenate, zip(*chunks, strict=True)))


def expected(sde, x0):
    """The flow's map between Gaussians: standardised, every state stays where it is."""
    alpha, sigma = float(sde.alpha(sde.t_max)), float(sde.sigma(sde.t_max))
    prior = float(sigma if sde.prior_std is None else sde.prior_std)
    low, noise = float(sde.alpha(sde.t_end)), float(sde.sigma(sde.t_end))
    z = (prior * x0 - alpha * MEAN) / math.hypot(alpha * STD, sigma)
    return low * MEAN + math.hypot(low * STD, noise) * z


@pytest.mark.parametrize("name", ["vp", "edm", "rectified"])
def test_pairs_of_a_gaussian(key, name):
    sde = getattr(process, name)()
    field = jax.jit(gaussian(sde).noise) if name == "edm" else gaussian(sde).noise
    chunks = list(reflow_pairs(key, field, (8, 2), 12, sde=sde, prediction="noise"))
    assert [c.x0.shape for c in chunks] == [(8, 2), (4, 2)]
    pairs = joined(chunks)
    # Standardised noise of example i is that of its own key, whatever the process.
    own = [jax.random.normal(jax.random.fold_in(key, i), (2,)) for i in range(12)]
    np.testing.assert_allclose(pairs.x0, own, rtol=1e-6)
    np.testing.assert_allclose(pairs.x1, expected(sde, pairs.x0), atol=3e-4)


def test_a_flow_in_its_own_time_and_a_fixed_grid(key):
    # A field that is a pytree: its arrays are arguments of what is compiled.
    flow = jax.tree_util.Partial(lambda a, x, t: 0 * x + a[None], np.float32([3, -2]))
    for options in ({"solver": "ddim", "steps": 3}, {"solver": diffrax.Dopri5(), "rtol": 1e-4}):
        (pairs,) = reflow_pairs(key, flow, (4, 2), 4, **options)
        np.testing.assert_allclose(pairs.x1 - pairs.x0, np.tile([3, -2], (4, 1)), atol=1e-4)


def test_the_map_of_the_ring(key):
    angles = np.arange(8) * np.pi / 4
    means = 3 * np.stack([np.cos(angles), np.sin(angles)], -1)
    sde = process.rectified()
    mixture = score.closed_form.mixture(sde, jnp.ones(8), jnp.asarray(means), jnp.full(8, 0.09))
    data = np.asarray([[2.548901, -0.555461], [2.479251, 2.149365]], np.float32)
    (pairs,) = reflow_pairs(
        key, score.from_flow(mixture.velocity), (2, 2), 2, direction="to_noise", data=data
    )
    np.testing.assert_array_equal(pairs.x1, data)
    # Published maps are good to 1e-4; on the way to the noise they grow by the mode's 1/0.3.
    np.testing.assert_allclose(pairs.x0, [[0.5, -0.2], [1.5, 1.0]], atol=2e-3)


def test_annealed_flows_share_their_end(key):
    # Known: x1 = m + s x0 in one dimension, pairing kept by c; the ODE ends there whatever c.
    m, s = 0.7, 0.5

    def flow(c, x, t):
        var = (1 - t) ** 2 + t**2 * s**2 + 2 * t * (1 - t) * c * s
        k = ((1 - t) * (c * s - 1) + t * (s**2 - c * s)) / var
        return m + k[:, None] * (x - t[:, None] * m)

    make = functools.partial(jax.tree_util.Partial, flow)
    for beta in (0.0, 0.7, 1.0):
        field = make(jnp.float32(math.sqrt(1 - beta**2)))
        (pairs,) = reflow_pairs(key, field, (16, 1), 16)
        np.testing.assert_allclose(pairs.x1, m + s * pairs.x0, atol=2e-4)


# --- on the disk -------------------------------------------------------------------------------


class Counted:
    """A flow that counts its traces, and stops at one of them if asked to."""

    def __init__(self):
        self.traces = 0

    def __call__(self, x, t):
        self.traces += 1
        return jnp.ones_like(x)


def test_a_run_goes_on_where_it_was_killed(key, tmp_path):
    folder, flow = tmp_path / "deep" / "pairs", Counted()
    options = {"solver": "ddim", "steps": 2, "folder": folder, "made_for": "ones"}
    chunks = reflow_pairs(key, flow, (3, 2), 8, **options)
    first = next(chunks)
    chunks.close()
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["chunk_00000000.npz", "manifest.json"]
    # What a kill leaves of a chunk is not taken for one.
    (folder / "chunk_00000003.npz.tmp").write_bytes(b"half")
    before = (folder / names[0]).stat().st_mtime_ns
    whole = joined(reflow_pairs(key, flow, (3, 2), 8, **options))
    assert (folder / names[0]).stat().st_mtime_ns == before
    np.testing.assert_array_equal(whole.x0[:3], first.x0)
    # All there: nothing is traced, and more pairs are these and others.
    traces = flow.traces
    again = joined(reflow_pairs(key, flow, (3, 2), 8, **options))
    assert flow.traces == traces
    for a, b in zip(again, whole, strict=True):
        np.testing.assert_array_equal(a, b)
    more = joined(reflow_pairs(key, flow, (3, 2), 11, **options))
    np.testing.assert_array_equal(more.x1[:8], whole.x1)
    loose = joined(reflow_pairs(key, flow, (11, 2), 11, solver="ddim", steps=2))
    np.testing.assert_allclose(loose.x1, more.x1, rtol=1e-6)
    assert len(list(folder.glob("*.npz"))) == 4


def test_progress_counts_what_is_there(key, tmp_path, capsys):
    options = {"solver": "ddim", "steps": 2, "folder": tmp_path / "p"}
    list(reflow_pairs(key, Counted(), (2, 1), 2, **options))
    list(reflow_pairs(key, Counted(), (2, 1), 4, **options, progress=True))
    assert "pairs: 4/4 pairs" in capsys.readouterr().err


def test_folders_that_hold_something_else(key, tmp_path):
    folder, flow = tmp_path / "pairs", Counted()
    options = {"solver": "ddim", "steps": 2}

    def pairs(key=key, n=4, folder=folder, **more):
        return list(reflow_pairs(key, flow, (4, 2), n, folder=folder, **{**options, **more}))

    pairs(made_for="a")
    for change, match in (
        ({"made_for": "b"}, "made_for differ"),
        ({"made_for": "a", "key": jax.random.key(1)}, "key differ"),
        ({"made_for": "a", "steps": 3}, "steps differ"),
    ):
        with pytest.raises(ValueError, match=match):
            pairs(**change)
    chunk = folder / "chunk_00000000.npz"
    chunk.write_bytes(chunk.read_bytes()[:40])
    with pytest.raises(ValueError, match="delete it to make it again"):
        pairs(made_for="a")
    chunk.unlink()
    pairs(made_for="a")
    (folder / "manifest.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="no manifest of pairs"):
        pairs(made_for="a")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "manifest.json.tmp").write_text("{")
    pairs(folder=tmp_path / "killed")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds no pairs"):
        pairs(folder=tmp_path / "mine")


def test_a_field_of_nan_spreads(key):
    nan = lambda x, t: jnp.full_like(x, jnp.nan)  # noqa: E731
    (pairs,) = reflow_pairs(key, nan, (2, 1), 2)
    assert np.isnan(pairs.x1).all() and np.isfinite(pairs.x0).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"direction": "both"}, "from_noise, to_noise"),
        ({"n": 0}, "is 0"),
        ({"shape": (4,)}, r"shape is \(4,\)"),
        ({"solver": "best"}, "solver is 'best'"),
        ({"solver": "ddim", "steps": 0}, "steps is 0"),
        ({"rtol": -1.0}, "rtol is -1.0"),
        ({"prediction": "noise"}, "without sde"),
        ({"sde": process.vp(), "prediction": "flow"}, "prediction is 'flow'"),
        ({"direction": "to_noise"}, "data has shape None"),
        ({"direction": "to_noise", "data": np.zeros((3, 2))}, r"data has shape \(3, 2\)"),
        ({"direction": "to_noise", "data": np.zeros((4, 2)), "solver": "ddim"}, "adaptive"),
        ({"data": np.zeros((4, 2))}, "draws its own noise"),
    ],
)
def test_what_is_refused_at_once(key, options, match):
    given = {"shape": (4, 2), "n": 4, **options}
    with pytest.raises(ValueError, match=match):
        reflow_pairs(key, lambda x, t: x, **given)


# --- straightness ------------------------------------------------------------------------------


def test_straightness_in_closed_form():
    direction = np.asarray([3.0, 4.0], np.float32)
    straight = jax.jit(lambda x: straightness(lambda x, t: 0 * x + direction[None], x))
    assert float(straight(jnp.zeros((5, 2)))) < 1e-5
    # v = t d: the mean over 100 steps of |i/100 - 99/200| is 1/4, times |d| = 5.
    bent = jax.jit(lambda x: straightness(lambda x, t: t[:, None] * direction[None], x))
    np.testing.assert_allclose(bent(jnp.zeros((5, 2))), 1.25, rtol=1e-5)
    single = jax.vmap(lambda x: straightness(lambda x, t: t * direction, x, 10, event_ndim=1))
    # Ten steps: the mean of |i - 4.5|/10 is 1/4 too.
    np.testing.assert_allclose(single(jnp.zeros((3, 2))), [1.25] * 3, rtol=1e-5)


def test_straightness_of_a_flow_that_turns():
    # Half a turn about the origin ends on the other side: |v - (x_N - x_0)|, by hand.
    n, x0 = 50, np.asarray([[1.0, 0.0], [0.0, 2.0]])
    x, velocities = x0.copy(), []
    for _ in range(n):
        v = np.pi * np.stack([-x[:, 1], x[:, 0]], -1)
        velocities.append(v)
        x = x + v / n
    known = np.mean([np.linalg.norm(v - (x - x0), axis=-1) for v in velocities])
    turn = lambda x, t: jnp.pi * jnp.stack([-x[:, 1], x[:, 0]], -1)  # noqa: E731
    found = jax.jit(lambda x: straightness(turn, x, n))(jnp.asarray(x0, jnp.float32))
    np.testing.assert_allclose(found, known, rtol=1e-5)


def test_straightness_refuses(key):
    with pytest.raises(ValueError, match="steps is 0"):
        straightness(lambda x, t: x, jnp.zeros((2, 2)), 0)
    with pytest.raises(ValueError, match="returned shape"):
        straightness(lambda x, t: x[:1], jnp.zeros((2, 2)))
    with pytest.raises(TypeError, match="int32"):
        straightness(lambda x, t: x, jnp.zeros((2, 2), int))
