"""What importing jaxgen costs over importing its dependencies, and that it starts no device."""

import subprocess
import sys
from collections.abc import Iterator

import numpy as np

from benchmarks.measure import PAIRS, Result, summarise

DEPENDENCIES = "import jax, diffrax, equinox, flax.linen, lineax, optax"
ROOMS = f"{DEPENDENCIES}; import jaxgen; from jaxgen import process, score, solve, guide, nets"
_TIMED = "import time; start = time.perf_counter(); {body}; print(time.perf_counter() - start)"
_NO_DEVICE = (
    f"{ROOMS}\nfrom jax._src import xla_bridge\n"
    "import sys\n"
    "assert not xla_bridge.backends_are_initialized(), 'importing jaxgen started a device'\n"
    "assert 'matplotlib' not in sys.modules, 'importing jaxgen imported matplotlib'"
)
GOAL_SECONDS = 0.3


def _seconds(body: str) -> float:
    command = [sys.executable, "-c", _TIMED.format(body=body)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def run(*, quick: bool) -> Iterator[Result]:
    """The extra seconds, as a ratio of the two import times."""
    subprocess.run([sys.executable, "-c", _NO_DEVICE], check=True)
    pairs = 5 if quick else PAIRS
    times = np.array([(_seconds(ROOMS), _seconds(DEPENDENCIES)) for _ in range(pairs + 1)])[1:]
    extra = float(np.median(times[:, 0]) - np.median(times[:, 1]))
    met = "met" if extra <= GOAL_SECONDS else "MISSED"
    yield summarise(
        "importing",
        "rooms",
        times[:, 0],
        times[:, 1],
        peer_name="the dependencies alone",
        unit="s",
        note=f"{extra:.3f} s more; goal at most {GOAL_SECONDS} s {met}",
    )
