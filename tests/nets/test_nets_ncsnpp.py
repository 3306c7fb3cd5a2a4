"""NCSN++ and DDPM++: the published parameter counts, and the call at tiny size."""

import dataclasses
import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import nets

COUNTS = {
    "ncsnpp_cifar10": 62_758_915,
    "ncsnpp_deep_cifar10": 107_587_075,
    "ddpmpp_cifar10": 61_804_419,
    "ddpmpp_deep_cifar10": 106_632_579,
    "slimflow_27_9m": 27_906_179,
    "slimflow_15_7m": 15_707_235,
    "slimflow_7_0m": 6_989_891,
    "slimflow_3_4m": 3_437_123,
}
SMALL = {"width": 4, "channel_mults": (1, 2), "blocks": 1, "attention": (4,)}


def small(name, **changes):
    return nets.NCSNpp(dataclasses.replace(nets.NCSNPP_CONFIGS[name], **SMALL, **changes))


def count(net, channels=3, side=32):
    x, t = jnp.zeros((1, side, side, channels)), jnp.ones((1,))
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(net.init, KEY, x, t)))


# Initialisers compile several times faster with this generator than with threefry.
KEY = jax.random.key(0, impl="rbg")
# Compiling costs more than running here, and unoptimised code compiles in half the time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
X = jax.random.uniform(jax.random.key(1), (2, 8, 8, 2))
T = jnp.asarray([0.3, 0.8])


@pytest.fixture(scope="module")
def ncsnpp_variables():
    net = small("ncsnpp_cifar10")
    return net, quick_jit(net.init)(KEY, X, T)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count_is_the_published_one(name):
    assert count(nets.ncsnpp(name)) == COUNTS[name]


def test_parameter_count_where_a_wider_level_attends():
    # At 64 x 64 the last level is the one of 16 x 16, and twice as wide as the one before here.
    assert count(nets.ncsnpp("slimflow_3_4m"), side=64) == 3_536_195
    assert count(nets.ncsnpp("slimflow_7_0m"), side=64) == COUNTS["slimflow_7_0m"]


def test_parameter_count_with_sinusoidal_embedding():
    config = nets.NCSNPP_CONFIGS["ncsnpp_cifar10"]
    config = dataclasses.replace(config, embedding="sinusoidal", divide_by_t=False)
    assert count(nets.NCSNpp(config)) == 62_693_251


def test_the_function_stays_callable_beside_its_module():
    importlib.import_module("jaxgen.nets.ncsnpp")
    assert nets.ncsnpp("ddpmpp_cifar10").config is nets.NCSNPP_CONFIGS["ddpmpp_cifar10"]


def test_last_layer_starts_at_a_scale_of_1e_10(ncsnpp_variables):
    _, variables = ncsnpp_variables
    kernel = variables["params"]["conv_out"]["kernel"]
    # Uniform with variance scale / fan_avg: the bound is sqrt(3 scale / fan_avg).
    bound = math.sqrt(3 * 1e-10 / (9 * (4 + 2) / 2))
    largest = float(jnp.max(jnp.abs(kernel)))
    assert 0.8 * bound < largest <= bound * (1 + 1e-6)


def test_output_is_tiny_scaled_and_recentred_as_published(ncsnpp_variables):
    net, variables = ncsnpp_variables
    out = quick_jit(net.apply)(variables, X, T)
    assert out.shape == X.shape and out.dtype == X.dtype
    assert 0 < float(jnp.max(jnp.abs(out))) < 1e-3
    plain = small("ncsnpp_cifar10", divide_by_t=False, centered=True)
    expected = quick_jit(plain.apply)(variables, 2 * X - 1, T) / T[:, None, None, None]
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-9)


def test_gradient_leaves_the_fourier_frequencies_alone(ncsnpp_variables):
    net, variables = ncsnpp_variables
    watched = {name: variables["params"][name] for name in ("GaussianFourier_0", "time_in")}

    @quick_jit
    @jax.grad
    def gradient(watched):
        params = {**variables["params"], **watched}
        params["conv_out"] = jax.tree.map(lambda leaf: leaf * 1e5, params["conv_out"])
        return jnp.mean((net.apply({"params": params}, X, T) - 1) ** 2)

    grads = gradient(watched)
    assert np.all(np.asarray(grads["GaussianFourier_0"]["frequencies"]) == 0)
    assert np.any(np.asarray(grads["time_in"]["kernel"]) != 0)


def test_bfloat16_agrees_with_float32(ncsnpp_variables):
    net, variables = ncsnpp_variables
    # A last layer of ordinary size, so that the comparison is not of zeros.
    params = dict(variables["params"])
    params["conv_out"] = jax.tree.map(lambda leaf: leaf * 1e5, params["conv_out"])
    apply = quick_jit(net.apply)
    full = apply({"params": params}, X, T)
    half = apply({"params": params}, X.astype(jnp.bfloat16), T)
    assert half.dtype == jnp.bfloat16
    error = jnp.mean((full - half.astype(jnp.float32)) ** 2) / jnp.mean(full**2)
    assert 1e-9 < float(error) < 0.05**2


@pytest.mark.parametrize(
    "changes",
    [
        {"progressive_input": "input_skip", "progressive_output": "output_skip", "attention": ()},
        {"resample": "mean", "embedding": "sinusoidal", "num_classes": 3},
    ],
    ids=["skips", "mean_and_labels"],
)
def test_variants_run_and_keep_shape(changes):
    config = dataclasses.replace(nets.NCSNPP_CONFIGS["ncsnpp_cifar10"], **{**SMALL, **changes})
    net = nets.NCSNpp(config)
    out, _ = jax.eval_shape(net.init_with_output, KEY, X, T)
    assert out.shape == X.shape and out.dtype == X.dtype


def test_one_block_a_level_with_skips_has_the_size_published_for_storm():
    config = dataclasses.replace(
        nets.NCSNPP_CONFIGS["ncsnpp_cifar10"],
        blocks=1,
        attention=(),
        progressive_input="input_skip",
        progressive_output="output_skip",
    )
    # Published as about 27.8 M with six channels in and two out, which this network cannot have.
    two, six = (count(nets.NCSNpp(config), channels=n) for n in (2, 6))
    assert 27.7e6 < two < six < 27.85e6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resample", "cubic"),
        ("progressive_input", "sum"),
        ("progressive_output", "residual"),
        ("embedding", "none"),
        ("width", 6),
        ("blocks", 0),
    ],
)
def test_bad_configuration_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}.*received.*{value}"):
        nets.NCSNppConfig(**{field: value})


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"name: expected one of .*ddpmpp_cifar10.*'mine'"):
        nets.ncsnpp("mine")


def test_bad_resolution_raises():
    with pytest.raises(ValueError, match=r"x: expected height and width divisible by 8"):
        jax.eval_shape(nets.ncsnpp("ddpmpp_cifar10").init, KEY, jnp.zeros((1, 28, 28, 1)), T[:1])
