"""Everything an objective may ask about one batch, computed once and only if asked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import PyTree

from kernels_pallas.linear_cross_entropy import (
    LinearCrossEntropyConfig,
    TargetLogits,
    linear_cross_entropy,
)
from tokenlab.core.arrays import Array, PRNGKeyArray, Values
from tokenlab.core.per_device import mesh_axes, per_device
from tokenlab.core.projection import SharedRows
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
    """

    model: nn.Module
    params: PyTree

    def __call__(self, *args: Any, **options: Any) -> Any:
        """``model.apply`` with these parameters; ``method`` names another method than the call."""
        return self.model.apply({"params": self.params}, *args, **options)


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
            batch: arrays by name, as ``tokenlab.data.base`` lists them.
            views: models by name; losses read ``"policy"`` unless told otherwise.
            key: randomness of this batch, required where ``train`` is true.
            train: whether dropout is on.
        """
        self.batch = batch
        self.train = train
        self._views = views
        self._key = key
        self._outputs: dict[str, Any] = {}
        self._logits: dict[tuple[str, LossImpl | None, Any], TargetLogits] = {}

    def output(self, view: str = "policy") -> Any:
        """The forward pass of ``view`` (``models.ModelOutput``)."""
        if view not in self._outputs:
            batch = self.batch
            rngs = {} if self._key is None else {"dropout": stream(self._key, "dropout")}
            given = {"prompt": batch["prompt"]} if "prompt" in batch else {}
            self._outputs[view] = self._views[view](
                batch["tokens"],
                positions=batch["positions"],
                segments=batch["segments"],
                train=self.train,
                rngs=rngs,
                **given,
            )
        return self._outputs[view]

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
            weight = self._views[view](method="head_weight")
            hidden, targets = self.output(view).hidden, self.batch["targets"]
            shared = weight if isinstance(weight, SharedRows) else None
            arrays = {"targets": targets}
            if shared is not None:
                bias, weight = shared.row_bias(), shared.rows
                arrays = {"targets": jnp.take(shared.codes, targets, mode="clip"), "bias": bias}
            project = functools.partial(
                linear_cross_entropy,
                softcap=self._views[view].model.head.softcap,
                vocabulary_axes=mesh_axes("vocab", weight.shape[0]),
                impl=impl,
                config=config,
            )
            logits = per_device(
                project,
                axes=_AXES,
                out=_TOKENS,
                hidden=hidden,
                weight=weight.astype(hidden.dtype),
                **arrays,
            )
            if shared is not None:
                logits = shared.of_tokens(
                    logits, hidden=hidden, targets=targets, row_bias=arrays["bias"]
                )
            self._logits[view, impl, config] = logits
        return self._logits[view, impl, config]

    def token_logp(self, view: str = "policy", impl: LossImpl | None = None) -> Values:
        """Log-probability of each target under ``view``, in nats."""
        logits = self.target_logits(view, impl)
        return logits.target - logits.log_sum_exp
