"""What the best choice of options would have cost: oracles, difficulty of tokens, random routes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from kernels_pallas.block_sparse_attention import MaskRule
from tokenlab.core.arrays import Array, Bool, Float, Int
from tokenlab.core.context import Context, View
from tokenlab.models import Attention, RoutedMixer, Transformer, layered, unrolled
from tokenlab.models.routed import given_options

Patterns = Int[np.ndarray, "P U"] | Int[np.ndarray, "P U B T"]


def all_patterns(options: Sequence[int]) -> Int[np.ndarray, "P U"]:
    """Every choice of an option for each unit, the first one all zeros.

    Args:
        options: how many each unit has.
    """
    return np.asarray(list(itertools.product(*map(range, options))), np.int32)


def executed(patterns: Int[np.ndarray, "P U"]) -> Int[np.ndarray, " P"]:
    """Units that run themselves in each pattern: those with option 0."""
    return np.sum(patterns == 0, axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BesideReference:
    """Rows that stand twice: as they are, and behind it each token by itself among the others.

    Segment s of a document becomes ``2s - 1`` in the first half, which sees itself as ``rule``
    says, and ``2s`` in the second, whose tokens see the first half in the place of each other, and
    themselves. So one pass gives what each token would be if it alone were computed otherwise.

    Attributes:
        rule: who sees whom in a row.
    """

    rule: MaskRule

    def __call__(
        self,
        q_pos: Int[Array, ...],
        kv_pos: Int[Array, ...],
        q_seg: Int[Array, ...],
        kv_seg: Int[Array, ...],
    ) -> Bool[Array, ...]:
        """As ``rule``, but keys of the second half for their own token alone."""
        shown = self.rule(q_pos, kv_pos, (q_seg + 1) // 2, (kv_seg + 1) // 2)
        alone = (q_seg % 2 == 0) & (q_pos == kv_pos)
        return shown & jnp.where(alone, kv_seg == q_seg, kv_seg % 2 == 1)

    def block_map(
        self, block_q: int, block_k: int, num_q: int, num_k: int
    ) -> Bool[np.ndarray, "num_q num_k"]:
        """Every block."""
        return np.ones((num_q, num_k), bool)


def pattern_nats(
    view: View,
    batch: Mapping[str, Any],
    patterns: Patterns,
    *,
    reference: Sequence[int] | None = None,
    chunk: int = 16,
) -> Float[np.ndarray, "P B T"]:
    """Nats of every target under every pattern of options; routers are not asked.

    Without a ``reference`` all tokens of a row follow a pattern: what the oracle of sequences
    compares. With one, a token follows the pattern and all tokens before it the reference, whose
    keys and values it reads: what the oracle of tokens compares.

    Reference: the second stage of Alizadeh et al., "Duo-LLM: A Framework for Studying Adaptive
    Computation in Large Language Models", 2024, arXiv:2410.10846.

    Args:
        view: a model with stand-ins.
        batch: ``tokens``, ``targets``, ``positions``, ``segments``.
        patterns: option of each of ``units(model)``, for all tokens or for each.
        reference: option of each unit in the context.
        chunk: patterns computed together.
    """
    model, params = unrolled(cast(Transformer, view.model), view.params)
    fields = ("tokens", "targets", "positions", "segments")
    rows = {name: jnp.asarray(batch[name]) for name in fields}
    if reference is not None:
        model = _beside(model)
        rows = {name: jnp.concatenate([each, each], axis=1) for name, each in rows.items()}
        segments = np.asarray(batch["segments"])
        halves = [np.where(segments > 0, 2 * segments - 1, 0), 2 * segments]
        rows["segments"] = jnp.asarray(np.concatenate(halves, axis=1), jnp.int32)
    fixed = None if reference is None else jnp.asarray(reference, jnp.int32)
    nats = _nats(model, params, rows, jnp.asarray(patterns, jnp.int32), fixed, chunk=chunk)
    return np.asarray(nats)[..., -batch["tokens"].shape[1] :]


@functools.partial(jax.jit, static_argnames=("model", "chunk"))
def _nats(
    model: Transformer,
    params: PyTree,
    rows: Mapping[str, Array],
    patterns: Int[Array, "P U"] | Int[Array, "P U B T"],
    reference: Int[Array, " U"] | None,
    *,
    chunk: int,
) -> Float[Array, "P B S"]:
    shape = rows["tokens"].shape

    def of(pattern: Array) -> Array:
        options = pattern
        if reference is not None:
            half = (len(reference), shape[0], shape[1] // 2)
            wide = [x if x.ndim > 1 else x[:, None, None] for x in (reference, pattern)]
            options = jnp.concatenate([jnp.broadcast_to(x, half) for x in wide], axis=2)
        view = View(model=model, params=params, given=given_options(model, options))
        return -Context(batch=rows, views={"policy": view}).token_logp()

    return jax.lax.map(of, patterns, batch_size=min(chunk, len(patterns)))


def _beside(model: Transformer) -> Transformer:
    """With tokens of the second half of a row by themselves."""

    def changed(mixer: Any) -> Any:
        if isinstance(mixer, RoutedMixer):
            return mixer.clone(unit=changed(mixer.unit))
        assert isinstance(mixer, Attention)
        return mixer.clone(rule=BesideReference(rule=mixer.rule))

    kinds = tuple(kind.clone(mixer=changed(kind.mixer)) for kind in model.block.kinds())
    return model.clone(block=layered(kinds))


def best_by_budget(
    nats: Float[np.ndarray, " P *N"], units: Int[np.ndarray, " P"], *, at_most: bool = False
) -> dict[int, Float[np.ndarray, "*N"]]:
    """Of the patterns of each budget, what the best one costs each token or row: the oracle.

    It has seen the targets, so it is a bound and no policy.

    Args:
        nats: of each pattern.
        units: units that run in each pattern.
        at_most: whether a budget may be left unspent.
    """
    return {
        int(k): np.min(nats[(units <= k) if at_most else (units == k)], axis=0)
        for k in np.unique(units)
    }


def difficulty(
    nats: Float[np.ndarray, " P *N"], cheapest: Float[np.ndarray, "*N"]
) -> Float[np.ndarray, "*N"]:
    """How much computing helps a token: nats of the cheapest pattern, less those of the best.

    A token of many nats and low difficulty is hard, but not for want of computing.

    Reference: as :func:`pattern_nats`.

    Args:
        nats: of each pattern.
        cheapest: of the pattern that runs nothing, or all small ones.
    """
    return cheapest - np.min(nats, axis=0)


def random_routes(
    nats: Float[np.ndarray, " P *N"], *, trials: int, rng: np.random.Generator
) -> Float[np.ndarray, " S"]:
    """Mean nats of ``trials`` routes that give each token one of the patterns by chance.

    Args:
        nats: of each pattern of one budget.
        trials: how many routes.
        rng: of the draws.
    """
    flat = nats.reshape(len(nats), -1)
    drawn = rng.integers(len(flat), size=(trials, flat.shape[1]))
    return np.mean(flat[drawn, np.arange(flat.shape[1])], axis=1)
