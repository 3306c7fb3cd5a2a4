r"""Predictors: the published indexed kernels, and any of our solvers lifted into a step.

With the forward kernel x_i' = a x_{i-1}' + G z of the chain and the score s = score(x, t_i) (Song
et al., arXiv 2011.13456, appendices E and F):

    reverse diffusion   mean' = (2 - a) x' + G^2 s,   noise G                               (1)
    ancestral           mean' = (x' + G^2 s) / a,     noise G (vp), G sigma_{i-1}/sigma_i (ve)  (2)

Equation (1) serves every process (with an Euler-Maruyama kernel where none is published), (2) only
vp, ve and discrete betas (DDPM itself).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.core import checks
from jaxgen.core.arrays import cast_coefficient
from jaxgen.solve.chain import Chain, Step, at
from jaxgen.solve.euler_maruyama import EulerMaruyama, reverse_step
from jaxgen.solve.semilinear import GridSolver, tabulate

# Kinds of process with a published ancestral kernel.
PUBLISHED = ("vp", "ve", "discrete_betas")

__all__ = ["KERNELS", "ancestral", "as_predictor", "reverse_diffusion"]


def _noisy(chain: Chain, numbers: Any, name: str) -> Step:
    """The step ``x_mean' = a x' + b out'``, ``x = x_mean + s z`` of ``numbers = (t, a, b, s)``."""

    def apply(noise: jax.Array, x: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        t, a, b, spread = at(numbers, i)
        mean = chain.term.combine(x, a, (b, chain.term.output(x, t)))
        return mean + cast_coefficient(spread, x) * noise, mean

    return Step(chain.normal, apply, jnp.asarray(chain.steps, jnp.int32), name)


def reverse_diffusion(chain: Chain) -> Step:
    """The reverse-diffusion predictor, equation (1): one call of the field."""
    a, b = chain.term.conversion(chain.first, "score")
    variance = chain.noise_std**2
    numbers = (chain.first.t, 2 - chain.decay + variance * a, variance * b, chain.noise_std)
    return _noisy(chain, numbers, "reverse_diffusion")


def ancestral(chain: Chain) -> Step:
    """The ancestral predictor, equation (2): one call of the field.

    Raises:
      ValueError: a process other than vp, ve and discrete betas.
    """
    checks.one_of("kind of process for ancestral sampling", chain.sde.kind, PUBLISHED)
    a, b = chain.term.conversion(chain.first, "score")
    variance, decay, spread = chain.noise_std**2, chain.decay, chain.noise_std
    if chain.sde.kind == "ve":
        spread = spread * chain.sigma_next / chain.sigma
    numbers = (chain.first.t, (1 + variance * a) / decay, variance * b / decay, spread)
    return _noisy(chain, numbers, "ancestral")


KERNELS: dict[str, Callable[[Chain], Step]] = {
    "reverse_diffusion": reverse_diffusion,
    "ancestral": ancestral,
}


def as_predictor(solver: GridSolver) -> Callable[[Chain], Step]:
    """Lift a one-step solver of ours into a predictor, ``x_mean`` its deterministic part.

    Args:
      solver: a ``GridSolver`` without history, such as ``ddim()`` or ``Heun()``. Where its noise
        does not come last (churn), ``x_mean`` is the state itself.

    Returns:
      A function of a chain that gives the step ``(key, x, i) -> (x, x_mean)``.

    Raises:
      TypeError: another kind of solver.
      ValueError: when built, a solver with history, or any but ``EulerMaruyama`` on the published
        grid, where steps lead to no level.
    """
    if not issubclass(type(solver), GridSolver):
        raise TypeError(
            f"predictor is {type(solver).__name__}; expected a solver of jaxgen's own (a "
            "GridSolver), a name, or a function of a chain"
        )
    name = solver.name

    def build(chain: Chain) -> Step:
        if isinstance(solver, EulerMaruyama):
            return _noisy(chain, reverse_step(chain.term, chain.first, chain.h), "euler_maruyama")
        if chain.last is None:
            raise ValueError(
                'grid "score_sde" has steps of fixed length, for euler_maruyama, '
                f'{", ".join(KERNELS)}; {name} needs a grid of levels such as "time"'
            )
        if solver.depth > 1:
            raise ValueError(
                f"solver {name} keeps a history and so is no predictor of one step; expected one "
                f"such as ddim, heun, euler_maruyama, {' or '.join(KERNELS)} with a corrector"
            )
        # A chain's indices rise with time.
        numbers = jax.tree.map(lambda v: v[::-1], tabulate(chain.term, solver))
        calls = solver.calls(chain.term, numbers)

        def blank(x: jax.Array) -> Any:
            return solver.start(chain.term, x)

        spreads = solver.additive_noise(numbers)
        if spreads is not None:

            def apply(noise: Any, x: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
                mean, _ = solver.advance(chain.term, at(numbers, i), None, x, blank(x))
                return mean + cast_coefficient(at(spreads, i), x) * noise, mean

            return Step(chain.normal, apply, calls, name)

        def whole(noise: Any, x: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
            drawn = None if noise is None else (jnp.ones(()), noise)
            x, _ = solver.advance(chain.term, at(numbers, i), drawn, x, blank(x))
            return x, x

        def draw(key: jax.Array, x: jax.Array) -> Any:
            return chain.normal(key, x) if solver.is_noisy else None

        return Step(draw, whole, calls, name)

    return build
