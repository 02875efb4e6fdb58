"""Everything an objective may ask about one batch, computed once and only if asked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import PyTree

from kernels_pallas.linear_cross_entropy import (
    LinearCrossEntropyConfig,
    Projection,
    TargetLogits,
    kl_divergence,
    linear_cross_entropy,
)
from tokenlab.core.arrays import Array, Float, Hidden, Int, Logits, PRNGKeyArray, Values
from tokenlab.core.errors import UserError
from tokenlab.core.per_device import mesh_axes, per_device
from tokenlab.core.projection import SharedRows
from tokenlab.core.reports import REPORTS
from tokenlab.core.rng import stream

LossImpl = Literal["ref", "xla", "tpu"]
_TOKENS = ("batch", "length")
_AXES = {
    "hidden": (*_TOKENS, None),
    "weight": ("vocab", None),
    "targets": _TOKENS,
    "bias": ("vocab",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """A model with one set of its parameters: the policy, a reference, a teacher.

    Attributes:
        model: the module.
        params: its parameters.
        given: other collections that it reads, such as options that stand fixed
            (``routing.GIVEN``) or how far training has come (``core.progress``).
    """

    model: nn.Module
    params: PyTree
    given: Mapping[str, PyTree] = dataclasses.field(default_factory=dict)

    def __call__(self, *args: Any, mutable: Sequence[str] = (), **options: Any) -> Any:
        """``model.apply`` with these parameters, by which layers may report.

        Args:
            args: of the model.
            mutable: collections to return beside the output.
            options: of ``apply``; ``method`` names another method than the call.
        """
        out, kept = self.model.apply(
            {"params": self.params, **self.given}, *args, mutable=[REPORTS, *mutable], **options
        )
        return (out, kept) if mutable else out


class Context:
    """A batch seen through named views.

    Forward passes are memoised, so terms that ask for the same quantity share one pass, and a
    quantity nobody asks for is never computed.
    """

    def __init__(
        self,
        *,
        batch: Mapping[str, Array],
        views: Mapping[str, View],
        key: PRNGKeyArray | None = None,
        train: bool = False,
    ) -> None:
        """Binds the batch.

        Args:
            batch: arrays by name, as ``tokenlab.data.base`` lists them. Where it has ``mixture``,
                models read the mean embedding of a row's shares in place of its token, if the
                shares have sum one.
            views: models by name; losses read ``"policy"`` unless told otherwise.
            key: randomness of this batch, required where ``train`` is true.
            train: whether dropout is on.
        """
        self.batch = batch
        self.train = train
        self._views = views
        self._key = key
        self._outputs: dict[str, Any] = {}
        self._streams: dict[str, tuple[Hidden, ...]] = {}
        self._whole: dict[tuple[str, int], Logits] = {}
        self._thoughts: dict[str, Any] = {}
        self._thought_nats: dict[str, tuple[Values, Float[Array, "S M B T"]]] = {}
        self._logits: dict[tuple[str, LossImpl | None, Any], TargetLogits] = {}

    def output(self, view: str = "policy") -> Any:
        """The forward pass of ``view`` (``models.ModelOutput``)."""
        if view not in self._outputs:
            self._outputs[view] = self._run(view)
        return self._outputs[view]

    def logits(self, view: str = "policy", *, passes: int = 0) -> Logits:
        """Float32 logits of every position, for terms that compare whole distributions.

        Args:
            view: the model.
            passes: forward passes in which the model's own predictions take the place of the
                batch's ``mixture``; each makes one more thought of a row the model's own, so with
                as many as a row has thoughts, all are. 0 feeds what the batch says.
        """
        if (view, passes) not in self._whole:
            hidden = self.output(view).hidden if passes == 0 else self._self_fed(view, passes)
            self._whole[view, passes] = self._views[view](hidden, method="logits")
        return self._whole[view, passes]

    def _self_fed(self, view: str, passes: int) -> Hidden:
        mixture = self.batch["mixture"]
        thought = jnp.sum(mixture, axis=-1, keepdims=True) > 0.5
        hidden = self.output(view).hidden
        for _ in range(passes):
            predicted = jax.nn.softmax(self._views[view](hidden, method="logits"), axis=-1)
            mixture = jnp.where(thought, jnp.roll(predicted, 1, axis=1), 0.0)
            hidden = self._run(view, mixture=mixture).hidden
        return hidden

    def _run(self, view: str, *, mixture: Array | None = None, **options: Any) -> Any:
        """A forward pass, with ``options`` of ``View``."""
        batch, key = self.batch, self._key
        mixture = batch.get("mixture") if mixture is None else mixture
        if mixture is not None:
            options["embeddings"] = self._views[view](
                batch["tokens"], mixture=mixture, method="mix"
            )
        options |= {name: batch[name] for name in ("prompt", "plan") if name in batch}
        names = ("dropout", "routes", "thoughts")
        rngs = {} if key is None else {name: stream(key, name) for name in names}
        return self._views[view](
            batch["tokens"],
            positions=batch["positions"],
            segments=batch["segments"],
            train=self.train,
            rngs=rngs,
            **options,
        )

    def streams(self, view: str = "policy") -> tuple[Hidden, ...]:
        """The residual stream of ``view`` behind each layer, from its forward pass.

        Raises:
            UserError: the model runs no layers of their own names, as where they are scanned.
        """
        if view not in self._streams:
            self._outputs[view], kept = self._run(
                view,
                mutable=["intermediates"],
                capture_intermediates=lambda module, _: str(module.name).startswith("block_"),
            )
            found = kept.get("intermediates", {})
            names = sorted(
                (name for name in found if name.startswith("block_")),
                key=lambda name: (len(name), name),
            )
            if not names:
                raise UserError(f"{view} shows no layers; set model.depth.scan=False")
            self._streams[view] = tuple(found[name]["__call__"][0][0] for name in names)
        return self._streams[view]

    def thoughts(self, view: str = "policy") -> Any:
        """``models.Thoughts`` behind every token, of a model that thinks; its forward pass too.

        Raises:
            UserError: the model does not think.
        """
        if view not in self._thoughts:
            if not hasattr(self._views[view].model, "think"):
                raise UserError(f"{view} has no thoughts; its model is no ThinkingTransformer")
            self._thoughts[view] = self._run(view, method="think")
            self._outputs[view] = self._thoughts[view].output
        return self._thoughts[view]

    def thought_nats(self, view: str = "policy") -> tuple[Values, Float[Array, "S M B T"]]:
        """Nats of each target before a thought, and after each that ``Thoughts.after`` has."""
        if view not in self._thought_nats:
            thoughts, targets = self.thoughts(view), self.batch["targets"]
            shape = thoughts.after.shape[:-1]
            every = jnp.broadcast_to(targets[None, None], shape).reshape(-1, shape[-1])
            before = self.logits_from(thoughts.before, view)
            after = self.logits_from(thoughts.after.reshape(*every.shape, -1), view, targets=every)
            self._thought_nats[view] = (
                before.log_sum_exp - before.target,
                (after.log_sum_exp - after.target).reshape(shape),
            )
        return self._thought_nats[view]

    def target_logits(
        self,
        view: str = "policy",
        impl: LossImpl | None = None,
        config: LinearCrossEntropyConfig | None = None,
    ) -> TargetLogits:
        """Target logit, log-sum-exp and mean logit per token, without logits in memory.

        Args:
            view: the model.
            impl: form of ``kernels_pallas.linear_cross_entropy``; None takes the best that the
                platform has.
            config: its block sizes, and what its backward pass may leave out.
        """
        if (view, impl, config) not in self._logits:
            self._logits[view, impl, config] = self.logits_from(
                self.output(view).hidden, view, impl, config
            )
        return self._logits[view, impl, config]

    def logits_from(
        self,
        hidden: Hidden,
        view: str = "policy",
        impl: LossImpl | None = None,
        config: LinearCrossEntropyConfig | None = None,
        *,
        targets: Int[Array, "N T"] | None = None,
        temperature: float = 1.0,
    ) -> TargetLogits:
        """:meth:`target_logits` of another stream than that which ``view`` ends with.

        Args:
            hidden: normalised, ready for the head of ``view``.
            view: the model.
            impl: as there.
            config: as there.
            targets: ids; None is the batch's.
            temperature: by which logits are divided.

        Raises:
            UserError: a temperature other than 1, and rows of the vocabulary are shared.
        """
        model = self._views[view]
        weight, softcap = model(method="head_weight"), model.model.head.softcap
        if temperature != 1.0:
            if isinstance(weight, SharedRows):
                raise UserError("a head of shared rows has no temperature; use 1.0")
            hidden = (hidden / temperature).astype(hidden.dtype)
            softcap = None if softcap is None else softcap / temperature
        return target_logits(
            hidden,
            weight,
            targets=self.batch["targets"] if targets is None else targets,
            softcap=softcap,
            impl=impl,
            config=config,
        )

    def token_logp(self, view: str = "policy", impl: LossImpl | None = None) -> Values:
        """Log-probability of each target under ``view``, in nats."""
        logits = self.target_logits(view, impl)
        return logits.target - logits.log_sum_exp

    def kl_divergence(self, p: str, q: str, impl: LossImpl | None = None) -> Values:
        """``KL(p || q)`` of two views in nats per token, without logits in memory.

        Args:
            p: where the expectation is taken; it carries no gradient.
            q: what it is compared with.
            impl: form of ``kernels_pallas.linear_cross_entropy`` that gives the normalisers.
        """
        first, second = self._projection(p, impl), self._projection(q, impl)
        arrays = {f"p_{name}": jax.lax.stop_gradient(each) for name, each in first.items()}
        arrays |= {f"q_{name}": each for name, each in second.items()}
        axes = _AXES | {"log_sum_exp": _TOKENS}
        caps = {name: self._views[view].model.head.softcap for name, view in (("p", p), ("q", q))}
        vocabulary_axes = mesh_axes("vocab", first["weight"].shape[0])

        def compare(**arrays: Array) -> Array:
            sides = (
                Projection(
                    softcap=caps[side],
                    **{name[2:]: each for name, each in arrays.items() if name[0] == side},
                )
                for side in "pq"
            )
            return kl_divergence(*sides, vocabulary_axes=vocabulary_axes)

        return per_device(
            compare, axes={name: axes[name[2:]] for name in arrays}, out=_TOKENS, **arrays
        )

    def _projection(self, view: str, impl: LossImpl | None) -> dict[str, Array]:
        """The arrays of ``Projection``, with a row per token of the vocabulary."""
        weight = self._views[view](method="head_weight")
        hidden = self.output(view).hidden
        arrays = {"hidden": hidden, "log_sum_exp": self.target_logits(view, impl).log_sum_exp}
        if isinstance(weight, SharedRows):
            if weight.bias is not None:
                arrays["bias"] = weight.bias
            weight = weight.expanded()
        return arrays | {"weight": weight.astype(hidden.dtype)}


def target_logits(
    hidden: Hidden,
    weight: Float[Array, "V D"] | SharedRows,
    *,
    targets: Int[Array, "B T"],
    softcap: float | None,
    impl: LossImpl | None = None,
    config: LinearCrossEntropyConfig | None = None,
) -> TargetLogits:
    """What a vocabulary projection says of the targets, without logits in memory.

    Args:
        hidden: normalised, ready for the projection.
        weight: of the projection.
        targets: ids.
        softcap: bound of the logits, or None.
        impl: form of ``kernels_pallas.linear_cross_entropy``; None takes the best there is.
        config: its block sizes, or None.
    """
    if isinstance(weight, SharedRows):
        rows = weight.rows
        codes = jnp.take(weight.codes, targets, mode="clip")
        arrays = {"targets": codes, "bias": weight.row_bias()}
    else:
        rows, arrays = weight, {"targets": targets}
    project = functools.partial(
        linear_cross_entropy,
        softcap=softcap,
        vocabulary_axes=mesh_axes("vocab", rows.shape[0]),
        impl=impl,
        config=config,
    )
    logits = per_device(
        project,
        axes=_AXES,
        out=_TOKENS,
        hidden=hidden,
        weight=rows.astype(hidden.dtype),
        **arrays,
    )
    if isinstance(weight, SharedRows):
        logits = weight.of_tokens(logits, hidden=hidden, targets=targets, row_bias=arrays["bias"])
    return logits
