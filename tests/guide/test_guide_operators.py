"""Operators against dense matrices: adjoint, pseudo-inverse, and the ridge of equation (1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgen.guide import operators

SEEN = np.random.default_rng(0).integers(0, 2, (4, 6, 1))
MATRIX = np.random.default_rng(1).normal(size=(3, 5)) @ np.diag([1.0, 1, 1, 0, 0])
KERNEL = np.array([[0.1, 0.2, 0.1], [0.0, 0.3, 0.2], [0.05, 0.0, 0.05]])

LINEAR = {
    "mask": (lambda: operators.mask(SEEN), (4, 6, 2)),
    "average_pool": (lambda: operators.average_pool(2), (4, 6, 3)),
    "average_pool_1d": (lambda: operators.average_pool(3), (6,)),
    "grayscale": (operators.grayscale, (4, 2, 3)),
    "blur": (lambda: operators.blur(KERNEL, cut=1e-3), (4, 6, 2)),
    "linear": (lambda: operators.linear(MATRIX), (5,)),
    "linear_image": (lambda: operators.linear(MATRIX[:, :4], (2, 2)), (2, 2)),
    "composition": (
        lambda: operators.compose(operators.average_pool(2), operators.mask(SEEN)),
        (4, 6, 1),
    ),
    "grey_pixels": (
        lambda: operators.compose(
            operators.mask(SEEN[:2, :3]), operators.average_pool(2), operators.grayscale()
        ),
        (4, 6, 3),
    ),
}


def dense(operator, event):
    """The operator's matrix, by its images of the unit vectors, and the measurement's shape."""
    units = np.eye(int(np.prod(event))).reshape(-1, *event)
    images = np.asarray(jax.vmap(operator)(jnp.asarray(units)))
    return images.reshape(len(units), -1).T, images.shape[1:]


@pytest.mark.parametrize("name", LINEAR)
def test_adjoint_and_pseudo_inverse(name):
    make, event = LINEAR[name]
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        operator = make()
        assert operator.is_linear
        matrix, shape = dense(operator, event)
        rank = np.linalg.matrix_rank(matrix)
        x, y = jnp.asarray(rng.normal(size=event)), jnp.asarray(rng.normal(size=shape))

        @jax.jit
        def all_of(operator, x, y):
            back = operator.pinv(operator(x))
            ridge = operator.pinv(y, 0.3)
            return operator(x), operator.transpose(y), operator.pinv(y), operator(back), ridge

        image, adjoint, inverse, again, ridge = map(np.asarray, all_of(operator, x, y))
    x, y = np.asarray(x), np.asarray(y)
    assert adjoint.shape == inverse.shape == event
    np.testing.assert_allclose(adjoint.ravel(), matrix.T @ y.ravel(), atol=1e-10)
    np.testing.assert_allclose((image * y).sum(), (x * adjoint).sum(), atol=1e-10)
    np.testing.assert_allclose(again, image, atol=1e-8)
    gram = matrix @ matrix.T
    truth = matrix.T @ np.linalg.solve(gram + 0.3 * np.eye(len(gram)), y.ravel())
    np.testing.assert_allclose(ridge.ravel(), truth, atol=1e-8)
    # The kernel leaves nothing of some frequencies, but for rounding. In a composition y has a part
    # that no x reaches.
    truth = np.linalg.pinv(matrix, rcond=1e-3 if name == "blur" else 1e-12) @ y.ravel()
    np.testing.assert_allclose(inverse.ravel(), truth, atol=1e-8)
    assert 0 < rank <= len(matrix)


def test_matrices_are_multiplied_in_full_precision():
    for operator, event in ((operators.linear(MATRIX), (5,)), (operators.grayscale(), (2, 2, 3))):
        text = str(jax.make_jaxpr(lambda x, f=operator: f.pinv(f(x)))(jnp.zeros(event)))
        assert text.count("HIGHEST") >= 2 * text.count("dot_general[") > 0


def test_a_composition_with_dependent_rows_and_with_nan():
    twice = operators.compose(operators.linear(np.array([[1.0, 0], [1, 0]])))
    np.testing.assert_allclose(twice.pinv(jnp.array([1.0, 2.0])), [1.5, 0.0], atol=1e-6)
    pooled = operators.compose(operators.average_pool(2))
    assert np.isnan(pooled.pinv(jnp.array([jnp.nan, 1.0]))).all()


def test_a_blur_gives_up_what_it_has_lost():
    operator = operators.gaussian_blur(1.5)
    x = jax.random.normal(jax.random.key(0), (16, 16, 1))
    y = operator(x)
    assert y.shape == x.shape and float(y.std()) < 0.4 * float(x.std())
    # Mass is kept, and so is a constant.
    np.testing.assert_allclose(operator(jnp.ones((16, 16, 1))), 1.0, atol=1e-5)
    back = operator.pinv(y)
    np.testing.assert_allclose(operator(back), y, atol=4 * 0.03)
    np.testing.assert_allclose(operator.pinv(operator(back)), back, atol=1e-3)
    noise = jax.random.normal(jax.random.key(1), (16, 16, 1))
    assert float(jnp.linalg.norm(operator.pinv(noise))) < float(jnp.linalg.norm(noise)) / 0.03
    # A symmetric kernel is its own adjoint.
    np.testing.assert_allclose(operator.transpose(x), y, atol=1e-6)


def test_what_the_others_do():
    x = jnp.array([[-0.8, 0.1], [0.3, 0.9]])
    np.testing.assert_allclose(operators.hdr()(x), [[-1.0, 0.2], [0.6, 1.0]], atol=1e-6)
    np.testing.assert_allclose(operators.hdr().pinv(x), x / 2)
    y = operators.phase_retrieval(1)(x)
    assert y.shape == (4, 4) and operators.phase_retrieval(1).pinv(y).shape == (2, 2)
    # Parseval, and neither the sign nor a shift within the border shows.
    np.testing.assert_allclose((y**2).sum(), (x**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(operators.phase_retrieval(1)(-x), y, atol=1e-6)
    flat = operators.phase_retrieval(0)
    np.testing.assert_allclose(flat(jnp.roll(x, 1, 0)), flat(x), atol=1e-6)
    assert np.isfinite(jax.grad(lambda x: flat(x).sum())(jnp.zeros((2, 2)))).all()
    for operator in (operators.hdr(), flat, operators.compose(operators.hdr(), flat)):
        assert not operator.is_linear
    back = operators.compose(operators.hdr(), operators.average_pool(2)).pinv(jnp.ones((1, 1)))
    np.testing.assert_allclose(back, 0.5 * jnp.ones((2, 2)))
    with pytest.raises(TypeError, match="HDR is not linear"):
        operators.hdr().transpose(x)


def test_operators_are_pytrees_that_compile_once():
    traced = []

    @jax.jit
    def measure(operator, x):
        traced.append(1)
        return jax.vmap(operator)(x)

    x = jnp.ones((2, 4, 6, 1))
    for seen in (SEEN, 1 - SEEN):
        out = measure(operators.mask(seen), x)
        np.testing.assert_array_equal(out[1], seen)
    assert len(traced) == 1
    half = operators.average_pool(2)(jnp.ones((2, 2, 1), jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_masks():
    x = jnp.array([1.0, jnp.nan, 3.0])
    for kind in (bool, np.int32, np.float32):
        seen = operators.mask(np.array([1, 0, 1]).astype(kind))
        np.testing.assert_array_equal(seen(x), [1, 0, 3])
        np.testing.assert_array_equal(seen.observed(x), [1, 0, 3])
    with pytest.warns(UserWarning, match="observes nothing"):
        operators.mask(np.zeros(3))
    with pytest.raises(ValueError, match="m has other values"):
        operators.mask(np.array([0, 2]))
    out = jax.jit(lambda m: operators.mask(m)(jnp.ones(2)))(jnp.array([1.0, 0.5]))
    np.testing.assert_array_equal(out, [1, np.nan])
    error, _ = checkify.checkify(jax.jit(lambda m: operators.mask(m).known))(jnp.array([1, 2]))
    with pytest.raises(checkify.JaxRuntimeError, match="m has other values"):
        error.throw()


X = jnp.ones((4, 6, 2))


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "mask has shape", lambda: operators.mask(np.ones(3))(X)),
        (ValueError, "mask has shape", lambda: operators.mask(np.ones((1, 4, 6, 2)))(X)),
        (ValueError, "factor is 0", lambda: operators.average_pool(0)),
        (ValueError, "sides that 4 divides", lambda: operators.average_pool(4)(X)),
        (ValueError, "weights has shape", lambda: operators.grayscale(np.ones((1, 3)))),
        (ValueError, "last axis of 3", lambda: operators.grayscale()(X)),
        (ValueError, "y has shape", lambda: operators.grayscale().pinv(X)),
        (ValueError, "kernel has shape", lambda: operators.blur(np.ones((1, 1, 1)))),
        (ValueError, "as long as the kernel", lambda: operators.gaussian_blur(3.0)(X)),
        (ValueError, "std is 0", lambda: operators.gaussian_blur(0)),
        (ValueError, "size is 4", lambda: operators.gaussian_blur(1.0, size=4)),
        (ValueError, "matrix has shape", lambda: operators.linear(np.ones(3))),
        (ValueError, "expected 3 entries", lambda: operators.linear(np.ones((2, 3)), (2, 2))),
        (TypeError, "matrix has dtype", lambda: operators.linear(1j * np.ones((2, 3)))),
        (ValueError, "x has shape", lambda: operators.linear(np.ones((2, 3)))(jnp.ones(2))),
        (ValueError, "y has shape", lambda: operators.linear(np.ones((2, 3))).pinv(jnp.ones(3))),
        (ValueError, "pad is -1", lambda: operators.phase_retrieval(-1)),
        (ValueError, "sides above", lambda: operators.phase_retrieval(2).pinv(X)),
        (ValueError, "no operators", lambda: operators.compose()),
        (TypeError, "expected operators", lambda: operators.compose(lambda x: x)),
    ],
)
def test_bad_input_names_what_came(error, words, call):
    with pytest.raises(error, match=words):
        call()
