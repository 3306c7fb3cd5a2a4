"""The U-Net, the MLP and the classifier: one suite over all, then what is special to each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import nets
from jaxgen.nets.layers import Conv3x3

# Initialisers compile several times faster with this generator than with threefry.
KEY = jax.random.key(0, impl="rbg")
T = jnp.asarray([0.1, 0.5, 0.9])
LABEL = jnp.asarray([0, 2, 3])
# Compiling costs more than running here, and unoptimised code compiles in half the time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
NETS = {
    "unet": (
        nets.UNet(width=8, channel_mults=(1, 2), attention=(2,), num_classes=3, dropout=0.5),
        (4, 4, 1),
    ),
    "mlp": (nets.MLP(width=16, depth=2, num_classes=3, dropout=0.5), (2,)),
}


@functools.cache
def case(name):
    """The network, images, its initial parameters and those after two steps of training."""
    net, event = NETS[name]
    x = jax.random.normal(jax.random.key(1), (3, *event))
    start = quick_jit(net.init)(KEY, x, T)
    target = jnp.cos(3 * x) + LABEL.astype(x.dtype).reshape(3, *(1,) * len(event))

    @quick_jit
    def step(variables):
        def loss(v):
            return jnp.mean((net.apply(v, x, T, LABEL) - target) ** 2)

        value, grads = jax.value_and_grad(loss)(variables)
        return jax.tree.map(lambda p, g: p - 0.05 * g, variables, grads), value

    trained, losses = start, []
    for _ in range(5):
        trained, value = step(trained)
        losses.append(float(value))
    return net, x, start, trained, losses, quick_jit(net.apply)


@pytest.mark.parametrize("name", NETS)
def test_the_network_is_zero_at_first(name):
    _, x, start, _, _, apply = case(name)
    out = apply(start, x, T, LABEL)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert np.all(np.asarray(out) == 0)


@pytest.mark.parametrize("name", NETS)
def test_training_lowers_the_loss_and_every_input_comes_to_matter(name):
    _, x, _, trained, losses, apply = case(name)
    assert losses[-1] < 0.9 * losses[0]
    out = apply(trained, x, T, LABEL)
    for other in (
        apply(trained, x, T, jnp.asarray([1, 2, 3])),
        apply(trained, x, T.at[0].set(0.2), LABEL),
        apply(trained, x.at[0].add(0.5), T, LABEL),
    ):
        changed = np.abs(np.asarray(other - out)).reshape(3, -1).max(1)
        assert changed[0] > 1e-4
        assert np.all(changed[1:] < 1e-5)


@pytest.mark.parametrize("name", NETS)
def test_no_label_is_the_null_label(name):
    _, x, _, trained, _, apply = case(name)
    null = apply(trained, x, T, jnp.full((3,), 3))
    np.testing.assert_allclose(apply(trained, x, T), null, atol=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_bfloat16_follows_float32_and_parameters_stay_float32(name):
    _, x, start, trained, _, apply = case(name)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(start))
    full = apply(trained, x, T, LABEL)
    half = apply(trained, x.astype(jnp.bfloat16), T, LABEL)
    assert half.dtype == jnp.bfloat16
    error = jnp.mean((full - half.astype(jnp.float32)) ** 2) / jnp.mean(full**2)
    assert 1e-9 < float(error) < 0.05**2


def test_dtype_attribute_computes_in_bfloat16_and_returns_that_of_x():
    net, x, _, trained, _, apply = case("mlp")
    full = apply(trained, x, T, LABEL)
    mixed = quick_jit(net.clone(dtype=jnp.bfloat16).apply)(trained, x, T, LABEL)
    assert mixed.dtype == jnp.float32
    assert 1e-9 < float(jnp.mean((full - mixed) ** 2) / jnp.mean(full**2)) < 0.05**2


@pytest.mark.parametrize("name", NETS)
def test_vmap_of_singles_is_the_batch(name):
    net, x, _, trained, _, apply = case(name)

    def single(x, t, label):
        return net.apply(trained, x[None], t[None], label[None])[0]

    singles = quick_jit(jax.vmap(single))(x, T, LABEL)
    np.testing.assert_allclose(singles, apply(trained, x, T, LABEL), atol=2e-5)


@pytest.mark.parametrize("name", NETS)
def test_derivative_in_x_is_the_finite_difference(name):
    net, x, _, trained, _, apply = case(name)
    direction = jax.random.normal(jax.random.key(2), x.shape)
    _, tangent = quick_jit(
        lambda v: jax.jvp(lambda x: net.apply(v, x, T, LABEL), (x,), (direction,))
    )(trained)
    step = 1e-2
    ahead = apply(trained, x + step * direction, T, LABEL)
    behind = apply(trained, x - step * direction, T, LABEL)
    np.testing.assert_allclose(tangent, (ahead - behind) / (2 * step), atol=5e-3)


@pytest.mark.parametrize("name", NETS)
def test_dropout_acts_in_training_alone(name):
    net, x, _, trained, _, apply = case(name)
    run = quick_jit(functools.partial(net.apply, train=True))
    first, again, other = (
        run(trained, x, T, LABEL, rngs={"dropout": jax.random.key(seed)}) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert float(jnp.max(jnp.abs(first - other))) > 1e-3
    # With train=False no key is asked for, and the rate does not matter.
    quiet = apply(trained, x, T, LABEL)
    rate_free = net.clone(dropout=0.0).apply(trained, x, T, LABEL) if name == "mlp" else quiet
    np.testing.assert_allclose(quiet, rate_free, atol=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_bad_input_is_named(name):
    net, x, start, *_ = case(name)
    for bad_x, bad_t, label, error, message in [
        (x[0], T, None, ValueError, r"x: expected shape \(batch, .*received"),
        (x, T[:2], None, ValueError, r"t: expected shape \(3,\), received \(2,\)"),
        (x, T[0], None, ValueError, r"t: expected shape \(3,\), received \(\)"),
        (x, T, LABEL[:1], ValueError, r"label: expected shape \(3,\), received \(1,\)"),
        (x, T, T, TypeError, "label: expected an integer dtype, received float32"),
        (x.astype(int), T, None, TypeError, "x: expected a real floating dtype, received int32"),
        (x, LABEL, None, TypeError, "t: expected a real floating dtype, received int32"),
    ]:
        with pytest.raises(error, match=message):
            net.apply(start, bad_x, bad_t, label)
    with pytest.raises(ValueError, match=r"label: expected None.*num_classes=None.*received"):
        net.clone(num_classes=None).apply(start, x, T, LABEL)


def test_unet_with_a_patch_is_zero_first_and_trains_afterwards():
    net = nets.UNet(width=8, channel_mults=(1,), patch=2)
    x = jax.random.normal(KEY, (3, 4, 6, 2))
    variables = quick_jit(net.init)(KEY, x, T)

    @quick_jit
    def value_and_gradient(v):
        out, pull = jax.vjp(lambda v: net.apply(v, x, T), v)
        return out, pull(x)[0]

    out, grads = value_and_gradient(variables)
    assert out.shape == x.shape and np.all(np.asarray(out) == 0)
    last = grads["params"]["Conv3x3_1"]["kernel"]
    assert last.shape == (3, 3, 8, 8) and np.any(np.asarray(last) != 0)


def test_unet_names_the_resolution_it_needs():
    net = nets.UNet(width=8, channel_mults=(1, 1, 1), patch=2)
    with pytest.raises(ValueError, match=r"divisible by 8 for 3 levels, received \(2, 8, 12, 1\)"):
        jax.eval_shape(net.init, KEY, jnp.zeros((2, 8, 12, 1)), T[:2])


@pytest.mark.parametrize("mults", [(1,), (1, 2, 2), (1, 1, 1, 2)])
def test_unet_goes_down_to_one_pixel(mults):
    net = nets.UNet(width=8, channel_mults=mults, blocks=2)
    out, _ = jax.eval_shape(net.init_with_output, KEY, jnp.zeros((2, 8, 8, 3)), T[:2])
    assert out.shape == (2, 8, 8, 3)


@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (2, 10, 10, 48)], ids=["product", "convolution"])
def test_both_forms_of_the_convolution_are_the_direct_sum(shape):
    net = Conv3x3(5, kernel_init=jax.nn.initializers.normal(0.2))
    x = jax.random.normal(KEY, shape)
    variables = net.init(jax.random.key(1), x)
    variables["params"]["bias"] = jnp.arange(5.0)
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros((*shape[:3], 5)) + np.arange(5.0)
    for i in range(shape[1]):
        for j in range(shape[2]):
            window = padded[:, i : i + 3, j : j + 3]
            expected[:, i, j] += np.einsum("nhwc,hwco->no", window, kernel)
    np.testing.assert_allclose(net.apply(variables, x), expected, atol=1e-4)


@pytest.fixture(scope="module")
def classifier():
    net = nets.Classifier(num_classes=4, widths=(8,), feature_size=12, dropout=0.5)
    x = jax.random.normal(KEY, (5, 4, 6, 2))
    return net, quick_jit(net.init)(KEY, x), x


def test_classifier_logits_are_its_head_on_its_features(classifier):
    net, variables, x = classifier
    features = quick_jit(functools.partial(net.apply, method="features"))(variables, x)
    assert features.shape == (5, 12) and features.dtype == x.dtype
    head = variables["params"]["head"]
    logits = quick_jit(net.apply)(variables, x)
    assert logits.shape == (5, 4)
    np.testing.assert_allclose(logits, features @ head["kernel"] + head["bias"][None, :], atol=1e-5)


def test_classifier_in_bfloat16_gives_float32_logits(classifier):
    net, variables, x = classifier
    apply = quick_jit(net.apply)
    half = apply(variables, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, apply(variables, x), atol=0.1)


def test_classifier_learns_its_labels(classifier):
    net, variables, x = classifier
    labels = jnp.asarray([0, 1, 2, 3, 1])
    optimizer = optax.adam(1e-2)

    @quick_jit
    def step(variables, state, key):
        def loss(v):
            logits = net.apply(v, x, train=True, rngs={"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(variables), state)
        return optax.apply_updates(variables, updates), state

    state = optimizer.init(variables)
    for key in jax.random.split(KEY, 60):
        variables, state = step(variables, state, key)
    np.testing.assert_array_equal(quick_jit(net.apply)(variables, x).argmax(-1), labels)


def test_conditional_classifier_sees_the_noise_level():
    net = nets.Classifier(num_classes=2, widths=(8,), feature_size=8, conditional=True)
    x = jax.random.normal(KEY, (3, 4, 4, 1))
    variables = quick_jit(net.init)(KEY, x, T)
    apply = quick_jit(net.apply)
    changed = jnp.abs(apply(variables, x, T) - apply(variables, x, T.at[0].set(0.7))).max(1)
    assert float(changed[0]) > 1e-4 and float(jnp.max(changed[1:])) < 1e-6
    gradient = quick_jit(jax.grad(lambda x: net.apply(variables, x, T)[:, 0].sum()))(x)
    assert gradient.shape == x.shape and bool(jnp.any(gradient != 0))
    with pytest.raises(ValueError, match=r"t: expected shape \(batch,\) with conditional=True"):
        net.apply(variables, x)


def test_classifier_names_bad_input(classifier):
    net, variables, x = classifier
    with pytest.raises(ValueError, match=r"t: expected None with conditional=False, received"):
        net.apply(variables, x, jnp.ones(5))
    with pytest.raises(ValueError, match=r"x: expected shape \(batch, height, width, channels\)"):
        net.apply(variables, x[0])
    with pytest.raises(ValueError, match="divisible by 2 for 1 levels"):
        net.apply(variables, x[:, :3])
