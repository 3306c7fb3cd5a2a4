"""A small classifier of the data set's own examples, which judges what a generator makes.

Its penultimate features are the space of the Frechet distance, and its probabilities tell whether
samples are recognisable. It is trained on the generator's training part, and its accuracy is
stated on the held-out part. Examples enter quantised, real ones and generated ones alike.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgen import nets
from jaxgen.train.data import Dataset, batches
from jaxgen.train.recipes.score import init_once
from jaxgen.train.state import TrainState
from jaxgen.train.step import make_train_step

__all__ = ["Judge", "train_judge"]

_CHUNK = 256


class Judge(NamedTuple):
    """A trained classifier.

    Attributes:
      net: the Flax module.
      params: its parameters, averaged over the last steps.
      accuracy: share of the held-out examples that it gets right.
      feature_size: dimension of its features.
    """

    net: Any
    params: Any
    accuracy: float
    feature_size: int

    def look(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features ``(n, feature_size)`` and class probabilities ``(n, classes)`` of images.

        Args:
          x: float32 ``(n, h, w, c)``, network-scaled.
        """
        features, probabilities = [], []
        for start in range(0, len(x), _CHUNK):
            part = x[start : start + _CHUNK]
            # Padded to one size, so that one compilation serves all.
            padded = np.zeros((_CHUNK, *x.shape[1:]), np.float32)
            padded[: len(part)] = part
            seen = _look(self.net, self.params, padded)
            features.append(np.asarray(seen[0])[: len(part)])
            probabilities.append(np.asarray(seen[1])[: len(part)])
        return np.concatenate(features), np.concatenate(probabilities)


@functools.partial(jax.jit, static_argnums=0)
def _look(net: Any, params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    features = net.apply(params, x, method="features")
    return features, jax.nn.softmax(net.apply(params, x))


def train_judge(
    key: jax.Array, train: Dataset, held_out: Dataset, *, steps: int = 200, batch_size: int = 128
) -> Judge:
    """Train a classifier on labelled images.

    Args:
      key: typed key.
      train: labelled images whose sides are even.
      held_out: images for the accuracy.
      steps: training steps.
      batch_size: examples a step.

    Raises:
      ValueError: no labels.
    """
    if train.label is None or train.num_classes is None:
        raise ValueError(f"{train.name} has no labels; expected labelled images")
    halvings = 2 if all(side % 4 == 0 for side in train.event[:2]) else 1
    net = nets.Classifier(train.num_classes, widths=(16, 32)[:halvings], feature_size=64)
    key_init, key_run = jax.random.split(key)
    params = init_once(net.init, key_init, jnp.zeros((1, *train.event)))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    levels, shift, scale = train.levels, train.shift, train.scale

    def loss(key: jax.Array, params: Any, batch: Any) -> jax.Array:
        del key
        x = batch["x"].astype(jnp.float32)
        x = (x - shift) / scale if levels is None else (2 * x + 1) / levels - 1
        logits = net.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    state = TrainState.create(key_run, params, optimizer)
    step = make_train_step(loss, optimizer, ema=0.95)
    source = batches(train, batch_size, seed=0)(0)
    for _ in range(steps):
        state, _ = step(state, next(source))
    judge = Judge(net, state.ema, float("nan"), net.feature_size)
    found = judge.look(held_out.to_unit(held_out.x))[1].argmax(axis=1)
    return judge._replace(accuracy=float(np.mean(found == held_out.label)))
