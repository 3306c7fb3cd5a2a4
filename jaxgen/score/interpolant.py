r"""What a network is taught about a stochastic interpolant, and the ways between the kinds.

With x_t = I(t, x0, x1) + gamma z the fields are conditional means (Albergo, Boffi and
Vanden-Eijnden, arXiv 2303.08797, sections 2.2 and 4),

    b = E[dI/dt + gamma' z | x],  v = E[dI/dt | x],  noise = E[z | x],  score = -noise / gamma (1)
    b = v + gamma' noise = v - gamma gamma' score                                              (2)

and each is the minimum of E|f|^2/2 - E[y . f] over fields f, y being its part inside the mean in
(1). Where y = c + w z has a w that grows without bound at the ends of time (gamma' for b, -1/gamma
for the score), the average of the losses at x+ = I + gamma z and x- = I - gamma z,

    (|f+|^2 + |f-|^2)/4 - c . (f+ + f-)/2 - w z . (f+ - f-)/2                                  (3)

is bounded, since f+ - f- shrinks with gamma (antithetic form, section 6.1). For a one-sided
interpolant x0 is the noise z and alpha its level, so that I is beta x1 in (3); v is then b.

The paper's noise is E[z], so that score = -noise/gamma; its released code trains minus that.

The Schroedinger bridge (section 3.4 and 5.3 there) with diffusion epsilon is the maximum over
interpolants of the minimum over u of

    int E[|u|^2/2 - (dI/dt + (gamma' - epsilon/gamma) z) . u] dt                               (4)

whose inner minimum is u = b + epsilon score, with the value -int E|u|^2/2 dt.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import at_least_f32, batch_event, left_broadcast, sum_event
from jaxgen.process.interpolant import Interpolant
from jaxgen.score.prediction import Field

__all__ = ["FORMS", "KINDS", "convert_interpolant", "interpolant_loss", "schrodinger_objective"]

KINDS = ("b", "v", "noise", "score")

FORMS = ("energy", "regression")


def _times(t_min: Any, t_max: Any) -> tuple[Any, Any]:
    are_known = isinstance(t_min, int | float) and isinstance(t_max, int | float)
    if are_known and not 0 <= t_min < t_max <= 1:
        raise ValueError(f"t_min is {t_min} and t_max {t_max}; expected 0 <= t_min < t_max <= 1")
    return t_min, t_max


def _draw(
    key: jax.Array,
    interp: Interpolant,
    x0: ArrayLike | None,
    x1: ArrayLike,
    t_min: ArrayLike,
    t_max: ArrayLike,
    event_ndim: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Time, noise, the noise's level, and ``I`` without noise and its slope; see (3)."""
    t_min, t_max = _times(t_min, t_max)
    x1 = checks.floating("x1", x1)
    batch, event = batch_event(x1, event_ndim)
    wide = at_least_f32(x1.dtype)

    def draw(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_time, key_noise = jax.random.split(k)
        u = jax.random.uniform(key_time, (), wide)
        # Zeros where gamma is, so that a flow does not pay for noise that it has not.
        z = (
            jax.random.normal(key_noise, event, wide)
            if interp.has_noise
            else jnp.zeros(event, wide)
        )
        return u, z

    u, z = keys.map_batch(draw, key, batch)
    t = t_min + (jnp.asarray(t_max, wide) - t_min) * u
    # The noise is rounded as the state is, so that the target is the noise that the field sees.
    x0, x1 = interp.ends(x0, x1, noise=z.astype(x1.dtype))
    if interp.one_sided:
        z = x0
        inner, slope = interp.position(jnp.zeros_like(x0), x1, t, checked=False)
    else:
        inner, slope = interp.position(x0, x1, t, checked=False)
    level, _ = interp.noise_rates(t, checked=False)
    return t, z.astype(x0.dtype).astype(inner.dtype), level, inner, slope


def _regress(
    field: Field,
    t: jax.Array,
    z: jax.Array,
    level: jax.Array,
    inner: jax.Array,
    known: jax.Array,
    factor: jax.Array | None,
    dtype: jnp.dtype,
    form: str,
    antithetic: bool,
    event_ndim: int | None,
) -> jax.Array:
    """The loss with the target ``known + factor z``, by (3) if ``antithetic``."""

    def at(sign: float) -> jax.Array:
        x_t = inner + sign * left_broadcast(level, inner) * z
        return checks.cast_field_output(field(x_t.astype(dtype), t), inner)

    noise = jnp.zeros_like(z) if factor is None else left_broadcast(factor, z) * z
    plus = at(1.0)
    if not antithetic:
        if form == "regression":
            return 0.5 * sum_event((plus - known - noise) ** 2, event_ndim)
        return sum_event(0.5 * plus**2 - (known + noise) * plus, event_ndim)
    minus = at(-1.0)
    if form == "regression":
        return 0.25 * sum_event(
            (plus - known - noise) ** 2 + (minus - known + noise) ** 2, event_ndim
        )
    # The difference is formed before it meets the large factor.
    return sum_event(
        0.25 * (plus**2 + minus**2) - 0.5 * known * (plus + minus) - 0.5 * noise * (plus - minus),
        event_ndim,
    )


def interpolant_loss(
    key: jax.Array,
    field: Field,
    interp: Interpolant,
    x0: ArrayLike | None,
    x1: ArrayLike,
    *,
    target: str = "b",
    form: str = "energy",
    antithetic: bool = True,
    t_min: ArrayLike = 1e-3,
    t_max: ArrayLike = 1 - 1e-3,
    event_ndim: int | None = None,
) -> jax.Array:
    """The loss that one field of an interpolant minimises, per example (module docstring).

    Args:
      key: typed key; example ``i`` of a batch uses ``fold_in(key, i)``.
      field: maps ``(x, t)``, ``t`` of shape ``(batch,)``, to an array like ``x``.
      interp: the interpolant.
      x0: states at t = 0, ``(batch, *event)``, paired with ``x1`` as you like
        (``process.minibatch_coupling``). ``None`` draws them for a one-sided interpolant, and
        serves ``mirror``.
      x1: states at t = 1, of ``x0``'s shape.
      target: ``"b"``, the velocity of the flow; ``"v"``, that of ``I`` alone; ``"noise"``, the mean
        of ``z``; or ``"score"``. The first two and the noise have targets without blow-up but for
        gamma' in ``"b"``: learn ``"v"`` (or ``"b"``) and ``"noise"``.
      form: ``"energy"``, |f|^2/2 - y . f, which may be negative; or ``"regression"``,
        |f - y|^2/2. They differ by what no field changes.
      antithetic: for ``"b"`` and ``"score"`` of an interpolant with noise, average the losses at
        ``+z`` and ``-z``: two field calls, and a variance that stays bounded as t nears an end.
        The other targets need it not and make one call (``"v"`` of a one-sided interpolant is
        ``"b"``).
      t_min: first time drawn, uniformly up to
      t_max: the last.
      event_ndim: ``x1.ndim`` if ``x1`` is one example; the field is then called with ``t`` of
        shape ``()``.

    Returns:
      Losses ``(batch,)`` or ``()``, summed over the event, float32 or wider.

    Raises:
      ValueError: an unknown name, shapes that do not fit, times out of order or of [0, 1], or the
        target ``"noise"`` or ``"score"`` of an interpolant without noise.
      TypeError: a raw key, integer data, or a field of an integer dtype.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgen.process.interpolant import interpolant
      >>> x0, x1 = jnp.zeros((4, 3)), jnp.ones((4, 3))
      >>> loss = interpolant_loss(
      ...     jax.random.key(0), lambda x, t: jnp.ones_like(x), interpolant("linear"), x0, x1,
      ...     target="v")
      >>> loss.tolist()
      [-1.5, -1.5, -1.5, -1.5]
    """
    checks.one_of("target", target, KINDS)
    checks.one_of("form", form, FORMS)
    if target in ("noise", "score") and not interp.has_noise:
        raise ValueError(
            f"target is {target!r} for an interpolant with gamma zero, which has none; expected "
            "'b' or 'v'"
        )
    t, z, level, inner, slope = _draw(key, interp, x0, x1, t_min, t_max, event_ndim)
    dtype = jnp.promote_types(jnp.asarray(x1).dtype, jnp.asarray(x1 if x0 is None else x0).dtype)
    _, product = interp.noise_rates(t, checked=False)
    factor: jax.Array | None = None
    known = jnp.zeros_like(inner)
    if target == "noise":
        factor = jnp.ones_like(t)
    elif target == "score":
        factor = -1 / level
    else:
        known = slope
        if interp.has_noise and (target == "b" or interp.one_sided):
            factor = product / level
    doubled = antithetic and factor is not None and target != "noise"
    return _regress(field, t, z, level, inner, known, factor, dtype, form, doubled, event_ndim)


def schrodinger_objective(
    key: jax.Array,
    field: Field,
    interp: Interpolant,
    x0: ArrayLike,
    x1: ArrayLike,
    *,
    epsilon: ArrayLike,
    antithetic: bool = True,
    t_min: ArrayLike = 1e-3,
    t_max: ArrayLike = 1 - 1e-3,
    event_ndim: int | None = None,
) -> jax.Array:
    """The objective (4) of the Schroedinger bridge at random times, per example.

    Descend on the field's parameters and ascend on the interpolant's, with an optimiser for each:
    its ``params`` and ``path_params`` are leaves, and ``process.spline_interpolant`` has learnable
    ones. At the saddle the field is the drift of the bridge with diffusion ``epsilon``, and the
    mean is minus half its kinetic energy.

    Args:
      key: typed key; example ``i`` of a batch uses ``fold_in(key, i)``.
      field: the drift u, mapping ``(x, t)`` to an array like ``x``.
      interp: a two-sided interpolant with noise.
      x0: states at t = 0, ``(batch, *event)``.
      x1: states at t = 1, of ``x0``'s shape.
      epsilon: half the squared diffusion of the bridge, ``()``, at least 0.
      antithetic: average over ``+z`` and ``-z``; two field calls.
      t_min: first time drawn, uniformly up to
      t_max: the last.
      event_ndim: ``x1.ndim`` if ``x1`` is one example.

    Returns:
      Values ``(batch,)`` or ``()``, in float32 or wider.

    Raises:
      ValueError: a one-sided interpolant or one without noise, a negative ``epsilon`` (where
        known), or as ``interpolant_loss``.
      TypeError: as ``interpolant_loss``.
    """
    if interp.one_sided or not interp.has_noise:
        raise ValueError(
            f"interp is {interp.kind!r}, one-sided or with gamma zero; expected a two-sided "
            "interpolant with noise"
        )
    if jnp.shape(epsilon) != ():
        raise ValueError(f"epsilon has shape {jnp.shape(epsilon)}; expected one number, ()")
    known = checks.concrete(epsilon)
    if known is not None and not float(known) >= 0:
        raise ValueError(f"epsilon is {float(known)}; expected at least 0")
    t, z, level, inner, slope = _draw(key, interp, x0, x1, t_min, t_max, event_ndim)
    dtype = jnp.promote_types(jnp.asarray(x1).dtype, jnp.asarray(x1 if x0 is None else x0).dtype)
    factor = (interp.noise_rates(t, checked=False)[1] - epsilon) / level
    return _regress(
        field, t, z, level, inner, slope, factor, dtype, "energy", antithetic, event_ndim
    )


SOURCES = ("b", "v", "noise", "score", "x0", "x1")


_ALIASES = {"v": "b", "x0": "noise"}


def _one_sided(
    given: dict[str, jax.Array],
    x: jax.Array,
    t: jax.Array,
    interp: Interpolant,
    target: str,
    x1_mean: jax.Array | None,
) -> jax.Array:
    """Any kind from any other: with ``x = alpha x0 + beta x1`` one of them is all."""
    known = {_ALIASES.get(kind, kind): value for kind, value in given.items()}
    target = _ALIASES.get(target, target)
    if target in known:
        return known[target]
    r = interp.rates(t)
    level, product = (left_broadcast(c, x) for c in interp.noise_rates(t))
    beta, alpha_dot, beta_dot = (left_broadcast(c, x) for c in (r.beta, r.alpha_dot, r.beta_dot))
    # b = rate x + pull score, free of a division by alpha.
    rate = beta_dot / beta
    pull = level**2 * rate - product
    if "score" in known:
        score = known["score"]
    elif "noise" in known:
        score = -known["noise"] / level
    elif "x1" in known:
        score = (beta * known["x1"] - x) / level**2
    else:
        score = (known["b"] - rate * x) / pull
    if target == "score":
        return score
    if target == "noise":
        return -level * score
    if target == "x1":
        return (x + level**2 * score) / beta
    b = rate * x + pull * score
    if x1_mean is None:
        return b
    # At t = 0, where beta is zero, x says nothing of x1.
    return jnp.where(beta == 0, alpha_dot * x + beta_dot * x1_mean, b)


def _ends_from(
    known: dict[str, jax.Array],
    x: jax.Array,
    r: dict[str, jax.Array],
    noise: jax.Array,
    is_mirror: bool,
) -> dict[str, jax.Array]:
    """``x0`` and ``x1`` from the noise and one of ``x0``, ``x1`` and ``v``."""
    if {"x0", "x1"} <= known.keys():
        return {"x0": known["x0"], "x1": known["x1"]}
    rest = x - r["gamma"] * noise
    if is_mirror:
        return {"x0": rest, "x1": rest}
    if "x0" in known:
        return {"x0": known["x0"], "x1": (rest - r["alpha"] * known["x0"]) / r["beta"]}
    if "x1" in known:
        return {"x0": (rest - r["beta"] * known["x1"]) / r["alpha"], "x1": known["x1"]}
    determinant = r["alpha"] * r["beta_dot"] - r["beta"] * r["alpha_dot"]
    return {
        "x0": (r["beta_dot"] * rest - r["beta"] * known["v"]) / determinant,
        "x1": (r["alpha"] * known["v"] - r["alpha_dot"] * rest) / determinant,
    }


def convert_interpolant(
    known: Mapping[str, ArrayLike],
    x: ArrayLike,
    t: ArrayLike,
    interp: Interpolant,
    target: str,
    *,
    x1_mean: ArrayLike | None = None,
) -> jax.Array:
    """One field of an interpolant from others at the same place.

    Args:
      known: values by kind, each like ``x``: ``"b"``, ``"v"``, ``"noise"`` (the mean of ``z``),
        ``"score"``, and the means ``"x0"`` and ``"x1"`` of the ends. Noise and score say the same.
        One of any kind is enough for a one-sided interpolant; noise or score alone for ``mirror``;
        with another interpolant, b from v and noise or score, v from b and noise or score, and for
        a spatially linear one everything from two of noise (or score), ``x0`` and ``x1`` or from
        noise and ``v`` or ``b``.
      x: the state, ``(batch, *event)`` or one example.
      t: times, ``()`` or ``(batch,)``.
      interp: the interpolant.
      target: the kind that is wanted.
      x1_mean: mean of ``x1``, broadcasting against ``x``: what b of a one-sided interpolant needs
        at t = 0.

    Returns:
      The kind that is wanted, like ``x``; computed in float32 or wider. NaN or infinite where it is
      undefined: a score from noise where gamma is 0, b from noise (not from the score) there, b of
      a one-sided interpolant at t = 0 without ``x1_mean``.

    Raises:
      ValueError: an unknown kind, a value of another shape, kinds that do not suffice, or a score
        where there is no noise.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxgen.process.interpolant import interpolant
      >>> one = jnp.ones((2, 3))
      >>> known = {"v": one, "score": one}
      >>> float(convert_interpolant(known, one, 0.25, interpolant("linear"), "b")[0, 0])
      0.75
    """
    checks.one_of("target", target, SOURCES)
    for kind in known:
        checks.one_of("a kind of known", kind, SOURCES)
    x = checks.floating("x", x)
    wide = x.astype(at_least_f32(x.dtype))
    t = checks.field_time(t, x, x.ndim if jnp.ndim(t) == 0 else None)
    have = {
        kind: checks.cast_field_output(value, x, kind).astype(wide.dtype)
        for kind, value in known.items()
    }
    if target in have:
        return have[target].astype(x.dtype)
    lacking = ValueError(
        f"{target!r} does not follow from {sorted(have)} for the interpolant {interp.kind!r}; see "
        "the docstring for what does"
    )
    if not have:
        raise lacking
    if interp.one_sided:
        mean = None if x1_mean is None else jnp.asarray(x1_mean, wide.dtype)
        if mean is not None:
            mean = jnp.broadcast_to(jnp.expand_dims(mean, range(x.ndim - mean.ndim)), x.shape)
        return _one_sided(have, wide, t, interp, target, mean).astype(x.dtype)

    level, product = (left_broadcast(c, x) for c in interp.noise_rates(t))
    if not interp.has_noise:
        if target in ("noise", "score"):
            raise ValueError(f"target is {target!r}, and the interpolant has gamma zero")
        # b and v are one, and the noise counts for nothing.
        have.setdefault("noise", jnp.zeros_like(wide))
    if "score" in have:
        have.setdefault("noise", -level * have["score"])
    if interp.kind == "mirror":
        have.setdefault("v", jnp.zeros_like(wide))
    r = {}
    if interp.is_linear:
        r = {
            name: left_broadcast(c, x)
            for name, c in interp.rates(t)._asdict().items()
            if name in ("alpha", "beta", "gamma", "alpha_dot", "beta_dot")
        }
    if "noise" not in have and {"x0", "x1"} <= have.keys() and r:
        have["noise"] = (wide - r["alpha"] * have["x0"] - r["beta"] * have["x1"]) / level
    if "noise" not in have:
        raise lacking
    # From here on the noise is known.
    pull = product * have["score"] if "score" in have else None
    if pull is None:
        gamma_dot = left_broadcast(interp.gamma_dot(t), x)
        pull = -gamma_dot * have["noise"] if interp.has_noise else jnp.zeros_like(wide)
    if "b" in have:
        have.setdefault("v", have["b"] + pull)
    if r and target not in ("noise", "score") and have.keys() & {"x0", "x1", "v"}:
        ends = _ends_from(have, wide, r, have["noise"], interp.kind == "mirror")
        have.setdefault("v", r["alpha_dot"] * ends["x0"] + r["beta_dot"] * ends["x1"])
        have = ends | have
    if "v" in have:
        have.setdefault("b", have["v"] - pull)
    if target == "score":
        return (-have["noise"] / level).astype(x.dtype)
    if target not in have:
        raise lacking
    return have[target].astype(x.dtype)
