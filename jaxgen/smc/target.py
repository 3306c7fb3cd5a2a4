r"""What a diffusion is steered to: products of powers of the marginals of fields, and a reward.

    p_t  proportional to  prod_i q_{t,i}^{b_i} exp(c(t) R(x))                               (1)

with q_{t,i} the marginals of a noising process from the densities that the fields belong to: one
field and b = an inverse temperature (annealing), several and b = 1 (product of experts), b that sum
to one (geometric mean), b = (1 - w, w) (classifier-free guidance of scale w), one field and a
reward R with weight c(t) (Skreta et al., "Feynman-Kac correctors in diffusion", ICML 2025, arXiv
2503.02819). ``feynman_kac`` samples them with the log-weights that follow from (1).

Where a network gives log gamma_t, a density that need not be the marginal of anything, the
log-weight's rate for any drift v and noise level n of a process that runs towards the data,
dx = v dr + n dW with dr = -dt, is

    G = -d_t log gamma + div v + v . grad log gamma - (n^2/2)(lap log gamma + |grad log gamma|^2)
                                                                                            (2)

which ``potential_from_density`` computes. Formulas (1) with fields need neither the density nor the
Laplacian; they take it that each field is the exact one of a marginal, so that with a network the
limit is not exactly (1), while (2) is right for the network's own density whatever the drift.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import at_least_f32, cast_coefficient, sum_event
from jaxgen.process.linear import LinearSDE
from jaxgen.score.derivatives import probes, value_and_divergence, value_and_laplacian
from jaxgen.score.prediction import PREDICTIONS, Field, convert

__all__ = [
    "Target",
    "annealed",
    "as_target",
    "geometric",
    "guided",
    "potential_from_density",
    "product",
    "reward",
    "steered_drift",
]

# (x, t) -> (n,), with x (n, *event) and t (n,)
Density = Callable[[jax.Array, jax.Array], jax.Array]
Schedule = ArrayLike | Callable[[jax.Array], jax.Array]


class Target(eqx.Module):
    """Fields, their exponents and a reward, equation (1); a pytree.

    Made by ``annealed``, ``geometric``, ``guided``, ``product`` and ``reward``.

    Attributes:
      fields: ``f(x, t) -> like x``, all of the same event.
      exponents: a number for each field, or ``b(t) -> ()``.
      reward: ``R(x) -> (n,)`` of states ``(n, *event)``, differentiable; ``None`` for none.
      reward_scale: its weight, a number or ``c(t) -> ()``.
      potential: ``G(x, t) -> (n,)``, the log-weight's rate in falling time, instead of the one that
        follows from the fields; see ``potential_from_density``.
    """

    fields: tuple[Field, ...]
    exponents: tuple[Any, ...]
    reward: Callable[[jax.Array], jax.Array] | None = None
    reward_scale: Any = None
    potential: Density | None = None

    def __check_init__(self) -> None:
        """What is known without a call."""
        if not self.fields or len(self.fields) != len(self.exponents):
            raise ValueError(
                f"{len(self.fields)} fields and {len(self.exponents)} exponents; expected as many, "
                "at least one"
            )
        for name, functions in (("field", self.fields), ("reward", (self.reward,))):
            for function in functions:
                if not callable(function) and not (name == "reward" and function is None):
                    raise TypeError(f"{name} is {function!r}; expected a function")
        for exponent in self.exponents:
            _check_number("exponent", exponent)
        if (self.reward is None) != (self.reward_scale is None):
            raise ValueError("reward and reward_scale go together; one of them is None")
        if self.reward is not None:
            _check_number("reward_scale", self.reward_scale)

    @property
    def is_varying(self) -> bool:
        """Whether an exponent is a function of time."""
        return any(callable(b) for b in self.exponents)


def _check_number(name: str, value: Any) -> None:
    if callable(value):
        return
    shape = np.shape(value)
    if shape != ():
        raise ValueError(f"{name} has shape {shape}; expected a number, or a function of t")
    known = checks.concrete(value)
    if known is not None and not np.isfinite(known):
        raise ValueError(f"{name} is {value}; expected a finite number")


# --- the kinds ------------------------------------------------------------------------------------


def annealed(field: Field, beta: Schedule) -> Target:
    """The density of a field to the power ``beta``: above 1 colder, below 1 hotter.

    Args:
      field: ``f(x, t) -> like x``.
      beta: inverse temperature, or ``beta(t)``, which needs ``log_probs`` in ``feynman_kac``.
    """
    return Target((field,), (beta,))


def geometric(fields: Sequence[Field], exponents: Sequence[Schedule] | None = None) -> Target:
    """A product of powers of densities; their geometric mean by default.

    Args:
      fields: ``f(x, t) -> like x`` each.
      exponents: one for each, of any sum and sign; equal ones that sum to 1 if ``None``.
    """
    fields = tuple(fields)
    if exponents is None:
        exponents = (1 / max(len(fields), 1),) * len(fields)
    return Target(fields, tuple(exponents))


def guided(unconditional: Field, conditional: Field, scale: Schedule) -> Target:
    """Classifier-free guidance, the density ``unconditional^(1 - scale) conditional^scale``.

    Args:
      unconditional: ``f(x, t) -> like x``.
      conditional: the same with its condition closed over.
      scale: 0 unconditional, 1 conditional, above 1 pressed, as in ``guide.classifier_free``.
    """
    if callable(scale):
        return Target((unconditional, conditional), (lambda t: 1 - scale(t), scale))
    return Target((unconditional, conditional), (1 - scale, scale))


def product(fields: Sequence[Field], beta: Schedule = 1.0) -> Target:
    """A product of experts, each to the power ``beta``.

    Args:
      fields: ``f(x, t) -> like x`` each.
      beta: an inverse temperature of the whole product.
    """
    fields = tuple(fields)
    return Target(fields, (beta,) * len(fields))


def reward(
    base: Field | Target, function: Callable[[jax.Array], jax.Array], scale: Schedule
) -> Target:
    """A field's density, or another target, tilted by ``exp(scale(t) function(x))``.

    Args:
      base: a field or a target without a reward.
      function: ``R(x) -> (n,)`` of states ``(n, *event)``, noisy ones too; differentiable.
      scale: the weight, or ``c(t)``. One that falls to 0 at ``t_max`` lets the reward in slowly;
        the first weights make up for one that does not.

    Raises:
      ValueError: the target has a reward already.
    """
    target = base if isinstance(base, Target) else annealed(base, 1.0)
    if target.reward is not None:
        raise ValueError("the target has a reward already; add the two in one function")
    return Target(target.fields, target.exponents, function, scale, target.potential)


def as_target(targets: Target | Sequence[tuple[Field, Any]]) -> Target:
    """A ``Target``, from one or from pairs of a field and its exponent.

    Raises:
      TypeError: something else.
    """
    if isinstance(targets, Target):
        return targets
    if callable(targets):
        raise TypeError("targets is a function; expected a Target such as annealed(field, 2.0)")
    pairs = list(targets) if isinstance(targets, Iterable) else [targets]
    if not all(isinstance(p, tuple | list) and len(p) == 2 for p in pairs):
        raise TypeError(f"targets is {targets!r}; expected a Target or pairs (field, exponent)")
    return Target(tuple(p[0] for p in pairs), tuple(p[1] for p in pairs))


# --- what the sampler reads -----------------------------------------------------------------------


def predictions_of(target: Target, prediction: str | Sequence[str]) -> tuple[str, ...]:
    """What each field predicts, from one name for all or one for each.

    Raises:
      ValueError: an unknown kind or another number of them.
    """
    count = len(target.fields)
    names = (prediction,) * count if isinstance(prediction, str) else tuple(prediction)
    if len(names) != count:
        raise ValueError(f"prediction has {len(names)} kinds for {count} fields")
    for name in names:
        checks.one_of("prediction", name, PREDICTIONS)
    return names


def noises(
    target: Target,
    x: jax.Array,
    t: jax.Array,
    sde: LinearSDE,
    predictions: Sequence[str],
    dtype: Any = None,
) -> list[jax.Array]:
    """The noise prediction of every field, each field called once; in ``dtype`` if given."""
    given = x if dtype is None else x.astype(dtype)
    out = []
    for i, (field, kind) in enumerate(zip(target.fields, predictions, strict=True)):
        value = checks.cast_field_output(field(given, t), x, f"field {i} of the target")
        out.append(convert(value, x, t, sde, kind, "noise"))
    return out


def at_time(value: Any, t: jax.Array) -> jax.Array:
    """A number, or a function of time at each of ``t``: ``t``'s shape, float32 or wider."""
    if not callable(value):
        return jnp.broadcast_to(jnp.asarray(value, t.dtype), t.shape)
    out = jnp.asarray(jax.vmap(value)(t.reshape(-1)))
    if out.shape != (t.size,):
        raise ValueError(f"a function of t returned shape {out.shape[1:]}; expected ()")
    return out.astype(t.dtype).reshape(t.shape)


def per_particle(value: Any, x: jax.Array, name: str) -> jax.Array:
    """``(n,)`` of a floating dtype, in float32 or wider as ``x`` is.

    Raises:
      ValueError: another shape.
      TypeError: an integer.
    """
    array = checks.floating(name, value)
    if array.shape != x.shape[:1]:
        raise ValueError(
            f"{name} returned shape {array.shape} for x of shape {x.shape}; expected "
            f"{x.shape[:1]}, a number for each particle"
        )
    return array.astype(at_least_f32(x.dtype))


def value_and_grad_of(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, name: str
) -> tuple[jax.Array, jax.Array]:
    """A function of each particle and its gradient, ``(n,)`` and like ``x``."""
    value, pull = jax.vjp(lambda y: per_particle(function(y), y, name), x)
    return value, pull(jnp.ones_like(value))[0]


# --- energy models --------------------------------------------------------------------------------


def steered_drift(
    targets: Target | Sequence[tuple[Field, Any]],
    sde: LinearSDE,
    *,
    noise: ArrayLike = 1.0,
    prediction: str | Sequence[str] = "noise",
) -> Field:
    """The drift, in falling time, of the process that ``feynman_kac`` follows.

    v = -f + ((1 + z)/2) g^2 sum_i b_i s_i + (z/2) g^2 c grad R, and its noise has the variance
    z g^2: what ``potential_from_density`` needs.

    Args:
      targets: see ``feynman_kac``, as the others.
      sde: the process.
      noise: z.
      prediction: what the fields predict.

    Returns:
      ``v(x, t) -> like x``.
    """
    target = as_target(targets)
    kinds = predictions_of(target, prediction)

    def drift(x: jax.Array, t: jax.Array) -> jax.Array:
        x = checks.floating("x", x)
        t = checks.field_time(t, x)
        square, sigma = sde.diffusion_squared(t), sde.sigma(t)
        z = jnp.asarray(noise, square.dtype)
        parts = noises(target, x, t, sde, kinds)
        weights = [at_time(b, t) for b in target.exponents]
        mixed = jnp.zeros_like(x)
        for b, e in zip(weights, parts, strict=True):
            mixed = mixed + cast_coefficient(b, x) * e
        v = -sde.drift(x, t) - cast_coefficient((1 + z) / 2 * square / sigma, x) * mixed
        if target.reward is not None:
            slope = value_and_grad_of(target.reward, x, "reward")[1]
            pull = z / 2 * square * at_time(target.reward_scale, t)
            v = v + cast_coefficient(pull, x) * slope
        return v.astype(x.dtype)

    return drift


def potential_from_density(
    log_gamma: Density,
    drift: Field,
    noise: ArrayLike | Callable[[jax.Array], jax.Array],
    *,
    key: jax.Array | None = None,
    n_probes: int = 1,
) -> Density:
    """The log-weight's rate for a density that a network gives, equation (2).

    For ``Target.potential``. ``weights="density"`` of ``feynman_kac`` with ``log_probs`` reaches
    the same law with no derivative of the network, and at any step size.

    Args:
      log_gamma: ``(x, t) -> (n,)``, unnormalised log-density of states ``(n, *event)``, twice
        differentiable in ``x`` and once in ``t``.
      drift: ``v(x, t) -> like x`` in falling time, as ``steered_drift`` gives.
      noise: standard deviation of the process' noise in unit time, or a function of ``t`` ``(n,)``:
        ``lambda t: jnp.sqrt(z) * sde.diffusion(t)``.
      key: ``None`` for exact Laplacian and divergence (one pass for each entry of an example);
        with a key both are Hutchinson's estimates, whose noise in the log-weight biases the weight
        by half its variance.
      n_probes: of Hutchinson's estimate.

    Returns:
      ``G(x, t) -> (n,)``.

    Example:
      >>> import jax.numpy as jnp
      >>> normal = lambda x, t: -0.5 * jnp.sum(x**2, -1)
      >>> rate = potential_from_density(normal, lambda x, t: 0 * x, 1.0)
      >>> rate(jnp.ones((1, 2)), jnp.ones(1)).tolist()  # -(1/2)(-2 + 2)
      [0.0]
    """
    if key is not None:
        keys.check(key)

    def potential(x: jax.Array, t: jax.Array) -> jax.Array:
        x = checks.floating("x", x)
        t = checks.field_time(t, x)

        def at(y: jax.Array, s: jax.Array) -> jax.Array:
            return per_particle(log_gamma(y, s), y, "log_gamma")

        probe = None
        if key is not None:
            # New probes at every time, so that their errors do not add up along a path.
            bits = jax.lax.bitcast_convert_type(t[0].astype(jnp.float32), jnp.uint32)
            probe = probes(jax.random.fold_in(key, bits), x.shape, n=n_probes, dtype=x.dtype)
        slope = value_and_grad_of(lambda y: at(y, t), x, "log_gamma")[1]
        in_time = jax.jvp(lambda s: at(x, s), (t,), (jnp.ones_like(t),))[1]
        v, divergence = value_and_divergence(drift, x, t, probe)
        laplacian = value_and_laplacian(at, x, t, probe)[1]
        level = noise(t) if callable(noise) else jnp.asarray(noise)
        square = level**2
        curvature = laplacian + sum_event(slope**2)
        return -in_time + divergence + sum_event(v * slope) - 0.5 * square * curvature

    return potential
