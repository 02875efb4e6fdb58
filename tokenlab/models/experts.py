"""Mixtures of experts: feed-forward layers of which a gate runs a few on each token."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from flax import linen as nn

from kernels_pallas.common.dispatch import platform
from kernels_pallas.token_routing import grouped_matmul
from tokenlab.core.arrays import Array, Bool, Float, Hidden, Int
from tokenlab.core.parameters import parameter
from tokenlab.core.per_device import per_device
from tokenlab.core.reports import report
from tokenlab.core.weighted import Weighted
from tokenlab.models.layers import FeedForward
from tokenlab.routing.balance import expert_loads, maximum_violation
from tokenlab.routing.experts import ExpertChoice, ExpertGate, TopKGate, balance_loss

_expert_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))
_STREAM, _WHOLE = ("batch", "length", None), (None, None, None)
_IN, _OUT = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")


class MixtureOfExperts(FeedForward):
    """``y_i = Σ_{e in A_i} w_ie Expert_e(x_i)``; no token is dropped, whatever the loads.

    An expert is ``(silu(x W_gate) * (x W_up)) W_down``, or ``gelu(x W_up) W_down`` where it is not
    gated. Scores, weights and loads are float32 whatever the stream is, and padding is in none.

    Reported: the losses of the gate; ``aux["balance"]``, which is 1 where loads are even (weigh it
    by 0.01 with ``AuxiliaryTerm(name="balance", coefficient=0.01)``); ``aux["violation"]``, MaxVio
    of the batch, for the log (``coefficient=0.0``); figures ``active_experts`` and
    ``gate_entropy`` of each token, in nats; and the operations of the experts that were chosen.

    Reference: Shazeer, Mirhoseini, Maziarz, Davis, Le, Hinton, Dean, "Outrageously Large Neural
    Networks: The Sparsely-Gated Mixture-of-Experts Layer", 2017, arXiv:1701.06538; without dropped
    tokens as Gale, Narayanan, Young, Zaharia, "MegaBlocks: Efficient Sparse Training with
    Mixture-of-Experts", 2022, arXiv:2211.15841.

    Differences from the paper: the gate is a part; losses are weighed by the objective.

    Attributes:
        num_experts: experts E.
        hidden_dim: width of each expert's hidden layer.
        gate: chooses them.
        gated: whether the hidden layer is gated.
        form: ``"dense"`` runs all experts on all tokens and masks; ``"sorted"`` sorts tokens by
            expert and runs what is chosen, each device on its own tokens with all experts. None is
            dense on a CPU, where it is the faster one (grouped products run as dense ones per
            slot), and sorted elsewhere.
    """

    num_experts: int
    hidden_dim: int
    gate: ExpertGate = TopKGate()
    gated: bool = True
    form: Literal["dense", "sorted"] | None = None

    @nn.compact
    def __call__(
        self, x: Hidden, *, valid: Bool[Array, "B T"] | None = None, train: bool = False
    ) -> Hidden:
        """Runs the chosen experts on every token; 0 for padding."""
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        x = jnp.where(valid[..., None], x, 0)
        most = self.gate.most_active(self.num_experts)
        choice = self.gate(x, num_experts=self.num_experts, valid=valid, train=train)
        self._report(choice, x.shape[-1])
        kernels = {name: kernel.astype(x.dtype) for name, kernel in self._kernels(x).items()}
        form = self.form or ("dense" if platform() == "cpu" else "sorted")
        if form == "dense":
            return _dense(x, choice.weights, **kernels)
        return per_device(
            lambda **arrays: _sorted(most=most, **arrays),
            axes={"x": _STREAM, "weights": _STREAM, "chosen": _STREAM}
            | dict.fromkeys(kernels, _WHOLE),
            out=_STREAM,
            x=x,
            weights=choice.weights,
            chosen=choice.chosen,
            **kernels,
        )

    def _kernels(self, x: Hidden) -> dict[str, Array]:
        narrow, wide = x.shape[-1], self.hidden_dim
        shapes = {"up": (narrow, wide, _IN), "down": (wide, narrow, _OUT)}
        if self.gated:
            shapes["up_gate"] = shapes["up"]
        return {
            name: parameter(self, name, _expert_init, (self.num_experts, *shape), axes)
            for name, (*shape, axes) in shapes.items()
        }

    def _report(self, choice: ExpertChoice, dim: int) -> None:
        active = jnp.sum(choice.chosen, axis=-1, dtype=jnp.float32)
        tokens = jnp.sum(active > 0, dtype=jnp.float32)
        loads = expert_loads(choice.chosen)
        p = choice.probabilities
        entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny)), axis=-1)
        violation = Weighted(total=tokens * maximum_violation(loads), weight=tokens)
        report(
            self,
            aux={"balance": balance_loss(choice), "violation": violation, **choice.aux},
            figures={
                "active_experts": active,
                "gate_entropy": jnp.where(active > 0, entropy, 0.0),
            },
            flops=jnp.sum(loads) * self.flops_per_expert(dim),
        )

    @nn.nowrap
    def flops_per_expert(self, dim: int) -> int:
        """Operations of one expert on one token."""
        return 2 * (3 if self.gated else 2) * dim * self.hidden_dim

    @nn.nowrap
    def flops(self, dim: int) -> int:
        """Those of the gate; those of the experts depend on the token and are reported."""
        return 2 * dim * self.num_experts


def _activated(up: Array, up_gate: Array | None) -> Array:
    return nn.gelu(up) if up_gate is None else nn.silu(up_gate) * up


def _dense(
    x: Hidden,
    weights: Float[Array, "B T E"],
    *,
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    up_gate: Float[Array, "E D F"] | None = None,
) -> Hidden:
    """All experts on all tokens; three plain products, which XLA:CPU runs best."""
    count, dim, wide = up.shape
    flat = x.reshape(-1, dim)

    def projected(kernel: Float[Array, "E D F"]) -> Float[Array, "N E F"]:
        together = kernel.transpose(1, 0, 2).reshape(dim, count * wide)
        return (flat @ together).reshape(-1, count, wide)

    hidden = _activated(projected(up), None if up_gate is None else projected(up_gate))
    hidden = hidden * weights.reshape(-1, count, 1).astype(x.dtype)
    out = hidden.reshape(-1, count * wide) @ down.reshape(count * wide, dim)
    return out.reshape(x.shape)


def _sorted(
    *,
    x: Hidden,
    weights: Float[Array, "B T E"],
    chosen: Bool[Array, "B T E"],
    most: int,
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    up_gate: Float[Array, "E D F"] | None = None,
) -> Hidden:
    """Slots of token and expert, sorted by expert; each expert on its own range of them."""
    count, dim, _ = up.shape
    factors, experts = _slots(weights, chosen, most)
    order = jnp.argsort(experts.ravel())
    sizes = jnp.sum(chosen.reshape(-1, count), axis=0)
    rows = jnp.repeat(x.reshape(-1, dim), most, axis=0)[order]

    def grouped(rows: Float[Array, "S G"], kernel: Float[Array, "E G H"]) -> Float[Array, "S H"]:
        return grouped_matmul(x=rows, weights=kernel, group_sizes=sizes)

    gate = None if up_gate is None else grouped(rows, up_gate)
    out = grouped(_activated(grouped(rows, up), gate), down)
    back = out[jnp.argsort(order)].reshape(-1, most, dim).astype(jnp.float32)
    return jnp.sum(back * factors[..., None], axis=1).astype(x.dtype).reshape(x.shape)


def _slots(
    weights: Float[Array, "B T E"], chosen: Bool[Array, "B T E"], most: int
) -> tuple[Float[Array, "N C"], Int[Array, "N C"]]:
    """Factor and expert of each slot of a token; an empty one has factor 0 and expert E."""
    count = weights.shape[-1]
    weights, chosen = weights.reshape(-1, count), chosen.reshape(-1, count)
    places = jnp.where(chosen, jnp.arange(count)[None], count)
    experts = jnp.sort(places, axis=-1)[:, :most]
    factors = jnp.take_along_axis(weights, jnp.minimum(experts, count - 1), axis=-1)
    return jnp.where(experts < count, factors, 0.0), experts
