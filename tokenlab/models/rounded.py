"""A decoder whose projections read their inputs in few bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.core.arrays import Segments, Tokens
from tokenlab.core.errors import UserError
from tokenlab.core.parameters import named
from tokenlab.models.layers import Linear
from tokenlab.models.transformer import ModelOutput, Transformer
from tokenlab.quantize import ActivationQuantizer, NVFP4Activations

_INPUTS = "/inputs/0"


class RoundedTransformer(Transformer):
    """A Transformer with ``y = round(x) @ kernel`` at every projection of its layers.

    Embeddings, norms, products of attention and the vocabulary layer stay as they are, as do the
    kernels: ``quantize.Layerwise`` rounds those. :func:`rounded` makes one.

    Attributes:
        rounding: of what projections read.
        largest: of every projection its path, such as ``"block_0/mixer/q"``, and the largest
            magnitude that it read in calibration.
    """

    rounding: ActivationQuantizer = NVFP4Activations()
    largest: tuple[tuple[str, float], ...] = ()

    def __call__(self, tokens: Tokens, **options: Any) -> ModelOutput:
        """Runs the stack; see ``Transformer.__call__`` for the arguments.

        Raises:
            UserError: a projection was not calibrated.
        """
        seen = dict(self.largest)

        def read(project: Any, arguments: Any, named_arguments: Any, context: Any) -> Any:
            module = context.module
            if not isinstance(module, Linear) or context.method_name != "__call__":
                return project(*arguments, **named_arguments)
            path = "/".join(module.path)
            if path not in seen:
                raise UserError(f"{path} was not calibrated; make the model by models.rounded")
            return project(self.rounding(*arguments, largest=seen[path]), **named_arguments)

        with nn.intercept_methods(read):
            return super().__call__(tokens, **options)


def rounded(
    model: Transformer,
    params: PyTree,
    *,
    tokens: Tokens,
    segments: Segments | None = None,
    rounding: ActivationQuantizer | None = None,
) -> RoundedTransformer:
    """The model that reads its projections' inputs in few bits, on the same parameters.

    Args:
        model: a decoder with one parameter tree per layer (``models.unrolled``).
        params: its parameters.
        tokens: calibration rows.
        segments: documents of the rows, 0 for padding; None where each row is one.
        rounding: of what projections read; None is NVFP4.

    Raises:
        UserError: the model's layers share a tree, so that none can be told from another.
    """
    segments = jnp.ones_like(tokens) if segments is None else segments
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)

    @jax.jit
    def magnitudes(params: PyTree) -> PyTree:
        _, seen = model.apply(
            {"params": params}, tokens, positions=positions, segments=segments,
            mutable=["intermediates"],
        )  # fmt: skip
        read = named(seen.get("intermediates", {}))
        return {
            path.removesuffix(_INPUTS): jnp.max(
                jnp.abs(x.astype(jnp.float32)), where=(segments > 0)[..., None], initial=0.0
            )
            for path, x in read.items()
            if path.endswith(_INPUTS)
        }

    largest = jax.device_get(magnitudes(params))
    if len({path.partition("/")[0] for path in largest}) < model.num_layers:
        raise UserError("its layers are one tree of parameters; models.unrolled takes them apart")
    shared = {field.name for field in dataclasses.fields(Transformer)} - {"parent", "name"}
    return RoundedTransformer(
        **{name: getattr(model, name) for name in shared},
        rounding=rounding or NVFP4Activations(),
        largest=tuple((path, float(one)) for path, one in sorted(largest.items())),
    )
