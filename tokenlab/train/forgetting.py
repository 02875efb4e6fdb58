"""Parameters that are drawn anew while a model trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Int
from tokenlab.core.duration import Clock, Duration
from tokenlab.core.errors import UserError
from tokenlab.core.rng import stream

# Which parameters are drawn anew, as a tree of "forgotten" and "kept".
Labels = Callable[[PyTree], PyTree]


class ForgettingState(NamedTuple):
    """State of an optimiser that forgets.

    Attributes:
        step: updates done.
        inner: of the optimiser itself.
    """

    step: Int[Array, ""]
    inner: PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forgetting:
    """Every ``every`` steps some parameters are drawn anew: active forgetting, or temporary.

    Step t draws them from ``N(0, deviation²)`` in the place of its update where t is a multiple of
    ``every``, above 0 and below ``until``, and clears what the optimiser keeps of them, with the
    count by which it corrects its means. Schedules of rates go on. Whatever is measured after a
    multiple of ``every`` steps is measured just before the draw.

    Reference: Anand, Lepori, Merullo, Pavlick, "Dual Process Learning: Controlling Use of
    In-Context vs. In-Weights Strategies with Weight Forgetting", 2024, arXiv:2406.00053; Chen et
    al., "Improving Language Plasticity via Pretraining with Active Forgetting", 2023,
    arXiv:2307.01163.

    Differences from the paper: with ``reset_scope="embeddings"`` the moments of other parameters
    stay; the released code clears them all, as ``"all"`` does.

    Attributes:
        every: distance between draws.
        until: no draw from this step on (temporary forgetting); None never ends.
        parameters: patterns (``*`` is any text) of what is drawn anew.
        deviation: standard deviation of the draws.
        reset_scope: whose moments are cleared: of what is drawn anew, or of all parameters.
        seed: of the draws.
    """

    every: Duration
    until: Duration | None = None
    parameters: tuple[str, ...] = ("embedding",)
    deviation: float = 0.02
    reset_scope: Literal["embeddings", "all"] = "embeddings"
    seed: int = 0

    def around(
        self, inner: optax.GradientTransformation, *, labels: Labels, clock: Clock
    ) -> optax.GradientTransformation:
        """The transformation that also forgets.

        Args:
            inner: the optimiser, with a state of its own for what is forgotten, so that clearing it
                leaves the counts of all else.
            labels: of its partition.
            clock: of the run.

        Raises:
            UserError: the distance between draws is no step.
        """
        every = clock.steps(self.every)
        if every < 1:
            raise UserError(f"Forgetting.every {self.every} is {every} steps; use 1 or more")
        until = None if self.until is None else clock.steps(self.until)

        def init(params: PyTree) -> ForgettingState:
            return ForgettingState(step=jnp.zeros((), jnp.int32), inner=inner.init(params))

        def update(
            updates: PyTree, state: Any, params: PyTree | None = None
        ) -> tuple[PyTree, ForgettingState]:
            assert params is not None
            updates, kept = inner.update(updates, state.inner, params)
            step = state.step
            due = (step > 0) & (step % every == 0)
            if until is not None:
                due &= step < until
            which = labels(params)

            def forget(updates: PyTree, kept: PyTree) -> tuple[PyTree, PyTree]:
                drawn = self._drawn(params, which, step)
                updates = jax.tree.map(
                    lambda label, new, old, update: new - old if label == "forgotten" else update,
                    which, drawn, params, updates,
                )  # fmt: skip
                return updates, self._cleared(kept, inner.init(params))

            def keep(updates: PyTree, kept: PyTree) -> tuple[PyTree, PyTree]:
                return updates, kept

            updates, kept = jax.lax.cond(due, forget, keep, updates, kept)
            return updates, ForgettingState(step=step + 1, inner=kept)

        return optax.GradientTransformation(init, update)

    def _drawn(self, params: PyTree, which: PyTree, step: Int[Array, ""]) -> PyTree:
        leaves, tree = jax.tree.flatten(params)
        new = [
            self.deviation
            * jax.random.normal(
                stream(self.seed, "forgetting", number, step), leaf.shape, leaf.dtype
            )
            if label == "forgotten"
            else leaf
            for number, (leaf, label) in enumerate(zip(leaves, jax.tree.leaves(which), strict=True))
        ]
        return jax.tree.unflatten(tree, new)

    def _cleared(self, state: PyTree, fresh: PyTree) -> PyTree:
        """``state`` with the parts that are forgotten as in ``fresh``, but for rates' counts."""
        clip, parts = state
        labels = parts.inner_states if self.reset_scope == "all" else ("forgotten",)
        cleared = {
            label: jax.tree.map(
                lambda old, new: old if _is_schedule(old) else new,
                parts.inner_states[label],
                fresh[1].inner_states[label],
                is_leaf=_is_schedule,
            )
            for label in labels
        }
        return clip, parts._replace(inner_states={**parts.inner_states, **cleared})


def _is_schedule(state: PyTree) -> bool:
    return isinstance(state, optax.ScaleByScheduleState)
