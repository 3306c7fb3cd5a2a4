"""Error against field evaluations for every named solver, and the time per sample.

The law is a 16-dimensional mixture of four Gaussians under the vp process, between log(alpha/sigma)
= -5 and 3 (the one on which DPM-Solver-v3 is compared elsewhere in the library), its noise field in
closed form. Deterministic solvers are judged by the root mean square distance, in float64, to an
adaptive solve of order 8 from the same noise; the baseline is the better of ``ddim`` and ``heun``
with at most as many evaluations. DPM-Solver-v3 has its statistics from 1024 draws of the data, a
cost that is not counted. Stochastic solvers are judged by the sliced Wasserstein distance of 4096
samples to exact draws, against Euler-Maruyama. Each solver runs on its own default grid.

``python -m benchmarks.solvers FILE.png`` runs the first part in full and draws it.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Result, compare
from jaxgen import metrics, process, score, solve

DIM, SAMPLES, DRAWS = 16, 512, 4096
COUNTS = (5, 8, 10, 12, 15, 20, 50)
LAMBDAS = (-5.0, 3.0)
# Steps within a number of evaluations, where it is not one a step.
STEPS = {
    "heun": lambda n: n // 2,
    "heun_time": lambda n: (n + 1) // 2,
    "dpm_2": lambda n: n // 2,
    "dpmpp_2s": lambda n: n // 2,
    "dpm_3": lambda n: n // 3,
}
BASELINES = ("ddim", "heun")
QUICK = (*BASELINES, "dpmpp_2m", "unipc", "euler_maruyama", "dpmpp_2m_sde")
# Their published kernels need more steps than are compared here.
LEFT_OUT = ("ancestral", "reverse_diffusion")


class Problem(NamedTuple):
    """The law and its flow, in the dtype of the moment."""

    sde: process.LinearSDE
    mixture: score.closed_form.ClosedForm
    x_init: jax.Array
    ends: tuple[jax.Array, jax.Array]
    data: np.ndarray


def problem(samples: int = SAMPLES) -> Problem:
    rng = np.random.default_rng(0)
    means = rng.normal(0, 0.5, (4, DIM))
    variances = np.tile(np.geomspace(0.01, 4, DIM), (4, 1))
    data = means[rng.integers(0, 4, 1024)] + np.sqrt(variances[0]) * rng.normal(size=(1024, DIM))
    sde = process.vp()
    start, end = (sde.inverse_log_snr(2 * lam) for lam in LAMBDAS)
    x_init = sde.sigma(start) * np.random.default_rng(1).normal(size=(samples, DIM))
    mixture = score.closed_form.mixture(sde, np.full(4, 0.25), means, variances)
    dtype = jnp.result_type(float)
    return Problem(sde, mixture, x_init.astype(dtype), (start, end), data.astype(dtype))


def _sample(case: Problem, key: jax.Array, **options: Any) -> solve.Sample:
    start, end = case.ends
    options = {"x_init": case.x_init, **options}
    shape = options["x_init"].shape
    return solve.sample(
        key, case.mixture.noise, case.sde, shape, t_start=start, t_end=end, **options
    )


def reference(case: Problem) -> jax.Array:
    """The flow's end states, from an adaptive solver that shares nothing with ours."""
    controller = diffrax.PIDController(rtol=1e-9, atol=1e-11)

    @jax.jit
    def run(x_init):
        return _sample(
            case, jax.random.key(0), x_init=x_init, solver=diffrax.Dopri8(), controller=controller
        ).x

    return run(case.x_init)


def names(*, quick: bool = False) -> tuple[list[str], list[str]]:
    """The deterministic and the stochastic solvers; a few of them if quick."""
    kinds: tuple[list[str], list[str]] = [], []
    for name, entry in solve.SOLVERS.items():
        if name in LEFT_OUT or entry.make is None or (quick and name not in QUICK):
            continue
        is_noisy = name == "euler_maruyama" or getattr(entry.make(), "is_noisy", False)
        kinds[is_noisy].append(name)
    return kinds


def _steps(name: str, count: int) -> int:
    return STEPS.get(name, lambda n: n)(count)


def _ends(
    name: str, solver: Any, counts: tuple[int, ...], case: Problem
) -> dict[int, tuple[Any, Any]]:
    """End states and evaluations for each count, in one compilation."""

    @jax.jit
    def run(case: Problem) -> dict[int, tuple[Any, Any]]:
        outs = {
            n: _sample(case, jax.random.key(0), solver=solver, steps=_steps(name, n))
            for n in counts
            if _steps(name, n) > 0
        }
        return {n: (out.x, out.nfe) for n, out in outs.items()}

    return run(case)


def _dpmv3(case: Problem) -> Any:
    """DPM-Solver-v3 with statistics of the field at 1024 draws of the data."""
    start, end = case.ends
    statistics = solve.estimate_statistics(
        jax.random.key(3), case.mixture.noise, case.sde, case.data, t_start=start, t_end=end
    )
    return solve.dpmv3(statistics)


def errors(
    counts: tuple[int, ...], *, quick: bool = False
) -> dict[str, dict[int, tuple[int, float]]]:
    """For each deterministic solver and count: evaluations spent, and the error."""
    with jax.enable_x64(True):
        case = problem()
        exact = reference(case)
        found: dict[str, dict[int, tuple[int, float]]] = {}
        solvers: dict[str, Any] = {name: name for name in names(quick=quick)[0]}
        if not quick:
            solvers["dpmv3"] = _dpmv3(case)
        for name, solver in solvers.items():
            found[name] = {
                n: (int(nfe), float(jnp.sqrt(jnp.mean((x - exact) ** 2))))
                for n, (x, nfe) in _ends(name, solver, counts, case).items()
            }
    for name, by_count in found.items():
        assert all(nfe <= n for n, (nfe, _) in by_count.items()), f"{name} takes more calls"
    return found


def _judged(case: str, ours: float, peer: float, peer_name: str, unit: str, note: str) -> Result:
    return Result(
        bench="solvers",
        case=case,
        ours=ours,
        peer=peer,
        peer_name=peer_name,
        unit=unit,
        ratio=peer / ours,
        note=note,
    )


def _of_errors(found: dict[str, dict[int, tuple[int, float]]]) -> Iterator[Result]:
    for name, by_count in found.items():
        if name in BASELINES:
            continue
        for count, (nfe, error) in by_count.items():
            peer = min(BASELINES, key=lambda b: found[b][count][1])
            note = f"{nfe} evaluations against {found[peer][count][0]}"
            unit = "RMSE"
            yield _judged(f"{name}_{count}", error, found[peer][count][1], peer, unit, note)


def _of_laws(counts: tuple[int, ...], *, quick: bool) -> Iterator[Result]:
    """The stochastic solvers."""
    case = problem(DRAWS)
    key_exact, key_other, key_run, key_slice = jax.random.split(jax.random.key(2), 4)
    exact, other = (
        case.mixture.sample(k, (DRAWS, DIM), case.ends[1]) for k in (key_exact, key_other)
    )
    distance = jax.jit(lambda x: metrics.sliced_wasserstein(key_slice, x, exact))
    floor = float(distance(other))
    found: dict[str, dict[int, float]] = {}
    for name in names(quick=quick)[1]:

        @jax.jit
        def run(case, name=name):
            return {n: _sample(case, key_run, solver=name, steps=n).x for n in counts}

        found[name] = {n: float(distance(x)) for n, x in run(case).items()}
    for name, by_count in found.items():
        if name == "euler_maruyama":
            continue
        for count, error in by_count.items():
            note = f"two exact draws are {floor:.3g} apart"
            peer = found["euler_maruyama"][count]
            unit = "sliced Wasserstein distance"
            yield _judged(f"{name}_{count}", error, peer, "euler_maruyama", unit, note)


def _of_times(quick: bool) -> Iterator[Result]:
    """Milliseconds for 256 samples of 20 evaluations."""
    case, key, count, batch = problem(256), jax.random.key(0), 20, 256
    peer = jax.jit(lambda c: _sample(c, key, solver="ddim", steps=count).x)
    deterministic, stochastic = names(quick=quick)
    for name in [*deterministic, *stochastic]:
        if name == "ddim" or (quick and name not in ("dpmpp_2m", "unipc")):
            continue
        steps = _steps(name, count)
        ours = jax.jit(
            lambda c, name=name, steps=steps: _sample(c, key, solver=name, steps=steps).x
        )
        yield compare(
            "solvers",
            f"time_{name}",
            lambda ours=ours: ours(case),
            lambda: peer(case),
            peer_name="ddim",
            note=f"{count} evaluations at most, {batch} samples",
        )


def run(*, quick: bool) -> Iterator[Result]:
    counts = (10,) if quick else COUNTS
    yield from _of_errors(errors(counts, quick=quick))
    yield from _of_laws(counts, quick=quick)
    yield from _of_times(quick)


# --- the picture ----------------------------------------------------------------------------------

COLOURS = {
    "ddim": "black",
    "heun": "black",
    "heun_time": "tab:gray",
    "euler_time": "tab:gray",
    "dpmv3": "tab:purple",
    "dpm": "tab:blue",
    "dpmpp": "tab:orange",
    "unipc": "tab:red",
    "deis": "tab:green",
}
SINGLE = ("dpm_2", "dpm_3", "dpmpp_2s")


def _style(name: str) -> dict[str, Any]:
    family = max((f for f in COLOURS if name.startswith(f)), key=len, default=None)
    is_third = "3" in name or name in ("deis", "unipc")  # their default orders
    marker = "s" if name in SINGLE else "^" if is_third else "o"
    line = ":" if name in SINGLE else "--" if name.startswith(("heun", "deis")) else "-"
    colour = None if family is None else COLOURS[family]
    return {"color": colour, "marker": marker, "linestyle": line, "markersize": 4}


def draw(path: Path, found: dict[str, dict[int, tuple[int, float]]]) -> None:
    """Error against evaluations, both on a logarithmic scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    order = sorted(found, key=lambda name: -list(found[name].values())[-1][1])
    for name in order:
        nfe, error = zip(*found[name].values(), strict=True)
        axes.loglog(nfe, error, label=name, linewidth=1.4, **_style(name))
    axes.set_xticks(COUNTS, [str(n) for n in COUNTS])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("evaluations of the field")
    axes.set_ylabel("root mean square error of a sample")
    axes.set_title("16-dimensional mixture, closed-form field, same noise")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path)


def main(path: Path) -> None:
    found = errors(COUNTS)
    for result in _of_errors(found):
        print(result.to_line(), flush=True)
    draw(path, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
