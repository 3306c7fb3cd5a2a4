"""The fast samplers against ``diffusers`` (torch, eager): same knots, field and noise.

Three fields: a 16-dimensional Gaussian mixture in closed form, an MLP and a small convolutional
network, each written in both libraries, the networks with the same weights. The schedule is the
linear one of 1000 betas with the peer's own knots, down to sigma = 0. Ours is one compiled call,
its compile time apart; the peer's is the loop of its pipelines, ``set_timesteps`` included, on one
thread or on all, whichever is faster.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Missing, Result, compare, compile_seconds, first_call
from jaxgen import process, score, solve

GOAL = 2.0
N_TRAIN = 1000
WIDTH, CHANNELS = 256, 32


class Case(NamedTuple):
    """A field in both libraries: ``(x, t) -> noise``, and the batch it is timed on."""

    shape: tuple[int, ...]
    ours: Callable[[jax.Array, jax.Array], jax.Array]
    peer: Callable[[Any, Any], Any]


def _betas() -> np.ndarray:
    return np.linspace(1e-4, 0.02, N_TRAIN)


# --- the fields -----------------------------------------------------------------------------------


def _mixture() -> Case:
    import torch

    rng = np.random.default_rng(0)
    means = 2 * rng.normal(size=(4, 16)).astype(np.float32)
    weights, variances = np.full(4, 0.25, np.float32), np.full((4, 16), 0.25, np.float32)
    ours = score.closed_form.mixture(process.discrete_betas(_betas()), weights, means, variances)
    products = torch.from_numpy(np.cumprod(1 - _betas()))
    m, w, v = (torch.from_numpy(a) for a in (means, weights, variances))

    def peer(x, t):
        alpha = products[t].sqrt().float()
        sigma = (1 - products[t]).sqrt().float()
        spread = alpha**2 * v + sigma**2
        apart = x[:, None] - alpha * m
        log_prob = -0.5 * (apart**2 / spread + torch.log(spread)).sum(-1) + torch.log(w)
        return sigma * torch.einsum("bk,bkd->bd", torch.softmax(log_prob, 1), apart / spread)

    return Case((256, 16), ours.noise, peer)


class _MLP(nn.Module):
    @nn.compact
    def __call__(self, x, t):
        size = x.shape[-1]
        x = jnp.concatenate([x, t[:, None] / N_TRAIN], axis=1)
        for _ in range(3):
            x = nn.silu(nn.Dense(WIDTH)(x))
        return nn.Dense(size)(x)


def _mlp(batch: int = 256) -> Case:
    import torch

    shape = (batch, 16)
    net = _MLP()
    variables = net.init(jax.random.key(0), jnp.zeros(shape), jnp.zeros(shape[0]))
    layers = []
    for i in range(4):
        given = variables["params"][f"Dense_{i}"]
        layer = torch.nn.Linear(*given["kernel"].shape)
        _copy(layer, np.transpose(given["kernel"]), given["bias"])
        layers += [layer, torch.nn.SiLU()]
    body = torch.nn.Sequential(*layers[:-1])

    def peer(x, t):
        return body(torch.cat([x, (t / N_TRAIN).expand(len(x), 1)], 1))

    return Case(shape, functools.partial(net.apply, variables), peer)


class _Conv(nn.Module):
    @nn.compact
    def __call__(self, x, t):
        channels = x.shape[-1]
        time = jnp.broadcast_to(t[:, None, None, None] / N_TRAIN, (*x.shape[:-1], 1))
        x = jnp.concatenate([x, time], axis=-1)
        for _ in range(2):
            x = nn.silu(nn.Conv(CHANNELS, (3, 3))(x))
        return nn.Conv(channels, (3, 3))(x)


def _conv() -> Case:
    """Channels last for ours, first for the peer: each library's own habit."""
    import torch

    shape = (32, 16, 16, 1)
    net = _Conv()
    variables = net.init(jax.random.key(0), jnp.zeros(shape), jnp.zeros(shape[0]))
    layers = []
    for i in range(3):
        given = variables["params"][f"Conv_{i}"]
        layer = torch.nn.Conv2d(*given["kernel"].shape[2:], 3, padding=1)
        _copy(layer, np.transpose(given["kernel"], (3, 2, 0, 1)), given["bias"])
        layers += [layer, torch.nn.SiLU()]
    body = torch.nn.Sequential(*layers[:-1])

    def peer(x, t):
        time = (t / N_TRAIN).expand(len(x), 1, *x.shape[2:])
        return body(torch.cat([x, time], 1))

    return Case(shape, functools.partial(net.apply, variables), peer)


def _copy(layer, weight, bias) -> None:
    import torch

    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.array(weight)))
        layer.bias.copy_(torch.from_numpy(np.array(bias)))


# --- the samplers ---------------------------------------------------------------------------------


def _solvers() -> dict[str, tuple[Any, Callable[[], Any]]]:
    """Ours, and the peer's scheduler with the same coefficients."""
    import diffusers

    def make(kind, **options):
        return functools.partial(kind, trained_betas=_betas(), **options)

    return {
        "dpmpp_2m": (solve.dpmpp(2), make(diffusers.DPMSolverMultistepScheduler, solver_order=2)),
        "dpmpp_3m": (
            solve.dpmpp(3, third="official"),
            make(diffusers.DPMSolverMultistepScheduler, solver_order=3),
        ),
        "unipc_2": (solve.unipc(2), make(diffusers.UniPCMultistepScheduler, solver_order=2)),
        "unipc_3": (solve.unipc(3), make(diffusers.UniPCMultistepScheduler, solver_order=3)),
    }


def _peer_sample(case: Case, scheduler, x: np.ndarray, steps: int) -> np.ndarray:
    import torch

    with torch.inference_mode():
        scheduler.set_timesteps(steps)
        state = torch.from_numpy(x)
        for t in scheduler.timesteps:
            state = scheduler.step(case.peer(state, t), t, state, return_dict=False)[0]
        return state.numpy()


def _best_threads(peer: Callable[[], Any]) -> int:
    """Give the peer one thread or all, whichever serves it better."""
    import torch

    seconds = {}
    for threads in {1, len(os.sched_getaffinity(0))}:
        torch.set_num_threads(threads)
        peer()
        seconds[threads] = min(first_call(peer) for _ in range(3))
    best = min(seconds, key=lambda n: seconds[n])
    torch.set_num_threads(best)
    return best


def _measure(name: str, case: Case, label: str, steps: int, *, quick: bool) -> Result:
    import diffusers
    import torch

    solver, make_scheduler = _solvers()[label]
    scheduler = make_scheduler()
    scheduler.set_timesteps(steps)
    times = np.append(scheduler.timesteps.numpy(), -1).astype(np.float32)
    sde, key = process.discrete_betas(_betas()), jax.random.key(1)
    x = np.random.default_rng(1).normal(size=case.shape).astype(np.float32)
    is_image = len(case.shape) == 4
    x_peer = np.ascontiguousarray(np.moveaxis(x, -1, 1)) if is_image else x

    def make_ours():
        return lambda x: (
            solve.sample(key, case.ours, sde, case.shape, solver=solver, grid=times, x_init=x).x
        )

    ours = jax.jit(make_ours())
    start = jnp.asarray(x)
    peer = functools.partial(_peer_sample, case, scheduler, x_peer, steps)
    threads = _best_threads(peer)
    result = compare(
        "against_diffusers",
        f"{label}_{steps}_{name}",
        lambda: ours(start),
        peer,
        peer_name=f"diffusers {diffusers.__version__} on torch {torch.__version__}",
        goal=GOAL,
    )
    theirs = np.moveaxis(peer(), 1, -1) if is_image else peer()
    gap = np.abs(np.asarray(ours(start)) - theirs).max() / np.abs(theirs).max()
    seconds = compile_seconds(make_ours, start, times=1 if quick else 3)
    note = (
        f"compiled in {seconds:.2f} s, the peer runs eagerly on {threads} threads, "
        f"largest difference {gap:.1e} of the largest entry"
    )
    return dataclasses.replace(result, note=note)


def run(*, quick: bool) -> Iterator[Result | Missing]:
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        yield Missing("against_diffusers", "all", error.name or "diffusers")
        return
    fields: dict[str, Callable[[], Case]] = {"mixture": _mixture, "mlp": _mlp}
    if not quick:
        fields |= {"mlp_of_16": functools.partial(_mlp, 16), "conv": _conv}
    labels = ("dpmpp_2m", "unipc_3") if quick else tuple(_solvers())
    for name, make in fields.items():
        case = make()
        for label in labels:
            for steps in (10,) if quick else (10, 20):
                yield _measure(name, case, label, steps, quick=quick)
