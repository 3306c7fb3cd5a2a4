"""Plans for TPU slices that are not there, by the TPU's compiler.

The compiler serves one process of a machine at a time, and wants its environment before jax starts.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from jaxgen.train.recipes.config import ScoreConfig
from jaxgen.train.recipes.plan import plan_run
from jaxgen.train.topology import CHIPS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is missing: pip install 'jaxgen[tpu-compile]'",
)

# Two residual blocks.
TWO_BLOCKS = ScoreConfig(width=16, channel_mults=(1,), blocks=1, batch_size=1024)


@pytest.fixture(scope="module")
def four():
    return {mesh: plan_run(TWO_BLOCKS, "v5e:2x2", mesh=mesh).step for mesh in ("data=4", "fsdp=4")}


def test_two_blocks_for_four_chips(four):
    plan = four["data=4"]
    memory = plan.memory
    assert plan.chips == 4 and plan.fits and plan.hbm == CHIPS["v5e"].hbm
    # Padding to the chip's tiles adds, and never takes away.
    assert memory.arguments >= sum(memory.parts.values())
    assert memory.peak >= memory.arguments + memory.outputs + memory.temporary
    assert plan.flops > plan.matmul_flops > 0 and plan.bytes_moved > memory.arguments
    # The gradient and the loss, once.
    assert {each.kind for each in plan.collectives} == {"all-reduce"}
    assert sum(each.bytes for each in plan.collectives) == memory.parts["weights"] + 4
    roofline = plan.roofline
    assert 0 < roofline.lower_bound <= roofline.estimate < 1
    assert roofline.compute == plan.flops / CHIPS["v5e"].flops


def test_the_state_is_split_as_the_mesh_says(four):
    whole, split = four["data=4"].memory, four["fsdp=4"].memory
    for name in ("weights", "average", "optimiser"):
        # Leaves of fewer than 1024 elements stay whole.
        assert whole.parts[name] / 4 < split.parts[name] < 0.6 * whole.parts[name]
    assert split.arguments < whole.arguments
    assert "all-gather" in {each.kind for each in four["fsdp=4"].collectives}


# --- slow: a minute for each program --------------------------------------------------------------

SIZES = {"2x2": 4, "4x4": 16, "8x8": 64, "16x16": 256}


def plans(kind, **changes):
    config = dataclasses.replace(TWO_BLOCKS, **changes)
    return {
        chips: plan_run(config, f"v5e:{size}", mesh=kind.format(chips)).step
        for size, chips in SIZES.items()
    }


@pytest.mark.slow
def test_the_flops_of_a_chip_are_those_of_its_part_of_the_batch(four):
    half = plan_run(TWO_BLOCKS, "v5e:2x4", mesh="data=8").step
    products = [plan.matmul_flops for plan in (four["data=4"], half)]
    # But for products whose size is not the batch's, such as those of the weights' transposes.
    assert products[1] == pytest.approx(products[0] / 2, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("share", [None, 0.1], ids=["dense", "shared"])
def test_data_parallelism_from_4_to_256_chips(share):
    found = plans("data={}", share=share)
    for chips, plan in found.items():
        parts = plan.memory.parts
        assert plan.fits and plan.chips == chips
        # The whole state on every chip, the batch in parts.
        assert parts["weights"] == found[4].memory.parts["weights"]
        assert parts["batch"] * chips == found[4].memory.parts["batch"] * 4
        # What is exchanged is the gradient, whatever the number of chips.
        assert sum(each.bytes for each in plan.collectives) == parts["weights"] + 4


@pytest.mark.slow
def test_fsdp_from_4_to_256_chips():
    # Sixteen divide every axis that is long enough.
    wide = dataclasses.replace(TWO_BLOCKS, width=64)
    meshes = {
        "2x2": "fsdp=4",
        "4x4": "fsdp=16",
        "8x8": "data=4,fsdp=16",
        "16x16": "data=16,fsdp=16",
    }
    found = [plan_run(wide, f"v5e:{size}", mesh=mesh).step for size, mesh in meshes.items()]
    weights = [plan.memory.parts["weights"] for plan in found]
    assert weights[1] < 0.3 * weights[0] and weights[1] == weights[2] == weights[3]
    assert found[1].memory.arguments < 0.5 * found[0].memory.arguments


@pytest.mark.slow
def test_the_sampler_of_a_whole_slice():
    planned = plan_run(TWO_BLOCKS, "v5e:4x4", mesh="data=16", sampler=True)
    assert planned.sampler.fits and not planned.sampler.collectives
    # Heun calls the network twice a step but for the last, 24 steps; training costs three times a
    # call for each example.
    calls = 2 * 24 - 1
    expected = calls / 3 * planned.step.matmul_flops
    assert planned.sampler.matmul_flops == pytest.approx(expected, rel=0.1)


@pytest.mark.slow
def test_the_largest_batch_of_four_chips():
    planned = plan_run(TWO_BLOCKS, "v5e:2x2", mesh="data=4", largest=True)
    best = planned.largest
    assert best.fits and best.batch % 4 == 0 and best.batch > 2**16
    assert best.memory.peak > 0.8 * best.hbm and 0 < planned.compiles <= 12


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "v5e:1x1"])
def test_other_chips(topology):
    plan = plan_run(ScoreConfig(data="moons", width=16, blocks=1), topology).step
    assert plan.fits and plan.roofline.estimate > 0


@pytest.mark.slow
def test_the_command_on_a_slice(tmp_path):
    out = tmp_path / "plan.json"
    words = ["--data", "moons", "--topology", "v5e:4x4", "--mesh", "data=8,fsdp=2", "--json", out]
    done = subprocess.run(
        [sys.executable, "-m", "jaxgen.cli", "plan", *map(str, words)],
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fits: the peak is" in done.stdout and "lower bound" in done.stdout
    assert json.loads(out.read_text())["step"]["chips"] == 16
