"""The fast samplers against ``diffusers``: same field, noise, knots and random numbers.

``golden_diffusers.json`` is made by ``benchmarks/golden/diffusers_solvers.py``; its ``provenance``
has the versions. The peer's tables and coefficients are float32, so that the two sides part by a
few float32 roundings, enlarged by the field.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgen import process, score, solve
from jaxgen.solve import thresholding

GOLDEN = json.loads((Path(__file__).parent / "golden_diffusers.json").read_text())
BETAS, MIXTURE = GOLDEN["betas"], GOLDEN["mixture"]
SHAPE = (4, 4)
X_INIT = np.reshape(GOLDEN["x_init"], SHAPE).astype(np.float32)
NOISES = np.reshape(GOLDEN["noises"], (-1, *SHAPE)).astype(np.float32)
# Of the largest entry. Seen: up to 4e-6, and 2e-5 for DEIS of order 3 in 20 steps, whose closed
# integrals cancel in the peer's float32 (ours in float64 is as far from it).
TOLERANCE = 3e-5
# Two or three steps enlarge our own rounding: to 2e-4 for noise prediction with h = 4.8.
WIDE = {("DPMSolverSinglestepScheduler", "dpmsolver", "5"), ("HeunDiscreteScheduler", None, "3")}
WIDE_TOLERANCE = 1e-3


def _sde():
    """The process of the peer's own table, cumulative products rounded to float32."""
    rates = np.linspace(BETAS["first"], BETAS["last"], BETAS["n"]).astype(np.float32)
    products = np.cumprod((np.float32(1) - rates).astype(np.float64)).astype(np.float32)
    products = np.concatenate([[1.0], products.astype(np.float64)])
    return process.discrete_betas(1 - products[1:] / products[:-1])


def _ours(name, options):
    """Our solver for a scheduler's options."""
    order = options.get("solver_order")
    second = {"midpoint": "half_phi", "heun": "taylor"}.get(options.get("solver_type"), "half_phi")
    kind = options.get("algorithm_type", "").removeprefix("sde-")
    if name == "HeunDiscreteScheduler":
        return "heun"
    if name == "DEISMultistepScheduler":
        return solve.deis(order)
    if name == "DPMSolverSinglestepScheduler":
        return {"dpmsolver": "dpm_2", "dpmsolver++": "dpmpp_2s"}[kind]
    if name == "UniPCMultistepScheduler":
        return solve.unipc(
            order,
            variant=options["solver_type"],
            corrector="disable_corrector" not in options,
            kind="data" if options.get("predict_x0", True) else "noise",
        )
    more = {"eta": 1.0} if options["algorithm_type"].startswith("sde-") else {}
    # Where it is not given, both sides lower the last orders below 15 steps.
    more["lower_order_final"] = options.get("lower_order_final")
    make = {"dpmsolver": solve.dpm, "dpmsolver++": solve.dpmpp}[kind]
    return make(order, second=second, third="official", **more)


def _label(case):
    options = (f"{k}={v}" for k, v in case["options"].items() if k != "disable_corrector")
    off = ["no corrector"] if "disable_corrector" in case["options"] else []
    return " ".join([case["solver"].removesuffix("Scheduler"), *options, *off])


def _is_noisy(case):
    return case["options"].get("algorithm_type", "").startswith("sde-")


def _sampler(case, steps, sde):
    """``x_init -> (x, nfe)``."""
    grid = np.asarray(GOLDEN["grids"][case["runs"][steps]["grid"]]["time"], np.float32)
    is_v = case["options"].get("prediction_type") == "v_prediction"
    mixture = score.closed_form.mixture(sde, *(np.asarray(v) for v in MIXTURE.values()))
    field, prediction = (mixture.v, "v") if is_v else (mixture.noise, "noise")
    if case["options"].get("thresholding"):
        ratio, limit = (
            case["options"][k] for k in ("dynamic_thresholding_ratio", "sample_max_value")
        )
        cut = thresholding.dynamic_threshold(ratio, limit=limit)
        field, prediction = thresholding.thresholded(field, sde, cut), "data"
    sample = functools.partial(
        solve.sample,
        jax.random.key(0),
        field,
        sde,
        solver=_ours(case["solver"], case["options"]),
        grid=grid,
        prediction=prediction,
    )

    def one(x, noises):
        def path(key, event, t0, t1):
            return solve.GridPath(key, event.shape, event.dtype, len(noises), drawn=noises)

        return sample(shape=SHAPE[1:], x_init=x, event_ndim=1, brownian=path)

    def run(x):
        if not _is_noisy(case):
            out = sample(shape=SHAPE, x_init=x)
            return out.x, out.nfe
        out = jax.vmap(one, in_axes=(0, 1))(x, NOISES[: len(grid) - 1])
        return out.x, out.nfe[0]

    return run


def _group(case, steps):
    """Which runs are compiled together: deterministic ones, some noisy ones, and the slow rest."""
    options = case["options"]
    low = "final_sigmas_type" in options
    if not _is_noisy(case):
        can_end_at_zero = options.get("algorithm_type") == "dpmsolver++" or (
            options.get("solver_type") == "bh2" and options.get("predict_x0", True)
        )
        is_plain = (low and can_end_at_zero) or options.get("solver_order") == 1
        is_heun = case["solver"] == "HeunDiscreteScheduler"
        is_few = steps == "5" if is_heun else steps in ("8", "9") and not is_plain
        return "ode" if is_few else f"slow_{steps}"
    # These go through diffeqsolve, which compiles for longer.
    is_few = steps == "8" and options["solver_order"] > 1 and not low
    return "sde" if is_few and options["solver_type"] == "midpoint" else f"slow_sde_{steps}"


RUNS = {
    f"{_label(case)} {steps}": (case, steps) for case in GOLDEN["cases"] for steps in case["runs"]
}


@functools.cache
def _ends(group):
    """The end states of a group's runs."""
    sde = _sde()
    runs = {k: _sampler(*run, sde) for k, run in RUNS.items() if _group(*run) == group}
    return jax.jit(lambda x: {k: run(x) for k, run in runs.items()})(X_INIT)


def _param(name):
    is_slow = _group(*RUNS[name]).startswith("slow")
    return pytest.param(name, marks=[pytest.mark.slow] if is_slow else [], id=name)


@pytest.mark.parametrize("name", [_param(name) for name in RUNS])
def test_end_states_are_those_of_diffusers(name):
    case, steps = RUNS[name]
    x, nfe = _ends(_group(case, steps))[name]
    expected = np.reshape(case["runs"][steps]["end"], SHAPE)
    error = np.abs(x - expected).max() / np.abs(expected).max()
    is_wide = (case["solver"], case["options"].get("algorithm_type"), steps) in WIDE
    assert error < (WIDE_TOLERANCE if is_wide else TOLERANCE), error
    calls = int(steps)
    if case["solver"] == "HeunDiscreteScheduler":
        calls = 2 * calls - 1
    if case["solver"] == "DPMSolverSinglestepScheduler" and "final_sigmas_type" in case["options"]:
        calls -= 1  # the peer's last call is for an empty interval
    assert int(nfe) == calls


def test_levels_are_those_of_diffusers():
    times = np.concatenate([grid["time"] for grid in GOLDEN["grids"].values()])
    expected = np.concatenate([grid["log_snr"] for grid in GOLDEN["grids"].values()])
    expected = np.where(np.equal(expected, None), np.inf, expected).astype(float)
    np.testing.assert_allclose(_sde().log_snr(times), expected, atol=3e-5)
