"""The state of a run and the one jitted step that advances it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Float, Int, PRNGKeyArray, Scalar
from tokenlab.core.context import Context, View
from tokenlab.core.ledger import Ledger, saved_bytes
from tokenlab.core.progress import given_progress
from tokenlab.core.rng import stream
from tokenlab.core.weighted import Weighted
from tokenlab.data.base import OnPolicy
from tokenlab.objectives import Objective
from tokenlab.train.mesh import batch_sharding, placed_on, shardings


@flax.struct.dataclass
class TrainState:
    """All that a step changes.

    Attributes:
        step: steps done.
        params: float32 parameters.
        opt_state: the optimiser's state.
        ema: exponential moving average of the parameters, or None.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    ema: PyTree = None

    @property
    def best_params(self) -> PyTree:
        """The averaged parameters where there are any; what evaluations and samples use."""
        return self.params if self.ema is None else self.ema


@flax.struct.dataclass
class StepMetrics:
    """What one step reports.

    Attributes:
        loss: the objective's value before the update.
        sums: undivided total and weight of every term.
        means: their means, divided on the device so that the host reads and never computes.
        grad_norm: global norm of the gradient before clipping, of what is trained.
        learning_rate: of this update.
        ledger: forward passes of this step.
    """

    loss: Scalar
    sums: dict[str, Weighted]
    means: dict[str, Scalar]
    grad_norm: Scalar
    learning_rate: Scalar
    ledger: Ledger


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """Builds the state and advances it; holds no array.

    Attributes:
        model: the policy.
        objective: what is minimised.
        optimizer: the optax transformation.
        schedule: learning rate by step.
        mesh: the devices.
        seed: of all random streams.
        accumulation: micro-batches per step; equal to the full batch in value.
        ema_decay: decay of the parameter average, or None for none.
        views: models beside the policy, by name; their parameters do not change.
        rollouts: what makes rows of the policy's own of each batch, or None.
        moves: tells of each parameter whether the optimiser moves it, so that no gradient is
            computed of the others; None is all.
        total_steps: of the run, of which the model is told the share that is done; None tells it
            nothing.
    """

    model: nn.Module
    objective: Objective
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mesh: jax.sharding.Mesh
    seed: int = 0
    accumulation: int = 1
    ema_decay: float | None = None
    views: Mapping[str, View] = dataclasses.field(default_factory=dict)
    rollouts: OnPolicy | None = None
    moves: Callable[[PyTree], PyTree] | None = None
    total_steps: int | None = None

    def _params(self, model: nn.Module | None = None) -> PyTree:
        """Initial parameters, still boxed with the logical names of their axes."""
        tokens = jnp.zeros((1, 8), jnp.int32)
        key, model = stream(self.seed, "init"), model or self.model
        return model.init(key, tokens, positions=tokens, segments=tokens + 1)["params"]

    def _first(self, params: PyTree | None = None) -> TrainState:
        params = nn.meta.unbox(self._params()) if params is None else params
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(params),
            ema=None if self.ema_decay is None else jax.tree.map(jnp.copy, params),
        )

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, without computing it.

        What the optimiser keeps per parameter lies as the parameter does; the rest is copied.
        """
        with placed_on(self.mesh):
            placed = shardings(jax.eval_shape(self._params), self.mesh)
            state = jax.eval_shape(self._first)
        copied = NamedSharding(self.mesh, PartitionSpec())
        opt_state = _like_params(state.opt_state, params=placed, otherwise=copied)
        ema = None if state.ema is None else placed
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            state.replace(step=copied, params=placed, opt_state=opt_state, ema=ema),
        )

    def init(self, params: PyTree | None = None) -> TrainState:
        """The first state, created in place on its devices.

        Args:
            params: parameters to start from, which the first step gives up; None draws them.
        """
        out = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        with placed_on(self.mesh):
            if params is not None:
                params = jax.device_put(params, out.params)
            return jax.jit(self._first, out_shardings=out)(params)

    def put(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """This process's rows as global device arrays, without the numbers of their documents."""
        sharding = batch_sharding(self.mesh)
        return {
            name: jax.make_array_from_process_local_data(sharding, rows)
            for name, rows in batch.items()
            if name != "documents"
        }

    def _frozen_shardings(self) -> dict[str, PyTree]:
        return {
            name: shardings(jax.eval_shape(functools.partial(self._params, view.model)), self.mesh)
            for name, view in self.views.items()
        }

    @functools.cached_property
    def frozen(self) -> dict[str, PyTree]:
        """The parameters of the other views, on the devices of the mesh."""
        placed = self._frozen_shardings()
        return {name: jax.device_put(self.views[name].params, placed[name]) for name in placed}

    @functools.cached_property
    def jitted(self) -> jax.stages.Wrapped:
        """The step as compiled; to be called with the mesh in force, as :meth:`step` does."""
        out = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        return jax.jit(self._step, donate_argnums=0, out_shardings=(out, None))

    def step(self, state: TrainState, batch: Mapping[str, Array]) -> tuple[TrainState, StepMetrics]:
        """The next state; the old one's buffers are given up to it."""
        with placed_on(self.mesh):
            return self.jitted(state, batch, self.frozen)

    def lower(self, *, batch_size: int, length: int) -> jax.stages.Lowered:
        """The step for a mesh whose devices may be absent, ready to ``compile()``.

        Args:
            batch_size: rows of all devices together.
            length: tokens of a row.
        """
        dtypes = {name: jnp.int32 for name in ("tokens", "targets", "positions", "segments")}
        batch = {
            name: jax.ShapeDtypeStruct(
                (batch_size, length), dtype, sharding=batch_sharding(self.mesh)
            )
            for name, dtype in (dtypes | {"weights": jnp.float32}).items()
        }
        with placed_on(self.mesh):
            placed = self._frozen_shardings()
            frozen = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=sharding
                ),
                {name: self.views[name].params for name in placed},
                placed,
            )
            return self.jitted.lower(self.abstract_state(), batch, frozen)

    def _step(
        self,
        state: TrainState,
        batch: Mapping[str, Array],
        frozen: Mapping[str, PyTree],
    ) -> tuple[TrainState, StepMetrics]:
        key = stream(self.seed, "step", state.step)
        others = {
            name: View(model=self.views[name].model, params=params)
            for name, params in frozen.items()
        }
        given, drawing = {}, Ledger()
        if self.total_steps is not None:
            given = given_progress(jnp.float32(state.step) / self.total_steps)
        if self.rollouts is not None:
            policy = View(model=self.model, params=state.params, given=given)
            batch, drawing = self.rollouts.rolled(batch, policy=policy, key=stream(key, "rollouts"))
        grads, sums, ledger = self._gradient(state.params, batch, key, others, given)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if self.ema_decay is not None:
            ema = optax.incremental_update(params, ema, 1.0 - self.ema_decay)
        metrics = StepMetrics(
            loss=jnp.asarray(self.objective.value(sums)),
            sums=sums,
            means={name: part.mean() for name, part in sums.items()},
            grad_norm=optax.tree.norm(grads),
            learning_rate=jnp.asarray(self.schedule(state.step), jnp.float32),
            ledger=ledger.merge(drawing),
        )
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics

    def _gradient(
        self,
        params: PyTree,
        batch: Mapping[str, Array],
        key: PRNGKeyArray,
        others: Mapping[str, View],
        given: Mapping[str, PyTree],
    ) -> tuple[PyTree, dict[str, Weighted], Ledger]:
        """Gradient of the objective over the whole batch, micro-batch by micro-batch.

        The denominators of all terms are summed over the batch first, so that the gradients of
        micro-batches add up to the full batch's. Where weights do not depend on the model, the
        compiler drops the forward passes of that first sweep.
        """

        def loss(params, weights, index, rows):
            if self.moves is not None:
                params = jax.tree.map(
                    lambda leaf, moves: leaf if moves else jax.lax.stop_gradient(leaf),
                    params,
                    self.moves(params),
                )
            context = Context(
                batch=rows,
                views={
                    "policy": View(model=self.model, params=params, given=given),
                    **others,
                },
                key=stream(key, "micro_batch", index),
                train=True,
            )
            sums = self.objective(context)
            scaled = sums if weights is None else _with_weights(sums, weights)
            return self.objective.value(scaled), (sums, self._ledger(context))

        def gradient(params, weights, index, rows):
            value, pullback, (sums, ledger) = jax.vjp(
                lambda params: loss(params, weights, index, rows), params, has_aux=True
            )
            saved = saved_bytes(pullback, params, rows)
            ledger = dataclasses.replace(ledger, saved_bytes=jnp.float32(saved))
            return pullback(jnp.ones_like(value))[0], (sums, ledger)

        if self.accumulation == 1:
            grads, (sums, ledger) = gradient(params, None, 0, batch)
            return grads, sums, ledger

        micro = (jnp.arange(self.accumulation), jax.tree.map(self._split, dict(batch)))

        def weigh(_, item):
            _value, (sums, _ledger) = loss(params, None, *item)
            return None, {name: part.weight for name, part in sums.items()}

        weights = jax.lax.scan(weigh, None, micro)[1]
        weights = jax.tree.map(lambda parts: jnp.sum(parts, axis=0), weights)

        def accumulate(carry, item):
            return jax.tree.map(jnp.add, carry, gradient(params, weights, *item)), None

        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(gradient, params, weights, *first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (grads, (sums, ledger)), _ = jax.lax.scan(accumulate, zeros, micro)
        return grads, sums, ledger

    def _split(self, rows: Array) -> Array:
        """Micro-batches along a new first axis; each takes rows from every device."""
        if rows.shape[0] % self.accumulation:
            raise ValueError(
                f"batch of {rows.shape[0]} rows does not split into {self.accumulation} parts"
            )
        split = rows.reshape(-1, self.accumulation, *rows.shape[1:])
        return jnp.moveaxis(split, 1, 0)

    def _ledger(self, context: Context) -> Ledger:
        batch = context.batch
        return self.model.ledger(
            context.output().trace, positions=batch["positions"], segments=batch["segments"]
        )


def _with_weights(
    sums: Mapping[str, Weighted], weights: Mapping[str, Float[Array, "*R"]]
) -> dict[str, Weighted]:
    return {name: Weighted(total=s.total, weight=weights[name]) for name, s in sums.items()}


def _like_params(opt_state: PyTree, *, params: PyTree, otherwise: Any) -> PyTree:
    """For each leaf the entry of the parameter whose path its own path ends with."""
    entries = dict(jax.tree_util.tree_flatten_with_path(params)[0])

    def entry(path: tuple, leaf: Any) -> Any:
        ends = (path[start:] for start in range(len(path)))
        return next((entries[end] for end in ends if leaf.ndim and end in entries), otherwise)

    return jax.tree_util.tree_map_with_path(entry, opt_state)
