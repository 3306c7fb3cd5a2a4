"""Degradation and figures of the restoration example, and (slow) its training."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from jaxgen.solve.mean_reverting import mr_sample
from jaxgen.train.recipes.restoration import (
    RestorationConfig,
    degrade,
    psnr,
    train_restorer,
)


def test_the_blur_is_gaussian_and_the_noise_each_images_own(key):
    x = np.random.default_rng(0).uniform(size=(3, 8, 6, 2)).astype(np.float32)
    blurred = degrade(key, x, blur=1.0, noise=0.0)
    expected = ndimage.gaussian_filter(x, (0, 1, 1, 0), mode="constant", truncate=3)
    np.testing.assert_allclose(blurred, expected, atol=1e-6)
    noisy = degrade(key, x, blur=0.0, noise=0.2)
    np.testing.assert_array_equal(degrade(key, x[:2], blur=0.0, noise=0.2), noisy[:2])
    # Four standard errors of the deviation of 288 numbers.
    assert abs((noisy - x).std() / 0.2 - 1) < 4 / (2 * 288) ** 0.5


def test_psnr():
    truth = np.zeros((2, 4, 4, 1))
    assert abs(psnr(truth + 0.1, truth) - 20) < 1e-9
    # What is outside [0, 1] is cut.
    assert psnr(truth + 3, truth) == 0.0


def test_only_grey_images():
    with pytest.raises(ValueError, match=r"moons holds examples of shape \(2,\)"):
        train_restorer(RestorationConfig(data="moons"))


@pytest.mark.slow
@pytest.mark.parametrize(
    # Noise is learnt the slowest.
    ("fit_target", "steps"),
    [("data", 600), ("velocity", 600), ("noise", 2000)],
)
def test_a_short_training_restores(fit_target, steps, key):
    config = RestorationConfig(steps=steps, fit_target=fit_target)
    made = train_restorer(config, progress=False)
    run = jax.jit(
        lambda k, mu: (
            mr_sample(
                k, made.net, mu, made.sde, steps=10, fit_target=fit_target, lower_order_final=True
            ).x
        )
    )
    before = psnr(made.measured, made.truth)
    assert psnr(run(key, made.measured), made.truth) > before + 1
