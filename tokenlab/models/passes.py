"""The plain model inside one that runs it several times."""

from __future__ import annotations

from typing import Any, cast

import jax
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Float, Hidden, Tokens
from tokenlab.core.context import View
from tokenlab.models.transformer import Block, BlockPattern, ModelOutput, Transformer


class Passes:
    """Runs a model's own ``Transformer.__call__`` as often as asked; each pass reports for itself.

    Made inside a call of the model.
    """

    def __init__(
        self, module: Transformer, *, train: bool, block: Block | BlockPattern | None = None
    ) -> None:
        """Binds the model's parameters and random numbers.

        Args:
            module: the model, bound.
            train: whether dropout is on.
            block: layers in place of the model's, on the same parameters; None is those.
        """
        model, variables = module.unbind()
        self.model = model if block is None else model.clone(block=block)
        self.params: PyTree = variables["params"]
        self.train = train
        self.rngs = {
            name: module.make_rng(name) for name in ("dropout", "routes") if module.has_rng(name)
        }

    def run(
        self, tokens: Tokens, x: Hidden | None, *, frozen: bool = False, **options: Any
    ) -> ModelOutput:
        """One pass.

        Args:
            tokens: token ids.
            x: what enters the stack in place of their embeddings, or None.
            frozen: whether the pass has no gradient.
            options: of the call.
        """
        params = jax.lax.stop_gradient(self.params) if frozen else self.params
        return cast(
            ModelOutput,
            View(model=self.model, params=params)(
                tokens, **options, train=self.train, embeddings=x, rngs=self.rngs,
                method=Transformer.__call__,
            ),
        )  # fmt: skip

    def logits(self, hidden: Hidden) -> Float[Array, "B T V"]:
        """Float32 logits of a few positions, without a gradient."""
        params = jax.lax.stop_gradient(self.params)
        return View(model=self.model, params=params)(hidden, method="logits")
