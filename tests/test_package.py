"""The package as a whole: imports, names, examples in docstrings, and what it must not do."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxgen

ROOT = Path(__file__).parents[1]


def _modules():
    return sorted(m.name for m in pkgutil.walk_packages(jaxgen.__path__, "jaxgen."))


def test_importing_starts_no_device_and_no_plotting():
    code = (
        "import sys, jaxgen\n"
        "from jaxgen import adapt, guide, mcmc, metrics, nets, particles, process, prune\n"
        "from jaxgen import score, share, smc, solve, train\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "assert 'matplotlib' not in sys.modules\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_functions_stay_callable_beside_modules_of_their_name():
    for name in _modules():
        importlib.import_module(name)
    assert inspect.isfunction(jaxgen.solve.sample)
    for name in ("resample", "paris", "particle_gibbs", "feynman_kac", "sde_model", "tempered"):
        assert inspect.isfunction(getattr(jaxgen.smc, name))
    assert inspect.isfunction(jaxgen.particles.resample)
    assert inspect.isfunction(jaxgen.guide.red_diff)
    assert inspect.isfunction(jaxgen.guide.restore)
    assert inspect.isfunction(jaxgen.process.interpolant)
    assert inspect.isfunction(jaxgen.process.absorbing)
    assert inspect.isfunction(jaxgen.solve.straightness)
    assert inspect.isfunction(jaxgen.solve.ode_sde_gap)
    for room in jaxgen._ROOMS:
        module = getattr(jaxgen, room)
        missing = [n for n in module.__all__ if not hasattr(module, n)]
        assert not missing, f"jaxgen.{room}.__all__ names {missing}"
        assert room in dir(jaxgen)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        jaxgen.nonsense


@pytest.mark.parametrize("name", _modules())
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_public_functions_are_documented():
    lacking = []
    for name in _modules():
        module = importlib.import_module(name)
        if not module.__doc__ and name != "jaxgen.cli.__main__":
            lacking.append(name)
        for attribute in getattr(module, "__all__", ()):
            thing = getattr(module, attribute)
            if (inspect.isfunction(thing) or inspect.isclass(thing)) and not thing.__doc__:
                lacking.append(f"{name}.{attribute}")
    assert not lacking, f"without a docstring: {lacking}"


def test_no_pickle():
    for path in (ROOT / "jaxgen").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(import|from)\s+(pickle|dill|cloudpickle)\b", text, re.M), path
        assert "allow_pickle=True" not in text, path
