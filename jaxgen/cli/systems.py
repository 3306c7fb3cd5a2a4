"""``jaxgen systems``: the published systems in this library, as data.

This table is the source of the one in the readme; a test holds that one, the files and the claim
tests to it.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from jaxgen.cli.flags import parse

__all__ = ["SYSTEMS", "System", "run", "systems_table"]


class System(NamedTuple):
    """A row of the table.

    Attributes:
      name: the system, with its paper.
      where: files and folders below ``jaxgen/``.
      claim: the claim test, from the project's root.
      figure: what that test measures, in words and numbers.
    """

    name: str
    where: tuple[str, ...]
    claim: str
    figure: str


SYSTEMS = (
    System(
        "Score-SDE: score-based generative modelling through SDEs (arXiv 2011.13456)",
        ("process", "score", "solve", "guide/inpaint.py", "nets/ncsnpp.py", "train/recipes"),
        "tests/claims/test_score_sde.py",
        "variance 0.260 with a corrector against 0.273 without at 100 evaluations, truth 0.250",
    ),
    System(
        "STABLE-RPS: in defense of parameter sharing for model-compression (arXiv 2310.11611), "
        "with ROAST, HashedNets and pruning",
        ("share", "prune", "nets/budget.py", "train/recipes/sharing.py"),
        "tests/claims/test_stable_rps.py",
        "digits in 1/1000 of 84,480 weights: 89.3 % against 81.9 % for rewinding and 47.1 % for "
        "SynFlow; in 1/300: 93.5 % against 87.5 % for SynFlow, behind rewinding's 96.2 %",
    ),
    System(
        "DPM-Solver-v3: improved diffusion ODE solver with empirical model statistics (arXiv "
        "2310.13268), with DPM-Solver, DPM-Solver++, UniPC and DEIS",
        (
            "solve/dpm_solver_v3.py",
            "solve/statistics.py",
            "solve/exponential.py",
            "solve/multistep.py",
            "solve/singlestep.py",
            "train/recipes/statistics.py",
        ),
        "tests/claims/test_dpm_solver_v3.py",
        "error 0.44, 0.59, 0.50 and 0.51 of the best of DPM-Solver++ and UniPC at 5, 8, 10 and 12 "
        "evaluations on the 16-D mixture; 0.28 to 0.69 over six such laws",
    ),
    System(
        "USF and S^3: a unified sampling framework for solver searching (arXiv 2312.07243)",
        (
            "solve/schedule.py",
            "solve/usf.py",
            "solve/search.py",
            "solve/evolution.py",
            "solve/ranking.py",
            "train/recipes/schedules.py",
        ),
        "tests/claims/test_usf_s3.py",
        "5 evaluations, 600 scores: median 0.59 of the best of 36 plain solvers over 30 searches "
        "on five laws (at most 0.7 in 23, worst 0.83); guided by a predictor, 1.06 of evolution's",
    ),
    System(
        "MRS: a fast sampler for mean reverting diffusion (arXiv 2502.07856), with IR-SDE's tables",
        ("solve/mean_reverting.py", "process/ir_sde.py", "train/recipes/restoration.py"),
        "tests/claims/test_mr_sampler.py",
        "20 evaluations: W2 0.0036 against 0.0075 for posterior sampling with 100, RMSE 0.0014 "
        "against Euler's 0.0061, under constant rates; Euler under the tables' rates has 0.0007",
    ),
    System(
        "Denoising MCMC for accelerating diffusion-based generative models (arXiv 2209.14593)",
        ("mcmc", "score/levels.py", "nets/level_classifier.py"),
        "tests/claims/test_denoising_mcmc.py",
        "sliced Wasserstein distance at 10 evaluations of Heun's solver: 0.068 to 0.082 from the "
        "chain (first states: 1.14 more) against 0.377 to 0.385 from noise; from 16 on they meet",
    ),
    System(
        "FKC: Feynman-Kac correctors in diffusion: annealing, guidance and product of experts "
        "(arXiv 2503.02819)",
        (
            "smc/feynman_kac.py",
            "smc/feynman_kac_step.py",
            "smc/target.py",
            "train/recipes/steering.py",
        ),
        "tests/claims/test_feynman_kac_correctors.py",
        "guidance of scale 2.5: mean off by 0.002 with weights against 0.165 without; a mixture to "
        "the power 2: masses of the modes off by 0.012 against 0.265, log Z by 0.049",
    ),
    System(
        "PPG: state and parameter learning with PaRIS particle Gibbs (arXiv 2301.00900)",
        (
            "smc/filter.py",
            "smc/backward.py",
            "smc/conditional.py",
            "smc/paris.py",
            "smc/particle_gibbs.py",
            "smc/learning.py",
            "smc/oracle.py",
        ),
        "tests/claims/test_paris_particle_gibbs.py",
        "two states, N = 4: bias -0.410 (PaRIS), then -0.211, -0.098, -0.043, -0.021 over four "
        "sweeps; linear-Gaussian, N = 10: -0.88, then -0.04 after four; at equal work PaRIS and "
        "the first sweeps tie",
    ),
    System(
        "ISCV: several expectations from one sample by adaptive importance sampling and control "
        "variates (arXiv 2212.00568)",
        ("smc/importance.py", "smc/mixture.py", "smc/control_variates.py", "smc/sobol.py"),
        "tests/claims/test_ais_control_variates.py",
        "20 laws, 10,000 evaluations: 1/7000 of the mean square error of one sample for each, and "
        "1/180 of that without control variates; coverage of 95 % intervals 0.946 to 0.964",
    ),
    System(
        "Stochastic interpolants: a unifying framework for flows and diffusions (arXiv 2303.08797)",
        (
            "process/interpolant.py",
            "process/spline_interpolant.py",
            "process/coupling.py",
            "score/interpolant.py",
            "score/two_mixtures.py",
            "solve/interpolant.py",
            "solve/interpolant_likelihood.py",
        ),
        "tests/claims/test_stochastic_interpolants.py",
        "velocity wrong by 0.5: divergence 0.240 nats for the flow, 0.0014 at epsilon 5, below its "
        "bound throughout; velocity and noise both wrong: 0.073 at the best epsilon, 2.7, against "
        "0.239 for the flow and 0.333 at epsilon 50",
    ),
    System(
        "SlimFlow: training smaller one-step diffusion models with rectified flow (arXiv "
        "2407.12718)",
        (
            "score/flow.py",
            "solve/reflow.py",
            "solve/straightness.py",
            "adapt/slimflow.py",
            "train/recipes/distill.py",
        ),
        "tests/claims/test_slimflow.py",
        "one-step error of guided distillation 0.73 to 0.77 of naive, three seeds; annealed reflow "
        "0.87 to 0.96 of no warm start with 300 pairs in 16 dimensions, where a small flow, warm, "
        "is better still",
    ),
    System(
        "Closing the ODE-SDE gap in score-based diffusion models through the Fokker-Planck "
        "equation (arXiv 2311.15996)",
        (
            "score/fokker_planck.py",
            "solve/ode_sde_gap.py",
            "metrics/wasserstein.py",
            "nets/potential.py",
        ),
        "tests/claims/test_fokker_planck_gap.py",
        "three modes on the line, the plain network, two seeds: W2 between flow and SDE 0.094 and "
        "0.094 at weight 0.1 against 0.441 and 1.015, the SDE's own error 0.053 and 0.090 against "
        "0.042 and 0.082",
    ),
    System(
        "RED-diff: a variational perspective on solving inverse problems with diffusion models "
        "(arXiv 2305.04391), with DPS, PiGDM, projection, DiffPIR and RePaint",
        (
            "guide/operators.py",
            "guide/inverse.py",
            "guide/red_diff.py",
            "guide/posterior.py",
            "guide/consistency.py",
            "guide/restore.py",
            "train/recipes/inverse.py",
        ),
        "tests/claims/test_red_diff.py",
        "digits at 100 evaluations: half masked 19.1 dB against 18.1 for tuned DPS (ahead by 0.8 "
        "where its noise is tuned too), clipped exposures 23.9 against 19.4; level at 20; behind "
        "DPS and PiGDM on a Gaussian prior",
    ),
    System(
        "RADD: your absorbing discrete diffusion secretly models the conditional distributions of "
        "clean data (arXiv 2406.03736)",
        (
            "process/absorbing.py",
            "score/discrete.py",
            "solve/discrete.py",
            "nets/radd.py",
            "train/recipes/text.py",
        ),
        "tests/claims/test_radd.py",
        "32 characters in 64, 256 and 1024 steps take 25.3, 30.1 and 31.5 evaluations, the same "
        "tokens; 3.85 bits a character without time against 3.99 with it, two seeds that differ by "
        "more",
    ),
)


def systems_table() -> str:
    """The table as Markdown, for the readme."""
    rows = ["| system | where | claim test | measured |", "| --- | --- | --- | --- |"]
    for system in SYSTEMS:
        where = ", ".join(f"`{path}`" for path in system.where)
        rows.append(f"| {system.name} | {where} | `{system.claim}` | {system.figure} |")
    return "\n".join(rows)


@dataclasses.dataclass(frozen=True)
class Systems:
    """Print the table of published systems: where each lives, its claim test, what it measured."""


def run(words: Sequence[str]) -> int:
    """Carry out ``jaxgen systems``."""
    parse(Systems, words, prog="jaxgen systems")
    print(systems_table())
    return 0
