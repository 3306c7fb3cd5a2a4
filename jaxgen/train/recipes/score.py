r"""The score-based recipe: data, process, network, loss and optimiser, made from a configuration.

The network always sees a state of unit variance and the noise level :math:`\log(\sigma/\alpha)/4`,
whatever the process (``score.precondition``, arXiv 2206.00364): one network serves VP and VE alike.
``prediction="edm"`` trains EDM's preconditioned denoiser, the other kinds predict directly. With
``fokker_planck`` a log-density is learned instead, of points in a few dimensions, and the score is
its gradient (``score.fokker_planck``, arXiv 2311.15996).
Dequantisation noise is drawn in the loss, from the step's key.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgen import nets, process, score, solve
from jaxgen.core import keys
from jaxgen.core.arrays import left_broadcast
from jaxgen.nets.potential import PotentialMLP, softplus
from jaxgen.process import LinearSDE
from jaxgen.score import Field, fokker_planck
from jaxgen.share import Shared
from jaxgen.train.data import Dataset
from jaxgen.train.recipes.config import ConfigError, Resolved
from jaxgen.train.recipes.sharing import Sharing, plan_sharing
from jaxgen.train.state import TrainState
from jaxgen.train.step import Metrics, make_train_step

__all__ = ["Experiment", "build", "make_process"]

DATA_RANGE = (-1.0, 1.0)
# Radians per unit of log(sigma/alpha)/4 of the fastest time feature.
_TIME_SCALE = 100.0
# Sets the key of a pool apart from those of the network's own layers.
_POOL = 0x9001
# Dimensions up to which the penalty's exact Laplacian is cheap.
_POTENTIAL_DIMS = 10
# Of the potential's activation. At the published 100 the penalty, which sees curvature in bands of
# width 1/100, blurred the moons: W2 of the reverse SDE to the data 0.22 against 0.14 without it.
_SHARPNESS = 20.0


def init_once(init: Callable[..., Any], key: jax.Array, *args: Any) -> Any:
    """``init(key, *args)``, compiled in a hurry.

    It runs once, and its many random draws take XLA's CPU compiler seconds to optimise.
    """
    if isinstance(key, jax.core.Tracer):
        return init(key, *args)
    hurry = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(init, compiler_options=hurry)(key, *args)


def make_process(name: str, arguments: tuple[str, ...] = ()) -> LinearSDE:
    """The process of this name, with numbers given as ``"name=value"``.

    Raises:
      ConfigError: an argument that it does not take, or that is no number in its range.
    """
    numbers: dict[str, float] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        try:
            numbers[key] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(f"process_args holds {argument!r}; expected name=number")
    make: Any = process.PROCESSES[name]
    try:
        return make(**numbers)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"process_args do not suit {name}: {error}") from None


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """Everything that a run is made of, but its state; made by ``build``.

    Attributes:
      config: the configuration.
      train: the examples that are learned.
      held_out: the examples that are not.
      net: a Flax module, called as ``net.apply(params, x, t, label, train)``.
      sde: the process.
      sigma_data: root mean square of the training data as the network sees them.
      sharing: the pools that the parameters live in, or ``None``.
    """

    config: Resolved
    train: Dataset
    held_out: Dataset
    net: Any
    sde: LinearSDE
    sigma_data: float
    sharing: Sharing | None = None

    @property
    def prediction(self) -> str:
        """What ``field`` predicts, one of ``score.PREDICTIONS``."""
        if self.config.fokker_planck is not None:
            return "score"
        return "data" if self.config.prediction == "edm" else self.config.prediction

    @property
    def dims(self) -> int:
        """Entries of one example."""
        return math.prod(self.train.event)

    def init_network(self, key: jax.Array) -> Any:
        """The network's first parameters, before any sharing."""
        x = jnp.zeros((1, *self.train.event))
        label = jnp.zeros((1,), jnp.int32) if self.config.labels else None
        return self.net.init(key, x, jnp.zeros((1,)), label)

    def init(self, key: jax.Array) -> Any:
        """The first of what is trained: the network's parameters, or the pools that make them."""

        def make(key: jax.Array) -> Any:
            params = self.init_network(key)
            if self.sharing is None:
                return params
            return self.sharing.start(jax.random.fold_in(key, _POOL), params)

        return init_once(make, key)

    def weights(self, params: Any) -> Any:
        """The network's parameters, from what ``init`` gives or a training state holds."""
        if self.sharing is None or not isinstance(params, Shared):
            return params
        return self.sharing.expand(params)

    def field(
        self, params: Any, label: jax.Array | None = None, *, dropout_key: jax.Array | None = None
    ) -> Field:
        """The network with these parameters as a field ``f(x, t)`` on batches.

        Args:
          params: from ``init``, or a trained ``TrainState.ema``; pools are expanded here, once.
          label: int32 ``(batch,)`` in ``[0, num_classes]``, the last meaning "none"; ``None`` for
            the whole distribution.
          dropout_key: draws dropout, as in training.
        """
        if self.config.fokker_planck is not None:
            return fokker_planck.potential_score(self.potential(params))
        train = dropout_key is not None and self.config.dropout > 0
        params = self.weights(params)
        rngs = {"dropout": dropout_key} if train else None

        def net(x: jax.Array, t: jax.Array) -> jax.Array:
            return self.net.apply(params, x, t, label, train, rngs=rngs)

        if self.config.prediction == "edm":
            return score.precondition(net, self.sde, self.sigma_data)
        return self._direct(net)

    def potential(self, params: Any) -> Field:
        """The learned log-density ``u(x, t)``, up to a function of time; with ``fokker_planck``."""
        params = self.weights(params)
        return fokker_planck.precondition_potential(
            lambda x, t: self.net.apply(params, x, t), self.sde, self.sigma_data
        )

    def _direct(self, net: Field) -> Field:
        sde = self.sde

        def field(x: jax.Array, t: jax.Array) -> jax.Array:
            alpha, sigma = sde.alpha(t), sde.sigma(t)
            size = jnp.sqrt(sigma**2 + (alpha * self.sigma_data) ** 2)
            level = jnp.clip(sde.log_snr(t), sde.log_snr(sde.t_max), sde.log_snr(sde.t_min))
            out = net((x / left_broadcast(size, x)).astype(x.dtype), -level / 8)
            # A score is of the order of 1/sigma, which a network is not asked to produce.
            return out / left_broadcast(sigma, x) if self.prediction == "score" else out

        return field

    def to_model(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Raw examples as the network is shown them: integers dequantised, floats scaled."""
        if self.train.levels is None:
            return (x - self.train.shift) / self.train.scale
        return solve.dequantize(key, x, self.train.levels, data_range=DATA_RANGE)

    def loss(self, key: jax.Array, params: Any, batch: Any) -> jax.Array:
        """Per-example losses ``(n,)`` of a batch of raw examples."""
        key_data, key_label, key_dropout, key_loss = jax.random.split(key, 4)
        x0 = self.to_model(key_data, batch["x"])
        label = None
        if self.config.labels:
            hidden = keys.uniform(key_label, x0.shape[:1]) < self.config.label_dropout
            label = jnp.where(hidden, self.train.num_classes or 0, batch["label"])
        named = self.config.weighting
        weighting = score.weighting.edm(self.sigma_data) if named == "edm" else named
        if self.config.fokker_planck is not None:
            return fokker_planck.regularised_loss(
                key_loss,
                self.potential(params),
                self.sde,
                x0,
                weight=self.config.fokker_planck,
                weighting=weighting,
                time=self.config.times,
                # In this unit one weight serves every process.
                residual_weighting=fokker_planck.per_log_level,
            )
        return score.denoising_loss(
            key_loss,
            self.field(params, label, dropout_key=key_dropout),
            self.sde,
            x0,
            prediction=self.prediction,
            weighting=weighting,
            time=self.config.times,
        )

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam with a warm-up, and a decay if asked; on pools it clips too, in units of weights."""
        config = self.config
        rate: float | Callable[[Any], Any] = config.learning_rate
        if config.schedule == "cosine":
            end = max(config.steps, config.warmup_steps + 1)
            rate = optax.warmup_cosine_decay_schedule(
                0.0, config.learning_rate, config.warmup_steps, end
            )
        elif config.warmup_steps:
            rate = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
        if self.sharing is None:
            return optax.adamw(rate, weight_decay=config.weight_decay)
        rule = optax.chain(optax.clip_by_global_norm(config.clip), optax.scale_by_adam())
        return optax.chain(
            self.sharing.in_units_of_weights(rule),
            # Decay of a pool is decay of its weights.
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(rate),
        )

    def make_step(self) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
        """The training step; see ``train.make_train_step``."""
        config = self.config
        return make_train_step(
            self.loss,
            self.optimizer,
            ema=config.ema,
            clip=config.clip if self.sharing is None else None,
            accumulate=config.accumulate,
            dtype=None if config.precision == "float32" else jnp.dtype(config.precision),
            # Dropout draws for the batch as a whole, and the penalty is a mean over it.
            per_example=config.dropout == 0 and config.fokker_planck is None,
        )

    def state(self) -> TrainState:
        """The state before the first step, which the seed determines."""
        key_init, key_run = jax.random.split(jax.random.key(self.config.seed))
        return TrainState.create(key_run, self.init(key_init), self.optimizer)

    def parameters(self) -> int:
        """Number of numbers that are trained: the network's weights, or pools and the rest."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _check_potential(config: Resolved, data: Dataset) -> None:
    """Refuse what does not go with a learned log-density.

    Raises:
      ConfigError: which setting, and what would do.
    """
    if len(data.event) != 1 or data.event[0] > _POTENTIAL_DIMS:
        raise ConfigError(
            f"fokker_planck is for points of at most {_POTENTIAL_DIMS} numbers, such as moons; "
            f"{data.name} holds examples of shape {data.event}; leave it out"
        )
    if config.prediction not in ("edm", "score"):
        raise ConfigError(
            f"prediction is {config.prediction}; with fokker_planck a log-density is learned, "
            "whose gradient is the score: leave prediction out"
        )
    plain = {"labels": False, "dropout": 0.0, "precision": "float32", "remat": False}
    for name, unset in plain.items():
        if getattr(config, name) != unset:
            raise ConfigError(
                f"{name} is {getattr(config, name)}, which does not go with fokker_planck; leave "
                "it out"
            )


def build(config: Resolved, data: Dataset) -> Experiment:
    """The experiment of a configuration and its data.

    Raises:
      ConfigError: they do not fit together.
    """
    if config.labels and data.num_classes is None:
        raise ConfigError(f"labels is set, but {data.name} has none; leave it out")
    try:
        train, held_out = data.split(config.held_out, config.seed)
    except ValueError as error:
        raise ConfigError(f"held_out does not suit the data: {error}") from None
    dtype = jnp.dtype(config.precision) if config.precision != "float32" else None
    shared: dict[str, Any] = {
        "width": config.width,
        "num_classes": data.num_classes if config.labels else None,
        "dropout": config.dropout,
        "time_scale": _TIME_SCALE,
        "dtype": dtype,
        "remat": config.remat,
    }
    if config.fokker_planck is not None:
        _check_potential(config, data)
        net: Any = PotentialMLP(config.width, config.blocks, softplus(_SHARPNESS))
    elif data.is_image:
        net = nets.UNet(
            **shared,
            channel_mults=config.channel_mults,
            blocks=config.blocks,
            attention=config.attention,
            patch=config.patch,
        )
    elif len(data.event) == 1:
        net = nets.MLP(**shared, depth=config.blocks)
    else:
        raise ConfigError(f"{data.name} holds examples of shape {data.event}; no network fits them")
    cell = 0.0 if data.levels is None else (2 / data.levels) ** 2 / 12
    sigma_data = math.sqrt(float(np.mean(np.square(train.to_unit(train.x), dtype=float))) + cell)
    sde = make_process(config.process, config.process_args)
    experiment = Experiment(config, train, held_out, net, sde, sigma_data)
    if config.share is None:
        return experiment
    try:
        sharing = plan_sharing(
            experiment.init_network, config.share, scheme=config.share_scheme, seed=config.seed
        )
    except ValueError as error:
        raise ConfigError(f"share is {config.share:g}, which does not suit: {error}") from None
    return dataclasses.replace(experiment, sharing=sharing)
