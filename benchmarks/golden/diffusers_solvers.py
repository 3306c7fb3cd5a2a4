"""Golden values of the fast samplers from ``diffusers``, for ``tests/solve/test_solve_golden.py``.

Runs the schedulers of ``diffusers`` on the noise field of a Gaussian mixture in closed form, from
fixed noise, and writes the knots and the end states:

    pip install -r benchmarks/golden/diffusers_requirements.txt
    python benchmarks/golden/diffusers_solvers.py [FILE.json]

The field is called at the noise level of the scheduler's own table, in float64, so that times which
the scheduler rounds to integers do not matter. Its tables and coefficients are float32. What the
schedulers do with the knots, as read in release 0.42.1:

- ``timestep_spacing="linspace"``: ``round(linspace(0, n - 1, steps + 1))`` downwards without the
  last, then the final level: 0 (``final_sigmas_type="zero"``), or that of time 0
  (``"sigma_min"``, the only one for noise prediction; DEIS has no other).
- DPM-Solver multistep: the last step is of order 1 where the final level is 0, or under
  ``lower_order_final`` below 15 steps; the one before it is then of order 2 at most in the latter
  case only. DEIS: likewise, from 15 steps full order to the end.
- UniPC: order ``min(order, steps left)`` whatever the number of steps; the corrector runs at each
  knot but the first, on the output that the next step uses anyway.
- Singlestep: the inner points are knots of the table. With ``steps`` odd and levels equally spaced
  in log they lie in the middle, and a step of order 1 ends: to 0, or over an empty interval.
- Heun: ``linspace(0, n - 1, steps)``, levels interpolated linearly in sigma/alpha, then 0.

``sde-dpmsolver++`` of order 3 as released subtracts one half where the exponential integral adds it
(the factor of D2 is (1 - exp(-2h) - 2h) / (2h)^2 + 1/2): the sign is mended here, in a subclass.
UniPC ``bh1`` with a final level 0 returns NaN (infinity times an absent difference).
"""

import datetime
import json
import sys
import warnings
from pathlib import Path

import diffusers
import numpy as np
import torch

OUT = Path(__file__).parents[2] / "tests" / "solve" / "golden_diffusers.json"
STEPS = (5, 8, 10, 20)
N_TRAIN = 1000
# Halves, so that every reader of the file has the same numbers.
MIXTURE = {
    "weights": [0.25, 0.25, 0.5],
    "means": [[1.5, -0.5, 0.0, 2.0], [-1.0, 1.0, 0.5, -1.5], [0.0, -1.5, 1.0, 0.5]],
    "variances": [[0.0625, 0.25, 0.5, 0.125], [0.25, 0.125, 0.0625, 0.5], [0.5, 0.25, 0.25, 0.125]],
}


class Mended(diffusers.DPMSolverMultistepScheduler):
    """``sde-dpmsolver++`` of order 3 with the sign of its last term mended."""

    def multistep_dpm_solver_third_order_update(self, model_output_list, *args, sample, noise):
        """Order 3, mended."""
        x_t = super().multistep_dpm_solver_third_order_update(
            model_output_list, *args, sample=sample, noise=noise
        )
        i = self.step_index
        alphas, sigmas = self._sigma_to_alpha_sigma_t(self.sigmas[i - 2 : i + 2])
        h_before, h_last, h = torch.diff(torch.log(alphas) - torch.log(sigmas))
        m0, m1, m2 = model_output_list[-1], model_output_list[-2], model_output_list[-3]
        first, second = (m0 - m1) * h / h_last, (m1 - m2) * h / h_before
        d2 = (first - second) * h / (h_last + h_before)
        return x_t + alphas[-1] * d2


def noise_field(x: torch.Tensor, ratio: float) -> torch.Tensor:
    """Expected noise of the mixture at ``ratio = sigma / alpha``, in float64."""
    weights, means, variances = (
        torch.tensor(MIXTURE[name], dtype=torch.float64)
        for name in ("weights", "means", "variances")
    )
    alpha = (1 + ratio**2) ** -0.5
    sigma = ratio * alpha
    spread = alpha**2 * variances + sigma**2
    apart = x.to(torch.float64)[:, None] - alpha * means
    log_prob = -0.5 * (apart**2 / spread + torch.log(spread)).sum(-1) + torch.log(weights)
    responsibility = torch.softmax(log_prob, dim=1)
    return sigma * torch.einsum("bk,bkd->bd", responsibility, apart / spread)


def betas() -> np.ndarray:
    return np.linspace(1e-4, 0.02, N_TRAIN)


def cumulative(scheduler) -> np.ndarray:
    """The scheduler's float32 table, which a reader rebuilds in NumPy: checked here."""
    rebuilt = np.cumprod((np.float32(1) - betas().astype(np.float32)).astype(np.float64))
    table = scheduler.alphas_cumprod.numpy()
    assert (rebuilt.astype(np.float32) == table).all(), "the table cannot be rebuilt"
    return table.astype(np.float64)


def time_of(ratio: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Time of each level, log alpha being linear between integers; -1 at level 0."""
    log_alpha = np.concatenate([[0.0], 0.5 * np.log(products)])
    wanted = -0.5 * np.log1p(np.asarray(ratio, np.float64) ** 2)
    time = np.interp(-wanted, -log_alpha, np.arange(-1.0, len(products)))
    # A level of the table is an integer up to float32.
    return np.where(np.abs(time - np.round(time)) < 2e-4, np.round(time), time) + 0.0


def cases():
    """``(class name, options, step counts)``."""
    multi = "DPMSolverMultistepScheduler"
    low = {"final_sigmas_type": "sigma_min"}
    for order, kind in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")):
        base = {"solver_order": order, "solver_type": kind}
        yield multi, {"algorithm_type": "dpmsolver", **base, **low}, STEPS
        yield multi, {"algorithm_type": "dpmsolver++", **base}, STEPS
        yield multi, {"algorithm_type": "dpmsolver++", **base, **low}, STEPS
        sde = {"algorithm_type": "sde-dpmsolver++", **base}
        name = "Mended" if order == 3 else multi
        yield name, sde, STEPS
        yield name, {**sde, **low}, STEPS
    full = {"algorithm_type": "dpmsolver++", "lower_order_final": False, **low}
    yield multi, {"solver_order": 3, **full}, (8,)
    two = {"algorithm_type": "dpmsolver++", "solver_order": 2}
    yield multi, {**two, "prediction_type": "v_prediction"}, (8,)
    clip = {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 2.0}
    yield multi, {**two, **clip}, (8,)
    for order in (1, 2, 3):
        base = {"solver_order": order}
        yield "DEISMultistepScheduler", base, STEPS
        yield "UniPCMultistepScheduler", {**base, "solver_type": "bh2"}, STEPS
        for kind in ("bh1", "bh2"):
            for data in (True, False):
                options = {**base, "solver_type": kind, "predict_x0": data, **low}
                yield "UniPCMultistepScheduler", options, STEPS if data else (8, 20)
        off = {**base, "solver_type": "bh2", "disable_corrector": list(range(20))}
        yield "UniPCMultistepScheduler", off, (8, 20)
    single = {"solver_order": 2, "use_exponential_sigmas": True, "lower_order_final": True}
    yield "DPMSolverSinglestepScheduler", {**single, "algorithm_type": "dpmsolver++"}, (5, 9, 21)
    noise = {**single, "algorithm_type": "dpmsolver", **low}
    yield "DPMSolverSinglestepScheduler", noise, (5, 9, 21)
    yield "HeunDiscreteScheduler", {}, (3, 5, 10)


def solve(scheduler, x: torch.Tensor, noises: np.ndarray) -> torch.Tensor:
    """The end state from ``x``, an event of ``(4, 1)``: thresholding takes two axes or more."""
    ratio = scheduler.sigmas.to(torch.float64)
    exploding = isinstance(scheduler, diffusers.HeunDiscreteScheduler)  # its state is x / alpha
    if exploding:
        x = x * (1 + float(ratio[0]) ** 2) ** 0.5
    stochastic = getattr(scheduler.config, "algorithm_type", "").startswith("sde")
    is_v = scheduler.config.prediction_type == "v_prediction"
    for i, t in enumerate(scheduler.timesteps):
        scale = (1 + float(ratio[i]) ** 2) ** 0.5 if exploding else 1.0
        out = noise_field(x[..., 0] / scale, float(ratio[i]))[..., None]
        if is_v:
            alpha = (1 + float(ratio[i]) ** 2) ** -0.5
            sigma = float(ratio[i]) * alpha
            out = alpha * out - sigma * (x - sigma * out) / alpha
        more = {"variance_noise": torch.from_numpy(noises[i])[..., None]} if stochastic else {}
        x = scheduler.step(out, t, x, **more).prev_sample
    return x


def knots(name: str, scheduler) -> np.ndarray:
    """The levels that a solver of ours has as knots."""
    ratio = scheduler.sigmas.numpy()
    if name == "HeunDiscreteScheduler":
        return np.concatenate([ratio[:1], ratio[1:-1:2], ratio[-1:]])
    if name == "DPMSolverSinglestepScheduler":
        ratio = np.concatenate([ratio[:-1:2], ratio[-1:]])
        # An empty last interval does nothing.
        return ratio[:-1] if abs(ratio[-1] / ratio[-2] - 1) < 1e-5 else ratio
    return ratio


def main(out: Path) -> None:
    rng = np.random.default_rng(7)
    x_init = np.round(rng.normal(size=(4, 4)), 6)
    noises = np.round(rng.normal(size=(max(STEPS), 4, 4)), 6)
    products, grids, entries = None, {}, []
    for name, options, step_counts in cases():
        entry = {"solver": name, "options": options, "runs": {}}
        for steps in step_counts:
            kind = Mended if name == "Mended" else getattr(diffusers, name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # its noise form is deprecated
                scheduler = kind(trained_betas=betas(), **options)
            products = cumulative(scheduler)
            scheduler.set_timesteps(steps)
            ratio = knots(name, scheduler).astype(np.float64)
            time = [float(f"{t:.9g}") for t in time_of(ratio, products)]
            grid = next((k for k, v in grids.items() if v["time"] == time), f"grid_{len(grids)}")
            log_snr = [float(f"{-2 * np.log(r):.9g}") if r > 0 else None for r in ratio]
            grids[grid] = {"time": time, "log_snr": log_snr}
            end = solve(scheduler, torch.from_numpy(x_init)[..., None], noises).numpy()
            assert np.isfinite(end).all(), (name, options, steps)
            entry["runs"][steps] = {"grid": grid, "end": [float(f"{v:.9g}") for v in end.ravel()]}
        entries.append(entry)
    found = {
        "provenance": {
            "script": "benchmarks/golden/diffusers_solvers.py",
            "date": datetime.date.today().isoformat(),
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "dtype": "tables and coefficients float32, field float64",
        },
        "betas": {"first": 1e-4, "last": 0.02, "n": N_TRAIN},
        "mixture": MIXTURE,
        "x_init": x_init.ravel().tolist(),
        "noises": noises.ravel().tolist(),
    }
    lines = [f'"{name}": {json.dumps(value)}' for name, value in found.items()]
    for name, table in (("grids", grids), ("cases", entries)):
        pairs = table.items() if isinstance(table, dict) else ((None, v) for v in table)
        body = ",\n".join(("" if k is None else f'"{k}": ') + json.dumps(v) for k, v in pairs)
        ends = "{}" if isinstance(table, dict) else "[]"
        lines.append(f'"{name}": {ends[0]}\n{body}\n{ends[1]}')
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(entries)} cases, {sum(len(e['runs']) for e in entries)} runs in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
