"""A small classifier of the data set's own examples, which judges what a generator makes.

Its penultimate features are the space of the Frechet distance, and its probabilities tell whether
samples are recognisable. It is trained on the generator's training part, and its accuracy is
stated on the held-out part. Examples enter quantised, real ones and generated ones alike.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgen import nets
from jaxgen.train.data import Dataset, batches
from jaxgen.train.state import TrainState
from jaxgen.train.step import make_train_step

__all__ = ["Judge", "train_judge"]

_CHUNK = 512


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

    def features(self, x: np.ndarray) -> np.ndarray:
        """Penultimate features ``(n, feature_size)`` of network-scaled images ``(n, h, w, c)``."""
        return _chunked(jax.jit(lambda p, y: self.net.apply(p, y, method="features")), self, x)

    def probabilities(self, x: np.ndarray) -> np.ndarray:
        """Class probabilities ``(n, classes)`` of network-scaled images ``(n, h, w, c)``."""
        return _chunked(jax.jit(lambda p, y: jax.nn.softmax(self.net.apply(p, y))), self, x)


def _chunked(apply: Any, judge: Judge, x: np.ndarray) -> np.ndarray:
    """In equal chunks, the last one padded, so that one compilation serves them all."""
    size = min(_CHUNK, len(x))
    parts = []
    for start in range(0, len(x), size):
        part = x[start : start + size]
        padded = np.concatenate([part, np.zeros((size - len(part), *x.shape[1:]), x.dtype)])
        parts.append(np.asarray(apply(judge.params, padded))[: len(part)])
    return np.concatenate(parts)


def train_judge(
    key: jax.Array, train: Dataset, held_out: Dataset, *, steps: int = 400, batch_size: int = 128
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
    params = net.init(key_init, jnp.zeros((1, *train.event)))
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
    found = judge.probabilities(held_out.to_unit(held_out.x)).argmax(axis=1)
    return judge._replace(accuracy=float(np.mean(found == held_out.label)))
