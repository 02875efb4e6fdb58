"""Running a block on some of the tokens: pick their rows, add the results back; and experts."""

from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kernels_pallas.common.dispatch import Operation
from kernels_pallas.token_routing import megablox, ref, tpu, xla
from kernels_pallas.token_routing.ref import in_use
from kernels_pallas.token_routing.specs import GroupedMatmulConfig, TokenRoutingConfig

_GATHER = Operation.of(
    "gather_tokens",
    ref=ref.gather_tokens,
    xla=xla.gather_tokens,
    tpu=tpu.gather_tokens,
    tpu_supports=tpu.supports_gather,
)
_SCATTER_ADD = Operation.of(
    "scatter_add_tokens",
    ref=ref.scatter_add_tokens,
    xla=xla.scatter_add_tokens,
    tpu=tpu.scatter_add_tokens,
    tpu_supports=tpu.supports_scatter_add,
)
_GROUPED_MATMUL = Operation.of(
    "grouped_matmul",
    ref=ref.grouped_matmul,
    xla=xla.grouped_matmul,
    tpu=megablox.grouped_matmul,
    tpu_supports=megablox.supports,
)


def gather_tokens(
    *,
    x: Float[Array, "B T D"],
    index: Int[Array, "B C"],
    count: Int[Array, " B"],
    dtype: DTypeLike | None = None,
    impl: Literal["ref", "xla", "tpu"] | None = None,
    config: TokenRoutingConfig | None = None,
) -> Float[Array, "B C D"]:
    """Rows of the routed tokens.

    ``out[b, c] = x[b, index[b, c]]`` for ``c < count[b]``, else 0.

    Differentiable (reverse mode) in ``x``; a repeated token gets the sum, taken in float32.

    Args:
        x: hidden states ``[B, T, D]``.
        index: tokens ``[B, C]`` in ``[0, T)``, ascending; a token may be repeated. Slots at and
            after ``count`` may hold anything. Neither the range nor the order is checked.
        count: used slots ``[B]``; a run-time value, so that one program serves every number.
        dtype: of the result; ``None`` keeps that of ``x``.
        impl: ``"ref"``, ``"xla"``, ``"tpu"`` (copies of single rows; see
            :mod:`kernels_pallas.token_routing.tpu` for the bytes they move), or ``None`` for the
            best that can run.
        config: block sizes; ``None`` derives them from the shapes.

    Returns:
        ``[B, C, D]``.

    Raises:
        ValueError: ``impl`` cannot run; the message has the reason.

    Reference: Sangmin Bae et al., "Mixture-of-Recursions: Learning Dynamic Recursive Depths for
    Adaptive Token-Level Computation", 2025, arXiv:2507.10524 (expert-choice routing).

    Differences from the paper: the number of used slots is known only at run time.
    """
    return _GATHER(
        impl,
        x=x,
        index=index.astype(jnp.int32),
        count=count.astype(jnp.int32),
        dtype=jnp.dtype(dtype or x.dtype),
        config=config or TokenRoutingConfig(),
    )


def scatter_add_tokens(
    *,
    residual: Float[Array, "B T D"],
    y: Float[Array, "B C D"],
    gate: Float[Array, "B C"],
    index: Int[Array, "B C"],
    count: Int[Array, " B"],
    impl: Literal["ref", "xla", "tpu"] | None = None,
    config: TokenRoutingConfig | None = None,
) -> Float[Array, "B T D"]:
    """Adds gated results back to the tokens that they belong to.

    ``out[b, t] = residual[b, t] + Σ gate[b, c] · y[b, c]`` over ``c < count[b]`` with
    ``index[b, c] = t``, in float32, rounded once to the dtype of ``residual``. The row of a
    token that no slot names is unchanged bit for bit.

    Differentiable (reverse mode) in ``residual``, ``y`` and ``gate``; unused slots give zero,
    whatever ``y`` and ``gate`` hold there, NaN included.

    Args:
        residual: hidden states ``[B, T, D]``. ``"tpu"`` writes its result over them; XLA copies
            them first where something else still needs them.
        y: results ``[B, C, D]``.
        gate: factors ``[B, C]``, taken as float32.
        index: tokens ``[B, C]`` in ``[0, T)``, ascending; contributions to a repeated token
            add up. Slots at and after ``count`` may hold anything. Neither the range nor the
            order is checked; ``"ref"`` takes any order.
        count: used slots ``[B]``.
        impl: ``"ref"``, ``"xla"``, ``"tpu"`` (reads and writes only the rows named), or
            ``None`` for the best that can run.
        config: block sizes; ``None`` derives them from the shapes.

    Returns:
        ``[B, T, D]`` in the dtype of ``residual``.

    Raises:
        ValueError: ``impl`` cannot run; the message has the reason.

    Reference: Sangmin Bae et al., "Mixture-of-Recursions: Learning Dynamic Recursive Depths for
    Adaptive Token-Level Computation", 2025, arXiv:2507.10524 (expert-choice routing).

    Differences from the paper: the number of used slots is known only at run time, and tokens
    may be repeated.
    """
    return _SCATTER_ADD(
        impl,
        residual=residual,
        y=y,
        gate=gate.astype(jnp.float32),
        index=index.astype(jnp.int32),
        count=count.astype(jnp.int32),
        config=config or TokenRoutingConfig(),
    )


def grouped_matmul(
    *,
    x: Float[Array, "N D"],
    weights: Float[Array, "E D F"],
    group_sizes: Int[Array, " E"],
    impl: Literal["ref", "xla", "tpu"] | None = None,
    config: GroupedMatmulConfig | None = None,
) -> Float[Array, "N F"]:
    """Every token through the matrix of its expert.

    ``out[n] = x[n] · weights[e]`` for the expert ``e`` with
    ``Σ_{i<e} group_sizes[i] <= n < Σ_{i<=e} group_sizes[i]``; rows after the last group give 0,
    whatever they hold. Accumulated in float32.

    Differentiable (reverse mode) in ``x`` and ``weights``.

    Args:
        x: hidden states ``[N, D]``, sorted by expert.
        weights: matrices ``[E, D, F]``.
        group_sizes: tokens of each expert ``[E]``, with a sum of at most ``N``.
        impl: ``"ref"`` (one product of all rows per expert), ``"xla"``
            (:func:`jax.lax.ragged_dot`), ``"tpu"`` (megablox, JAX's own kernels), or ``None``
            for the best that can run.
        config: tiles; ``None`` derives them from the shapes.

    Returns:
        ``[N, F]`` in the dtype of ``x``.

    Raises:
        ValueError: ``impl`` cannot run; the message has the reason.

    Reference: Trevor Gale, Deepak Narayanan, Cliff Young, Matei Zaharia, "MegaBlocks: Efficient
    Sparse Training with Mixture-of-Experts", 2022, arXiv:2211.15841.

    Differences from the paper: groups are ranges of rows, not blocks of a sparse matrix.
    """
    return _GROUPED_MATMUL(
        impl,
        x=x,
        weights=weights,
        group_sizes=group_sizes.astype(jnp.int32),
        config=config or GroupedMatmulConfig(),
    )


__all__ = [
    "GroupedMatmulConfig",
    "TokenRoutingConfig",
    "gather_tokens",
    "grouped_matmul",
    "in_use",
    "scatter_add_tokens",
]
