"""Tiles of logits in VMEM, recomputed in the backward pass by one kernel per gradient.

A kernel keeps one side of its tiles and walks over the other, innermost and in order, so that
what it sums stays in VMEM. Tokens lie on lanes where the sums go over the vocabulary, which are
then additions of whole registers; only the kernel of the hidden states' gradient has them on
sublanes, as its second product takes the tile untransposed that way.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.common import dispatch
from kernels_pallas.linear_cross_entropy.ref import capped
from kernels_pallas.linear_cross_entropy.specs import (
    VMEM_BYTES,
    LinearCrossEntropyConfig,
    Pass,
    TargetLogits,
    Tile,
    VocabularyStatistics,
)

# Stands in for -inf, whose differences would be NaN.
_NEVER = -1e30
# Rows of what the forward kernel carries and returns; a sublane tile in all.
_TARGET, _LOG_SUM_EXP, _MEAN, _ENTROPY, _HIGHEST, _BEST = range(6)
_ROWS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What is static: ``statistics`` asks for entropy and arg-max as well."""

    softcap: float | None
    statistics: bool
    config: LinearCrossEntropyConfig


class _Tokens(NamedTuple):
    """Rows of one number per token that the backward kernels read, in this order."""

    target: Any
    log_sum_exp: Any
    by_target: Any
    by_log_sum_exp: Any
    by_mean: Any  # by each logit
    by_entropy: Any
    expected: Any  # logit under the softmax
    floor: Any  # gradients up to it may be left out


class _Problem(NamedTuple):
    """One kernel's sizes."""

    tokens: int
    vocabulary: int
    width: int
    tile: Tile


def supports(*, hidden, weight, config: LinearCrossEntropyConfig, **rest: Any) -> str | None:
    """Why the kernels cannot take these arguments, or ``None``."""
    del rest
    reason = dispatch.needs("tpu", config.interpret)
    if reason:
        return reason
    for name, array in (("hidden", hidden), ("weight", weight)):
        if array.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} is {array.dtype}, not bfloat16 or float32"
    for name in ("block_tokens", "block_vocabulary"):
        size = getattr(config, name)
        if size is not None and (size <= 0 or size % 128):
            return f"{name}={size} is not a multiple of 128"
    if weight.shape[0] >= 2**24:
        return f"a vocabulary of {weight.shape[0]} has ids that float32 cannot hold"
    if 0 in (*hidden.shape, *weight.shape):
        return f"hidden {hidden.shape} or weight {weight.shape} is empty"
    for which in ("forward", "by_hidden", "by_weight"):
        if _tile(which, hidden, weight, config) is None:
            return f"no tile of width {hidden.shape[-1]} fits {VMEM_BYTES >> 20} MiB of VMEM"
    return None


def linear_cross_entropy(
    *,
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    bias: Float[Array, " V"] | None,
    softcap: float | None,
    config: LinearCrossEntropyConfig,
) -> TargetLogits:
    """See :func:`kernels_pallas.linear_cross_entropy.linear_cross_entropy`."""
    call = Call(softcap=softcap, statistics=False, config=config)
    rows = _run(call, hidden, weight, bias, targets)
    return TargetLogits(*(row.reshape(targets.shape) for row in rows))


def vocabulary_statistics(
    *,
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    bias: Float[Array, " V"] | None,
    softcap: float | None,
    config: LinearCrossEntropyConfig,
) -> VocabularyStatistics:
    """See :func:`kernels_pallas.linear_cross_entropy.vocabulary_statistics`."""
    call = Call(softcap=softcap, statistics=True, config=config)
    rows = (row.reshape(targets.shape) for row in _run(call, hidden, weight, bias, targets))
    *differentiable, highest, best = rows
    return VocabularyStatistics(
        *differentiable,
        highest=lax.stop_gradient(highest),
        best=lax.stop_gradient(best).astype(jnp.int32),
    )


def _run(call: Call, hidden, weight, bias, targets) -> Float[Array, "rows N"]:
    vocabulary = weight.shape[0]
    known = (targets >= 0) & (targets < vocabulary)
    ids = jnp.where(known, targets, -1).astype(jnp.int32).reshape(1, targets.size)
    row = None if bias is None else bias.reshape(1, vocabulary)
    return _statistics(call, hidden.reshape(targets.size, -1), weight, row, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(call: Call, hidden, weight, bias, targets) -> Float[Array, "rows N"]:
    return forward(call, hidden, weight, bias, targets)[0]


def forward(call: Call, hidden, weight, bias, targets):
    """Rows of statistics, and what the backward pass needs."""
    problem = _problem("forward", hidden, weight, call.config)
    tile = problem.tile
    rows = 6 if call.statistics else 3
    out = pl.pallas_call(
        functools.partial(_forward_kernel, call, problem),
        grid=(pl.cdiv(problem.tokens, tile.tokens), pl.cdiv(problem.vocabulary, tile.vocabulary)),
        in_specs=[
            pl.BlockSpec((tile.tokens, problem.width), lambda i, j: (i, 0)),
            pl.BlockSpec((tile.vocabulary, problem.width), lambda i, j: (j, 0)),
            None if bias is None else pl.BlockSpec((1, tile.vocabulary), lambda i, j: (0, j)),
            pl.BlockSpec((1, tile.tokens), lambda i, j: (0, i)),
        ],
        out_specs=pl.BlockSpec((rows, tile.tokens), lambda i, j: (0, i)),
        out_shape=jax.ShapeDtypeStruct((rows, problem.tokens), jnp.float32),
        scratch_shapes=[pltpu.VMEM((_ROWS, tile.tokens), jnp.float32)],
        name="linear_cross_entropy_forward",
        **_options(call),
    )(hidden, weight, _float32(bias), targets)
    entropy = out[_ENTROPY] if call.statistics else None
    return out, (hidden, weight, bias, targets, out[_LOG_SUM_EXP], entropy)


def _backward(call: Call, residuals, cotangents):
    hidden, weight, bias, targets, log_sum_exp, entropy = residuals
    place = None
    if call.config.skip_below and call.config.sort_vocabulary:
        order = jnp.argsort(_mean_logits(hidden, weight, bias, cotangents))
        place = jnp.argsort(order)
        weight, bias = weight[order], None if bias is None else bias[:, order]
        targets = jnp.where(targets < 0, -1, place[targets])
    tokens = _tokens(call, targets, log_sum_exp, entropy, cotangents, weight.shape[0])
    to_hidden = by_hidden(call, hidden, weight, _float32(bias), tokens)
    if not call.config.skip_weight:
        call = dataclasses.replace(call, config=dataclasses.replace(call.config, skip_below=0.0))
    to_weight, to_bias = by_weight(call, hidden, weight, _float32(bias), tokens)
    if place is not None:
        to_weight, to_bias = to_weight[place], None if bias is None else to_bias[:, place]
    to_bias = None if bias is None else to_bias.astype(bias.dtype)
    return to_hidden, to_weight, to_bias, None


def _mean_logits(hidden, weight, bias, cotangents) -> Float[Array, " V"]:
    """Mean over the tokens that have a gradient, before the cap, which keeps the order."""
    counts = jnp.any(cotangents != 0.0, axis=0).astype(jnp.float32)
    mean = counts @ hidden.astype(jnp.float32) / jnp.maximum(jnp.sum(counts), 1.0)
    logits = weight.astype(jnp.float32) @ mean
    return logits if bias is None else logits + bias[0].astype(jnp.float32)


_statistics.defvjp(forward, _backward)


def _tokens(call, targets, log_sum_exp, entropy, cotangents, vocabulary) -> Float[Array, "8 N"]:
    """:class:`_Tokens` as rows of one array."""
    zeros = jnp.zeros_like(log_sum_exp)
    by_target, by_log_sum_exp = cotangents[_TARGET], cotangents[_LOG_SUM_EXP]
    by_mean = cotangents[_MEAN]
    by_entropy = cotangents[_ENTROPY] if call.statistics else zeros
    scale = jnp.maximum(jnp.abs(by_target), jnp.abs(by_log_sum_exp))
    scale = jnp.maximum(scale, jnp.abs(by_entropy))
    return jnp.stack(
        _Tokens(
            target=targets[0].astype(jnp.float32),
            log_sum_exp=log_sum_exp,
            by_target=by_target,
            by_log_sum_exp=by_log_sum_exp,
            by_mean=by_mean / vocabulary,
            by_entropy=by_entropy,
            expected=log_sum_exp - entropy if call.statistics else zeros,
            floor=jnp.where(by_mean != 0.0, -1.0, call.config.skip_below * scale),
        )
    )


def by_hidden(call: Call, hidden, weight, bias, tokens) -> Float[Array, "N D"]:
    """Gradient by the hidden states."""
    problem = _problem("by_hidden", hidden, weight, call.config)
    tile = problem.tile
    return pl.pallas_call(
        functools.partial(_by_hidden_kernel, call, problem),
        grid=(pl.cdiv(problem.tokens, tile.tokens), pl.cdiv(problem.vocabulary, tile.vocabulary)),
        in_specs=[
            pl.BlockSpec((tile.tokens, problem.width), lambda i, j: (i, 0)),
            pl.BlockSpec((tile.vocabulary, problem.width), lambda i, j: (j, 0)),
            None if bias is None else pl.BlockSpec((1, tile.vocabulary), lambda i, j: (0, j)),
            pl.BlockSpec((_ROWS, tile.tokens), lambda i, j: (0, i)),
        ],
        out_specs=pl.BlockSpec((tile.tokens, problem.width), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct(hidden.shape, hidden.dtype),
        scratch_shapes=[
            pltpu.VMEM((tile.tokens, problem.width), jnp.float32),
            pltpu.VMEM((tile.tokens, _ROWS), jnp.float32),
        ],
        name="linear_cross_entropy_by_hidden",
        **_options(call),
    )(hidden, weight, bias, tokens)


def by_weight(call: Call, hidden, weight, bias, tokens):
    """Gradients by weight and bias."""
    problem = _problem("by_weight", hidden, weight, call.config)
    tile = problem.tile
    bias_spec = None if bias is None else pl.BlockSpec((1, tile.vocabulary), lambda i, j: (0, i))
    weight_spec = pl.BlockSpec((tile.vocabulary, problem.width), lambda i, j: (i, 0))
    return pl.pallas_call(
        functools.partial(_by_weight_kernel, call, problem),
        grid=(pl.cdiv(problem.vocabulary, tile.vocabulary), pl.cdiv(problem.tokens, tile.tokens)),
        in_specs=[
            pl.BlockSpec((tile.tokens, problem.width), lambda i, j: (j, 0)),
            weight_spec,
            bias_spec,
            pl.BlockSpec((_ROWS, tile.tokens), lambda i, j: (0, j)),
        ],
        out_specs=(weight_spec, bias_spec),
        out_shape=(
            jax.ShapeDtypeStruct(weight.shape, weight.dtype),
            None if bias is None else jax.ShapeDtypeStruct(bias.shape, jnp.float32),
        ),
        scratch_shapes=[
            pltpu.VMEM((tile.vocabulary, problem.width), jnp.float32),
            None if bias is None else pltpu.VMEM((tile.vocabulary, 128), jnp.float32),
        ],
        name="linear_cross_entropy_by_weight",
        **_options(call),
    )(hidden, weight, bias, tokens)


def _forward_kernel(
    call, problem, hidden_ref, weight_ref, bias_ref, targets_ref, out_ref, state_ref
):
    block, blocks = pl.program_id(1), pl.num_programs(1)
    start = block * problem.tile.vocabulary

    @pl.when(block == 0)
    def _():
        state_ref[...] = jnp.zeros_like(state_ref)
        state_ref[_HIGHEST : _HIGHEST + 1] = jnp.full((1, problem.tile.tokens), _NEVER)

    def state(row):
        return state_ref[row : row + 1]

    logits = _product(weight_ref[...], hidden_ref[...], (1, 1))
    if bias_ref is not None:
        logits += _column(bias_ref[...])
    logits = capped(logits, call.softcap)
    entries = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    masked = summed = logits
    if problem.vocabulary % problem.tile.vocabulary:
        real = entries < problem.vocabulary - start
        masked, summed = jnp.where(real, logits, _NEVER), jnp.where(real, logits, 0.0)

    here = jnp.max(masked, axis=0, keepdims=True)
    higher = jnp.maximum(state(_HIGHEST), here)
    rise = higher - state(_HIGHEST)
    shrink = jnp.exp(-rise)
    below = masked - higher
    exponential = jnp.exp(below)
    sums = {
        _TARGET: state(_TARGET) + _sum(jnp.where(entries == targets_ref[...] - start, logits, 0.0)),
        _LOG_SUM_EXP: shrink * state(_LOG_SUM_EXP) + _sum(exponential),
        _MEAN: state(_MEAN) + _sum(summed),
        _HIGHEST: higher,
    }
    if call.statistics:
        # Relative to the highest, so that large logits of little entropy do not cancel.
        moved = state(_ENTROPY) - rise * state(_LOG_SUM_EXP)
        sums[_ENTROPY] = shrink * moved + _sum(exponential * below)
        first = jnp.min(jnp.where(masked == here, entries, 2**30), axis=0, keepdims=True)
        better = here > state(_HIGHEST)
        sums[_BEST] = jnp.where(better, (first + start).astype(jnp.float32), state(_BEST))
    for row, value in sums.items():
        state_ref[row : row + 1] = value

    @pl.when(block == blocks - 1)
    def _():
        log_total = jnp.log(state(_LOG_SUM_EXP))
        out_ref[_TARGET : _TARGET + 1] = state(_TARGET)
        out_ref[_LOG_SUM_EXP : _LOG_SUM_EXP + 1] = state(_HIGHEST) + log_total
        out_ref[_MEAN : _MEAN + 1] = state(_MEAN) / problem.vocabulary
        if call.statistics:
            out_ref[_ENTROPY : _ENTROPY + 1] = log_total - state(_ENTROPY) / state(_LOG_SUM_EXP)
            out_ref[_HIGHEST : _HIGHEST + 1] = state(_HIGHEST)
            out_ref[_BEST : _BEST + 1] = state(_BEST)


def _by_hidden_kernel(
    call, problem, hidden_ref, weight_ref, bias_ref, tokens_ref, out_ref, sum_ref, columns_ref
):
    block, blocks = pl.program_id(1), pl.num_programs(1)
    start = block * problem.tile.vocabulary

    @pl.when(block == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        columns_ref[...] = jnp.transpose(tokens_ref[...])

    logits = _product(hidden_ref[...], weight_ref[...], (1, 1))
    if bias_ref is not None:
        logits += bias_ref[...]
    tokens = _Tokens(*(columns_ref[:, row : row + 1] for row in range(_ROWS)))
    gradient = _gradient(call, logits, tokens, start, vocabulary_axis=1)
    weight = weight_ref[...]
    if problem.vocabulary % problem.tile.vocabulary:
        left = problem.vocabulary - start
        gradient = jnp.where(_index(gradient.shape, 1) < left, gradient, 0.0)
        weight = jnp.where(_index((weight.shape[0], 1), 0) < left, weight, 0)

    @_unless_small(call, gradient, tokens.floor)
    def _():
        dtype = jnp.result_type(hidden_ref.dtype, weight_ref.dtype)
        sum_ref[...] += _product(gradient.astype(dtype), weight, (1, 0))

    @pl.when(block == blocks - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _by_weight_kernel(
    call,
    problem,
    hidden_ref,
    weight_ref,
    bias_ref,
    tokens_ref,
    out_ref,
    bias_out_ref,
    sum_ref,
    bias_sum_ref,
):
    block, blocks = pl.program_id(1), pl.num_programs(1)
    start = pl.program_id(0) * problem.tile.vocabulary

    @pl.when(block == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        if bias_ref is not None:
            bias_sum_ref[...] = jnp.zeros_like(bias_sum_ref)

    logits = _product(weight_ref[...], hidden_ref[...], (1, 1))
    if bias_ref is not None:
        logits += _column(bias_ref[...])
    tokens = _Tokens(*(tokens_ref[row : row + 1] for row in range(_ROWS)))
    gradient = _gradient(call, logits, tokens, start, vocabulary_axis=0)
    hidden = hidden_ref[...]
    if problem.tokens % problem.tile.tokens:
        left = problem.tokens - block * problem.tile.tokens
        gradient = jnp.where(_index(gradient.shape, 1) < left, gradient, 0.0)
        hidden = jnp.where(_index((hidden.shape[0], 1), 0) < left, hidden, 0)

    @_unless_small(call, gradient, tokens.floor)
    def _():
        dtype = jnp.result_type(hidden_ref.dtype, weight_ref.dtype)
        sum_ref[...] += _product(gradient.astype(dtype), hidden, (1, 0))
        if bias_ref is not None:
            for lane in range(0, gradient.shape[1], 128):
                bias_sum_ref[...] += gradient[:, lane : lane + 128]

    @pl.when(block == blocks - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)
        if bias_ref is not None:
            bias_out_ref[...] = _sum(jnp.transpose(bias_sum_ref[...]))


def _gradient(call: Call, logits, tokens: _Tokens, start, *, vocabulary_axis: int):
    """By the logits before the cap, through all outputs at once."""
    logits = capped(logits, call.softcap)
    share = tokens.by_log_sum_exp
    if call.statistics:
        share -= tokens.by_entropy * (logits - tokens.expected)
    gradient = share * jnp.exp(logits - tokens.log_sum_exp) + tokens.by_mean
    here = tokens.target.astype(jnp.int32) - start
    entries = _index(logits.shape, vocabulary_axis)
    gradient += jnp.where(entries == here, tokens.by_target, 0.0)
    if call.softcap is not None:
        gradient *= 1.0 - jnp.square(logits / call.softcap)
    return gradient


def _unless_small(call: Call, gradient, floor):
    """Decorates the products of a tile; what lies beyond the arrays can only keep a tile."""
    if call.config.skip_below == 0.0:
        return lambda body: body()
    return pl.when(jnp.max(jnp.where(jnp.abs(gradient) > floor, 1.0, 0.0)) > 0.0)


def _tile(which: Pass, hidden, weight, config: LinearCrossEntropyConfig) -> Tile | None:
    return config.tile(
        which,
        tokens=math.prod(hidden.shape[:-1]),
        vocabulary=weight.shape[0],
        width=hidden.shape[-1],
        itemsize=jnp.result_type(hidden.dtype, weight.dtype).itemsize,
    )


def _problem(which: Pass, hidden, weight, config: LinearCrossEntropyConfig) -> _Problem:
    tile = _tile(which, hidden, weight, config)
    if tile is None:
        raise ValueError("supports() refuses what no tile fits")
    return _Problem(math.prod(hidden.shape[:-1]), weight.shape[0], hidden.shape[-1], tile)


def _options(call: Call) -> dict[str, Any]:
    return {
        "interpret": call.config.interpret,
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
    }


def _product(a, b, contract: tuple[int, int]) -> Float[Array, "rows columns"]:
    dtype = jnp.result_type(a, b)
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((contract[0],), (contract[1],)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
    )


def _column(row: Float[Array, "1 V"]) -> Float[Array, "V 1"]:
    return jnp.transpose(jnp.broadcast_to(row, (_ROWS, row.shape[1])))[:, :1]


def _sum(tile) -> Float[Array, "1 columns"]:
    return jnp.sum(tile, axis=0, keepdims=True)


def _index(shape: tuple[int, ...], axis: int) -> Int[Array, "rows columns"]:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _float32(bias):
    return None if bias is None else bias.astype(jnp.float32)
