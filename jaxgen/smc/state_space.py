"""A state-space model as pure functions of one particle, and the checks at its door."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.core.arrays import at_least_f32

__all__ = ["StateSpaceModel"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StateSpaceModel:
    """A hidden Markov chain seen through observations, as pure functions of one particle.

    A particle is an array or a pytree of arrays; the library maps the functions over particles.
    ``t`` is an int32 scalar that counts from 0; functions of a step ``t`` lead *to* that step.
    Parameters are closed over: build the model inside ``jit`` or ``grad`` where they are traced.

    Attributes:
      init: ``init(key) -> x``, a draw of the first state.
      transition: ``transition(key, x, t) -> x``, a draw of the state at ``t`` from that at
        ``t - 1``; same structure, shapes and dtypes.
      log_potential: ``log_potential(x, y, t) -> ()``, log-density of the observation ``y`` of step
        ``t``, or any other log-weight of ``x``.
      log_transition: ``log_transition(x_prev, x_next, t) -> ()``, the transition's log-density;
        backward sampling and guided proposals need it.
      log_init: ``log_init(x) -> ()``, the first state's log-density, for guided first proposals.
      propose_init: ``propose_init(key, y) -> x``, a first proposal that sees ``y``.
      log_propose_init: ``log_propose_init(x, y) -> ()``, its log-density.
      propose: ``propose(key, x_prev, y, t) -> x``, a proposal that sees ``y``.
      log_propose: ``log_propose(x_prev, x_next, y, t) -> ()``, its log-density.
      log_auxiliary: ``log_auxiliary(x_prev, y, t) -> ()``, the auxiliary filter's first-stage
        log-weight of a particle at ``t - 1``, given the observation of ``t``.
      log_transition_bound: ``log_transition_bound(t) -> ()``, a number that ``log_transition(., .,
        t)`` never exceeds; rejection sampling needs it.

    Raises:
      TypeError: a function is missing or not callable.
      ValueError: a proposal without its log-density or the reverse.

    Example:
      >>> import jax
      >>> model = StateSpaceModel(
      ...     init=lambda key: jax.random.normal(key),
      ...     transition=lambda key, x, t: 0.9 * x + 0.5 * jax.random.normal(key),
      ...     log_potential=lambda x, y, t: -0.5 * (y - x) ** 2,
      ... )
      >>> model.log_transition is None
      True
    """

    init: Callable[[jax.Array], Any]
    transition: Callable[[jax.Array, Any, jax.Array], Any]
    log_potential: Callable[[Any, Any, jax.Array], jax.Array]
    log_transition: Callable[[Any, Any, jax.Array], jax.Array] | None = None
    _: dataclasses.KW_ONLY
    log_init: Callable[[Any], jax.Array] | None = None
    propose_init: Callable[[jax.Array, Any], Any] | None = None
    log_propose_init: Callable[[Any, Any], jax.Array] | None = None
    propose: Callable[[jax.Array, Any, Any, jax.Array], Any] | None = None
    log_propose: Callable[[Any, Any, Any, jax.Array], jax.Array] | None = None
    log_auxiliary: Callable[[Any, Any, jax.Array], jax.Array] | None = None
    log_transition_bound: Callable[[jax.Array], jax.Array] | None = None

    def __post_init__(self) -> None:
        """Check what is known without a call."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            needed = field.name in ("init", "transition", "log_potential")
            if (needed or value is not None) and not callable(value):
                raise TypeError(f"{field.name} is {value!r}; expected a function")
        for draw, density, of_model in (
            ("propose", "log_propose", "log_transition"),
            ("propose_init", "log_propose_init", "log_init"),
        ):
            given = [n for n in (draw, density) if getattr(self, n) is not None]
            if len(given) == 1:
                other = density if given[0] == draw else draw
                raise ValueError(f"{given[0]} is given without {other}; expected both or neither")
            if given and getattr(self, of_model) is None:
                raise ValueError(f"{draw} is given without {of_model}, which its weights need")

    def require(self, *names: str, what: str) -> None:
        """Raise ``ValueError`` that names the first absent function of ``names``.

        Args:
          names: attributes that ``what`` calls.
          what: the caller's name.
        """
        for name in names:
            if getattr(self, name) is None:
                raise ValueError(f"{what} needs the model's {name}, which is None")


def same_particle(name: str, came: Any, expected: Any) -> None:
    """Raise ``ValueError`` unless two pytrees agree in structure, shapes and dtypes."""

    def describe(tree: Any) -> str:
        return str(jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree))

    if describe(came) != describe(expected):
        raise ValueError(
            f"{name} returned {describe(came)}; expected {describe(expected)}, the particle's own "
            "structure, shapes and dtypes"
        )


def scalar_log(name: str, value: Any) -> jax.Array:
    """A model function's value as one log-weight, in float32 or wider.

    Raises:
      ValueError: it is not a scalar.
      TypeError: it is not of a real floating dtype.
    """
    value = jnp.asarray(value)
    if value.shape != ():
        raise ValueError(f"{name} returned shape {value.shape} for one particle; expected ()")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} returned dtype {value.dtype}; expected a floating dtype")
    return value.astype(at_least_f32(value.dtype))
