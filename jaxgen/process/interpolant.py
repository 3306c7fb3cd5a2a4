r"""Stochastic interpolants: bridges between two densities in unit time.

Between x0 ~ rho0 at t = 0 and x1 ~ rho1 at t = 1, independent or paired, with z ~ N(0, I)
independent of both,

    x_t = I(t, x0, x1) + gamma(t) z,     I(0) = x0,  I(1) = x1,  gamma(0) = gamma(1) = 0     (1)
    I = alpha(t) x0 + beta(t) x1         (spatially linear)                                  (2)

(Albergo, Boffi and Vanden-Eijnden, arXiv 2303.08797, definition 1 and section 4). A one-sided
interpolant has gamma = 0 and a standard normal x0, which then plays the part of z, so that alpha
is its noise level (section 4.4).

Time runs from rho0 to rho1, so from noise to data where x0 is noise: against the time of
``LinearSDE`` (``score.from_flow`` crosses over). gamma is given by its square, which is smooth at
the ends of time where gamma is not: gamma gamma' = (gamma^2)'/2 is finite there, gamma' need not
be.

With r = sqrt(1 - gamma^2), the named kinds and their gammas are

| kind             | alpha                | beta                 | gamma               |
|------------------|----------------------|----------------------|---------------------|
| linear           | 1 - t                | t                    | brownian, or any    |
| trig             | r cos(pi t/2)        | r sin(pi t/2)        | brownian, below 1   |
| encoder_decoder  | cos^2(pi t), t < 1/2 | cos^2(pi t), t > 1/2 | sine_squared        |
| mirror           | 0                    | 1                    | brownian, not zero  |
| one_sided_linear | 1 - t                | t                    | zero                |
| one_sided_trig   | cos(pi t/2)          | sin(pi t/2)          | zero                |
| score_based      | sqrt(1 - t^2)        | t                    | zero                |

Left out: interpolants with matrix coefficients, and several densities at once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import at_least_f32, batch_event, left_broadcast, safe_sqrt, strong_scalar
from jaxgen.process.interpolant_coefficients import GAMMAS, INTERPOLANTS, OnSphere, circle2

__all__ = ["GAMMAS", "INTERPOLANTS", "Interpolant", "InterpolantRates", "interpolant"]

# Rounding allowed to t at the ends of time, and to a user's coefficients there.
_SLACK = 1e-6

_elementwise = functools.partial(jax.jit, inline=True)


class InterpolantRates(NamedTuple):
    """Coefficients of equations (1) and (2) with their time derivatives, each of ``t``'s shape.

    ``gamma_gamma_dot`` is the product of gamma and its derivative, finite where that is not.
    """

    alpha: jax.Array
    beta: jax.Array
    gamma: jax.Array
    alpha_dot: jax.Array
    beta_dot: jax.Array
    gamma_gamma_dot: jax.Array


@_elementwise
def _inside(t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``t`` in float32 or wider, NaN outside [0, 1], and whether all of it is inside."""
    t = t.astype(at_least_f32(t.dtype))
    ok = (t >= -_SLACK) & (t <= 1 + _SLACK)
    return jnp.where(ok, jnp.clip(t, 0.0, 1.0), jnp.nan), jnp.all(ok)


@_elementwise
def _like_time(value: jax.Array, t: jax.Array) -> jax.Array:
    """``value`` in ``t``'s shape, NaN where ``t`` is."""
    return jnp.where(jnp.isnan(t), jnp.nan, jnp.broadcast_to(value, t.shape).astype(t.dtype))


def _slope(function: Callable[[jax.Array], jax.Array], t: jax.Array) -> Any:
    return jax.jvp(function, (t,), (jnp.ones_like(t),))


@dataclasses.dataclass(frozen=True, eq=False)
class Interpolant:
    """A stochastic interpolant, equation (1) (module docstring).

    ``interpolant`` makes the named ones. A pytree: parameters are data, the functions and ``kind``
    are static, so define them at module level (a lambda made anew compiles anew).

    Attributes:
      alpha_fn: ``f(t, *params) -> alpha``, elementwise; ``None`` with a ``path_fn``.
      beta_fn: ``f(t, *params) -> beta``, elementwise; ``None`` with a ``path_fn``.
      gamma2_fn: ``f(t, *params) -> gamma^2``, elementwise and differentiable on [0, 1]; ``None``
        for zero.
      params: arguments of these functions; Python numbers become strong float32 (or wider).
      gamma_fn: gamma itself, where it has a derivative at the ends that the root has not.
      path_fn: ``I(t, x0, x1, *path_params) -> like x0``, any differentiable curve; ``t`` has the
        axes of ``x0``, ``(batch, 1, ...)`` or ``(1, ...)``. That it goes from ``x0`` to ``x1`` is
        not checked.
      path_params: arguments of ``path_fn``, any pytree of arrays in each place.
      one_sided: ``x0`` is standard normal and plays the part of ``z``. This cannot be checked.
      alpha2_fn: alpha^2 of a one-sided interpolant, where alpha has no derivative at an end.
      kind: a name.

    Values of ``t`` outside [0, 1] give NaN, and an error under ``checkify``.

    Raises:
      TypeError: a function is not callable.
      ValueError: neither or both of ``path_fn`` and ``alpha_fn, beta_fn``; gamma^2 not zero at
        both ends, or, of a two-sided interpolant, alpha or beta other than (1, 0) and (0, 1)
        there, to 1e-6 (where the parameters are known); a one-sided interpolant with a gamma or a
        ``path_fn``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> interp = Interpolant(lambda t: 1 - t, lambda t: t, lambda t: t * (1 - t))
      >>> float(interp.gamma(0.5)), float(interp.gamma_gamma_dot(0.0))
      (0.5, 0.5)
      >>> x_t, z, velocity = interp.draw(
      ...     jax.random.key(0), jnp.zeros((4, 2)), jnp.ones((4, 2)), jnp.linspace(0, 1, 4))
      >>> velocity[0].tolist()
      [1.0, 1.0]
    """

    alpha_fn: Callable[..., jax.Array] | None = dataclasses.field(metadata={"static": True})
    beta_fn: Callable[..., jax.Array] | None = dataclasses.field(metadata={"static": True})
    gamma2_fn: Callable[..., jax.Array] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    _: dataclasses.KW_ONLY
    params: tuple[Any, ...] = ()
    gamma_fn: Callable[..., jax.Array] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    path_fn: Callable[..., jax.Array] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    path_params: tuple[Any, ...] = ()
    one_sided: bool = dataclasses.field(default=False, metadata={"static": True})
    alpha2_fn: Callable[..., jax.Array] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    kind: str | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        for name in ("alpha_fn", "beta_fn", "gamma2_fn", "gamma_fn", "path_fn", "alpha2_fn"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{name} is {value!r}; expected a function of t")
        is_linear = self.alpha_fn is not None and self.beta_fn is not None
        if (self.alpha_fn is None) != (self.beta_fn is None) or is_linear == bool(self.path_fn):
            raise ValueError("expected either alpha_fn and beta_fn, or path_fn")
        if self.one_sided and (self.gamma2_fn is not None or not is_linear):
            raise ValueError(
                "one_sided is True with a gamma2_fn or a path_fn; there alpha is the noise level, "
                "and gamma is zero"
            )
        object.__setattr__(self, "params", tuple(strong_scalar(p) for p in self.params))
        object.__setattr__(self, "path_params", tuple(self.path_params))
        # The named kinds are known to be right, and making one starts no device.
        leaves = jax.tree.leaves(self.params)
        if self.kind is None and not any(isinstance(p, jax.core.Tracer) for p in leaves):
            self._check_ends()

    def _check_ends(self) -> None:
        expected = {"gamma2_fn": (0.0, 0.0)}
        if not self.one_sided:
            expected |= {"alpha_fn": (1.0, 0.0), "beta_fn": (0.0, 1.0)}
        for name, ends in expected.items():
            function = getattr(self, name)
            if function is None:
                continue
            for t, wanted in zip((0.0, 1.0), ends, strict=True):
                with jax.ensure_compile_time_eval():
                    value = float(function(jnp.asarray(t), *self.params))
                if not abs(value - wanted) <= _SLACK:
                    raise ValueError(
                        f"{name} is {value:.6g} at t = {t:g}; expected {wanted:g} for a two-sided "
                        "interpolant"
                    )

    @property
    def is_linear(self) -> bool:
        """Whether ``I`` is equation (2), rather than a curve of the user's."""
        return self.path_fn is None

    @property
    def has_noise(self) -> bool:
        """Whether there is a Gaussian part, and with it a score: gamma, or a one-sided alpha."""
        return self.one_sided or self.gamma2_fn is not None

    # --- coefficients ---------------------------------------------------------------------------

    def _time(self, t: ArrayLike, checked: bool = True) -> jax.Array:
        known, is_fine = _inside(jnp.asarray(t))
        if checked:
            checks.debug_check(is_fine, "t is outside [0, 1]: {t}", t=jnp.asarray(t))
        return known

    def _value_and_slope(self, function: Any, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, slope = _slope(lambda s: function(s, *self.params), t)
        return _like_time(value, t), _like_time(slope, t)

    def _linear(self, name: str) -> Callable[..., jax.Array]:
        function = getattr(self, f"{name}_fn")
        if function is None:
            raise ValueError(
                f"{name} is asked of an interpolant that is given by a path_fn; expected a "
                "spatially linear one"
            )
        return function

    def alpha(self, t: ArrayLike) -> jax.Array:
        """Coefficient of ``x0``, of ``t``'s shape; ``ValueError`` for a ``path_fn``."""
        t = self._time(t)
        return _like_time(self._linear("alpha")(t, *self.params), t)

    def beta(self, t: ArrayLike) -> jax.Array:
        """Coefficient of ``x1``, of ``t``'s shape; ``ValueError`` for a ``path_fn``."""
        t = self._time(t)
        return _like_time(self._linear("beta")(t, *self.params), t)

    def alpha_dot(self, t: ArrayLike) -> jax.Array:
        """Time derivative of ``alpha``; infinite at t = 1 for ``score_based``."""
        return self._value_and_slope(self._linear("alpha"), self._time(t))[1]

    def beta_dot(self, t: ArrayLike) -> jax.Array:
        """Time derivative of ``beta``."""
        return self._value_and_slope(self._linear("beta"), self._time(t))[1]

    def _gamma_rates(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The level gamma and the product gamma gamma' at a checked time."""
        if self.gamma2_fn is None:
            zero = _like_time(jnp.zeros(()), t)
            return zero, zero
        square, slope = self._value_and_slope(self.gamma2_fn, t)
        if self.gamma_fn is not None:
            return _like_time(self.gamma_fn(t, *self.params), t), 0.5 * slope
        # The root takes a negative number for zero, beside which the product would be wrong.
        return jnp.where(square < -_SLACK, jnp.nan, safe_sqrt(square)), 0.5 * slope

    def gamma(self, t: ArrayLike) -> jax.Array:
        """Coefficient of ``z``, of ``t``'s shape; zero for a one-sided interpolant."""
        return self._gamma_rates(self._time(t))[0]

    def gamma_gamma_dot(self, t: ArrayLike) -> jax.Array:
        """``gamma`` times its time derivative, ``(gamma^2)'/2``: finite at the ends too."""
        return self._gamma_rates(self._time(t))[1]

    def gamma_dot(self, t: ArrayLike) -> jax.Array:
        """Time derivative of ``gamma``, of ``t``'s shape.

        At an end of time its limit: for the Brownian gamma it is infinite there.
        """
        t = self._time(t)
        if self.gamma_fn is not None:
            return self._value_and_slope(self.gamma_fn, t)[1]
        gamma, product = self._gamma_rates(t)
        at_end = gamma == 0
        limit = jnp.where(product == 0, self._finite_slope(t), jnp.sign(product) * jnp.inf)
        return jnp.where(at_end, limit, product / jnp.where(at_end, 1.0, gamma))

    def _finite_slope(self, t: jax.Array) -> jax.Array:
        """Where gamma^2 vanishes with its slope, that of gamma: its square is (gamma^2)''/2."""
        if self.gamma2_fn is None:
            return jnp.zeros_like(t)
        _, second = _slope(lambda s: self._value_and_slope(self.gamma2_fn, s)[1], t)
        return jnp.where(t < 0.5, 1.0, -1.0).astype(t.dtype) * safe_sqrt(0.5 * second)

    def noise_rates(self, t: ArrayLike, *, checked: bool = True) -> tuple[jax.Array, jax.Array]:
        """Level of the Gaussian part, and its product with its own time derivative.

        The level is ``gamma``, or ``alpha`` for a one-sided interpolant; the product is finite at
        both ends for every named kind. ``checked`` is as in ``position``.

        Returns:
          Two arrays of ``t``'s shape, in float32 or wider.
        """
        t = self._time(t, checked)
        if not self.one_sided:
            return self._gamma_rates(t)
        level, slope = self._value_and_slope(self.alpha_fn, t)
        if self.alpha2_fn is None:
            return level, level * slope
        return level, 0.5 * self._value_and_slope(self.alpha2_fn, t)[1]

    def rates(self, t: ArrayLike) -> InterpolantRates:
        """All coefficients of equations (1) and (2); ``ValueError`` for a ``path_fn``."""
        t = self._time(t)
        alpha, alpha_dot = self._value_and_slope(self._linear("alpha"), t)
        beta, beta_dot = self._value_and_slope(self._linear("beta"), t)
        gamma, product = self._gamma_rates(t)
        return InterpolantRates(alpha, beta, gamma, alpha_dot, beta_dot, product)

    # --- states ---------------------------------------------------------------------------------

    def ends(
        self, x0: ArrayLike | None, x1: ArrayLike, *, noise: ArrayLike | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """``x0`` and ``x1`` as arrays of one floating dtype and shape.

        ``x0`` may be ``None`` for ``mirror``, where it is ``x1``, and for a one-sided interpolant,
        where it is ``noise``.

        Raises:
          ValueError: different shapes, or ``x0`` missing elsewhere.
          TypeError: not floating.
        """
        x1 = checks.floating("x1", x1)
        if x0 is None:
            x0 = noise if self.one_sided else x1 if self.kind == "mirror" else None
        if x0 is None:
            raise ValueError("x0 is None; expected the states at t = 0 for this interpolant")
        x0 = checks.floating("x0", x0)
        if x0.shape != x1.shape:
            raise ValueError(f"x0 has shape {x0.shape} and x1 {x1.shape}; expected the same")
        dtype = jnp.promote_types(x0.dtype, x1.dtype)
        return x0.astype(dtype), x1.astype(dtype)

    def position(
        self, x0: ArrayLike, x1: ArrayLike, t: ArrayLike, *, checked: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """``I(t, x0, x1)`` and its time derivative, both in float32 or wider.

        Args:
          x0: ``(batch, *event)`` or one example.
          x1: of ``x0``'s shape.
          t: times, ``()`` or ``(batch,)``.
          checked: report a time out of range under ``checkify``; it is NaN in any case. A report
            costs a compiled function its fast dispatch, so times that were drawn in range go
            without.
        """
        x0, x1 = self.ends(x0, x1)
        wide = at_least_f32(x0.dtype)
        x0, x1 = x0.astype(wide), x1.astype(wide)
        time = self._time(t, checked)
        if self.path_fn is None:
            alpha, alpha_dot = self._value_and_slope(self.alpha_fn, time)
            beta, beta_dot = self._value_and_slope(self.beta_fn, time)
            a, a_dot, b, b_dot = (left_broadcast(c, x0) for c in (alpha, alpha_dot, beta, beta_dot))
            return (a * x0 + b * x1).astype(wide), (a_dot * x0 + b_dot * x1).astype(wide)
        path_fn = self.path_fn
        value, slope = _slope(
            lambda s: path_fn(s, x0, x1, *self.path_params), left_broadcast(time, x0).astype(wide)
        )
        return (
            checks.cast_field_output(value, x0, "path_fn"),
            checks.cast_field_output(slope, x0, "path_fn"),
        )

    def path(
        self, x0: ArrayLike | None, x1: ArrayLike, noise: ArrayLike | None, t: ArrayLike
    ) -> jax.Array:
        """The state ``x_t`` of given ends and noise, equation (1).

        Args:
          x0: ``(batch, *event)`` or one example; may be ``None`` if ``ends`` knows it.
          x1: of ``x0``'s shape.
          noise: ``z``, of ``x0``'s shape; not used, and may be ``None``, where gamma is zero.
          t: times, ``()`` or ``(batch,)``.

        Returns:
          ``x_t``, in the dtype of the ends.
        """
        x0, x1 = self.ends(x0, x1, noise=noise)
        x_t, _ = self.position(x0, x1, t)
        if self.gamma2_fn is not None:
            if noise is None or jnp.shape(noise) != x0.shape:
                shape = None if noise is None else jnp.shape(noise)
                raise ValueError(f"noise has shape {shape}; expected {x0.shape}")
            x_t = x_t + left_broadcast(self.gamma(t), x0) * jnp.asarray(noise).astype(x_t.dtype)
        return x_t.astype(x0.dtype)

    def draw(
        self,
        key: jax.Array,
        x0: ArrayLike | None,
        x1: ArrayLike,
        t: ArrayLike,
        *,
        event_ndim: int | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Draw ``x_t`` between given ends, equation (1).

        Args:
          key: typed key; example ``i`` of a batch uses ``fold_in(key, i)``.
          x0: ``(batch, *event)``, paired with ``x1`` as the caller has it; one example if
            ``event_ndim=x0.ndim``. ``None`` draws it for a one-sided interpolant, and is ``x1``
            for ``mirror``.
          x1: of ``x0``'s shape.
          t: times, ``()`` or ``(batch,)``.
          event_ndim: see above.

        Returns:
          ``x_t``, the noise ``z`` in it (for a one-sided interpolant ``x0``) and the time
          derivative of ``I``, each like the ends.

        Raises:
          ValueError: ends of different shapes, or a ``t`` that is neither ``()`` nor ``(batch,)``.
          TypeError: a raw key, or ends that are not floating.
        """
        x1 = checks.floating("x1", x1)
        batch_event(x1, event_ndim)
        t = checks.field_time(t, x1, event_ndim)
        z = None
        if not self.one_sided or x0 is None:
            z = keys.normal(keys.check(key), x1.shape, x1.dtype, event_ndim)
        x0, x1 = self.ends(x0, x1, noise=z)
        z = x0 if z is None else z.astype(x0.dtype)
        x_t, velocity = self.position(x0, x1, t)
        if self.gamma2_fn is not None:
            x_t = x_t + left_broadcast(self.gamma(t), x0) * z.astype(x_t.dtype)
        return x_t.astype(x0.dtype), z, velocity.astype(x0.dtype)


_STATIC = tuple(f.name for f in dataclasses.fields(Interpolant) if f.metadata.get("static"))
_DATA = tuple(f.name for f in dataclasses.fields(Interpolant) if f.name not in _STATIC)


def _flatten(interp: Interpolant) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return tuple(getattr(interp, n) for n in _DATA), tuple(getattr(interp, n) for n in _STATIC)


def _flatten_with_keys(interp: Interpolant) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    data, static = _flatten(interp)
    names = (jax.tree_util.GetAttrKey(n) for n in _DATA)
    return tuple(zip(names, data, strict=True)), static


def _unflatten(static: tuple[Any, ...], data: Iterable[Any]) -> Interpolant:
    """Rebuild without ``__post_init__``: leaves may be masks or placeholders, not numbers."""
    interp = object.__new__(Interpolant)
    for name, value in zip(_DATA + _STATIC, (*data, *static), strict=True):
        object.__setattr__(interp, name, value)
    return interp


jax.tree_util.register_pytree_with_keys(Interpolant, _flatten_with_keys, _unflatten, _flatten)


# --- the named ones -------------------------------------------------------------------------------

_ONE_SIDED = ("one_sided_linear", "one_sided_trig", "score_based")


def interpolant(
    name: str | Callable[..., jax.Array], a: ArrayLike = 1.0, gamma: str | None = None
) -> Interpolant:
    """A named interpolant, or a curve of your own with a named gamma.

    Args:
      name: ``"linear" "trig" "encoder_decoder" "mirror" "one_sided_linear" "one_sided_trig"
        "score_based"`` (module docstring), or a function ``I(t, x0, x1)``, whose time derivative
        is taken by ``jax.jvp``; define it at module level.
      a: scale of gamma^2, positive, ``()``; of a traced one that is not, gamma is NaN.
      gamma: ``"brownian"``, gamma^2 = a t (1 - t); ``"quadratic"``, a t^2 (1 - t)^2;
        ``"sine_squared"``, a sin^4(pi t); or ``"zero"``, for flows alone. ``None`` is the kind's
        own: brownian, sine_squared for ``encoder_decoder``, zero for a one-sided kind.

    Returns:
      An ``Interpolant`` with ``a`` as its parameter, so that a sweep over it compiles once and a
      gradient in it exists.

    Raises:
      ValueError: an unknown name; ``a`` not positive, or given without a gamma; a one-sided kind
        with a gamma; ``mirror`` without one; ``trig`` with a gamma of 1 or more.

    Example:
      >>> interp = interpolant("linear", a=2.0)
      >>> round(float(interp.gamma(0.5)) ** 2, 6)
      0.5
    """
    path_fn = name if callable(name) else None
    kind = "path" if callable(name) else name
    alpha_fn: Any = None
    beta_fn: Any = None
    default = "brownian"
    if path_fn is None:
        checks.one_of("name", name, INTERPOLANTS)
        alpha_fn, beta_fn, default = INTERPOLANTS[kind]
    gamma = default if gamma is None else gamma
    checks.one_of("gamma", gamma, GAMMAS)
    one_sided = kind in _ONE_SIDED
    if one_sided and gamma != "zero":
        raise ValueError(f"gamma is {gamma!r} for {kind}; expected 'zero': x0 is the noise there")
    if kind == "mirror" and gamma == "zero":
        raise ValueError("gamma is 'zero' for mirror; expected another: nothing would move")
    gamma2_fn, gamma_fn, largest = GAMMAS[gamma]
    if jnp.shape(a) != ():
        raise ValueError(f"a has shape {jnp.shape(a)}; expected a finite positive number")
    known = checks.concrete(a)
    if known is not None:
        a_known = float(known)
        if not (a_known > 0 and math.isfinite(a_known)):
            raise ValueError(f"a is {a_known}; expected a finite positive number")
        if gamma == "zero" and a_known != 1:
            raise ValueError(f"a is {a_known} with gamma 'zero', which has no scale; expected 1")
        if kind == "trig" and a_known * largest >= 1:
            raise ValueError(
                f"gamma reaches {math.sqrt(a_known * largest):.4g} with a = {a_known}; expected "
                "less than 1 for trig"
            )
    if kind == "trig":
        alpha_fn, beta_fn = OnSphere(alpha_fn, gamma2_fn), OnSphere(beta_fn, gamma2_fn)
    return Interpolant(
        alpha_fn,
        beta_fn,
        gamma2_fn,
        params=() if gamma2_fn is None else (a,),
        gamma_fn=gamma_fn,
        path_fn=path_fn,
        one_sided=one_sided,
        alpha2_fn=circle2 if kind == "score_based" else None,
        kind=kind,
    )
