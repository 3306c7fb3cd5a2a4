"""The `particles` package as a peer, in an environment of its own (it asks for an older NumPy).

    python -m venv peer && peer/bin/pip install -r benchmarks/golden/particles_requirements.txt
    JAXGEN_PARTICLES=peer/bin/python python -m benchmarks filtering

Reads one JSON command a line, {"task": "filter" or "paris", "y": [...], "n": N}, and answers with
the seconds it took and what it found, so that a benchmark can alternate with it.
"""

import json
import math
import sys
import time

import particles
from particles import collectors, distributions
from particles import state_space_models as ssm

A, SIGMA, TAU = 0.9, 0.5, 0.3


class LinearGaussian(ssm.StateSpaceModel):
    """x_0 stationary, x_t = A x + SIGMA e, y = x + TAU e."""

    def PX0(self):
        """The first state."""
        return distributions.Normal(scale=SIGMA / (1 - A**2) ** 0.5)

    def PX(self, t, xp):
        """The transition."""
        return distributions.Normal(loc=A * xp, scale=SIGMA)

    def PY(self, t, xp, x):
        """The observation."""
        return distributions.Normal(loc=x, scale=TAU)

    def upper_bound_log_pt(self, t):
        """Where the transition's density is largest."""
        return -0.5 * math.log(2 * math.pi) - math.log(SIGMA)


class WithProducts(ssm.Bootstrap):
    """Smooths the sum of x_t x_{t+1}."""

    def add_func(self, t, xp, x):
        """One term."""
        return 0.0 * x if xp is None else xp * x

    def upper_bound_trans(self, t):
        """The same bound under its other name."""
        return self.ssm.upper_bound_log_pt(t)


def main() -> None:
    """Answer until the input ends."""
    for line in sys.stdin:
        command = json.loads(line)
        fk = WithProducts(ssm=LinearGaussian(), data=command["y"])
        paris = command["task"] == "paris"
        collect = [collectors.Paris(Nparis=command["draws"])] if paris else []
        start = time.perf_counter()
        run = particles.SMC(
            fk=fk,
            N=command["n"],
            resampling="multinomial" if paris else "systematic",
            ESSrmin=1.0,
            collect=collect,
        )
        run.run()
        answer = {"seconds": time.perf_counter() - start, "log_z": float(run.logLt)}
        if paris:
            answer["estimate"] = float(run.summaries.paris[-1])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
