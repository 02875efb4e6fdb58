"""Whether the plan of a model that plans in latent vectors can be read."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Bool, Float, Int
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.data.base import Source
from tokenlab.evals.base import Evaluation
from tokenlab.models import CapsuleTransformer
from tokenlab.tokenizers.base import Tokenizer

_RIDGE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanReadBack(Evaluation):
    """How much of the batch's ``plan`` is in the capsules of a ``CapsuleTransformer``.

    ``nats`` is the negative log-likelihood of a plan given its capsule, and ``exact`` the share of
    plans that the model writes without an error when it goes on from the capsule by its likeliest
    tokens. ``probe`` is that share for a linear map from the latent vectors to the token at each
    place, by ridge regression over the first half of the rows, of the second half: it needs no
    model that was trained to read. ``information``, where the entropy of plans is known, is
    ``H(P) - nats``, at most what capsule and plan have in common.

    Reference: Barber and Agakov, "The IM Algorithm: A Variational Approach to Information
    Maximization", 2003 (the bound).

    Attributes:
        data: where the rows come from.
        batches: how many batches.
        batch_size: rows of each.
        seed: of the source.
        entropy: H(P) of the source's plans, nats, or None.
    """

    data: Source
    batches: int = 8
    batch_size: int = 128
    seed: int = 0
    entropy: float | None = None

    def __call__(
        self, *, model: nn.Module, params: PyTree, tokenizer: Tokenizer
    ) -> dict[str, float]:
        """The figures.

        Raises:
            UserError: the model has no capsule, or the rows have no plan.
        """
        if not (isinstance(model, CapsuleTransformer) and model.slots):
            raise UserError("the model has no capsule to read; use CapsuleTransformer with slots")
        view = View(model=model, params=params)
        rows = self.data.batches(tokenizer=tokenizer, batch_size=self.batch_size, seed=self.seed)
        latents, plans, nats, exact = [], [], [], []
        for batch in itertools.islice(rows, self.batches):
            if "plan" not in batch:
                raise UserError("the rows have no plan; use a task whose plan stands apart")
            found = _read({name: batch[name] for name in _READ}, view.params, model)
            latents.append(np.asarray(found[0], np.float64).reshape(self.batch_size, -1))
            plans.append(np.asarray(batch["plan"])[:, 1:])
            nats.append(np.asarray(found[1]))
            exact.append(np.asarray(found[2]))
        mean = float(np.mean(nats))
        known = {} if self.entropy is None else {"information": self.entropy - mean}
        return {
            "nats": mean,
            "exact": float(np.mean(exact)),
            "probe": probed(latents=np.concatenate(latents), plans=np.concatenate(plans)),
        } | known


_READ = ("tokens", "positions", "segments", "plan")


def _reading(
    batch: Mapping[str, Array], params: PyTree, model: CapsuleTransformer
) -> tuple[Float[Array, "B K Z"], Float[Array, " B"], Bool[Array, " B"]]:
    """Latent vectors, nats of the plans, and whether the likeliest tokens are theirs."""
    view, plan = View(model=model, params=params), batch["plan"]
    latents = view(
        batch["tokens"],
        positions=batch["positions"],
        segments=batch["segments"],
        plan=plan if model.plan_is_read else None,
        method="latents",
    )

    def logits(written: Array) -> Array:
        return view(latents, plan=written, method="plan_logits")

    targets = plan[:, 1:]
    logp = jax.nn.log_softmax(logits(plan[:, :-1]), axis=-1)
    nats = -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    nats = jnp.sum(jnp.where(targets > 0, nats, 0.0), axis=1)

    def step(number: Array, written: Array) -> Array:
        best = jnp.argmax(logits(written[:, :-1])[:, number], axis=-1)
        return written.at[:, number + 1].set(best)

    begun = jnp.zeros_like(plan).at[:, 0].set(plan[:, 0])
    written = jax.lax.fori_loop(0, targets.shape[1], step, begun)[:, 1:]
    # The mark at a plan's end is one of its tokens: what is written behind it says nothing.
    return latents, nats, jnp.all((written == targets) | (targets == 0), axis=1)


_read = jax.jit(_reading, static_argnums=2)


def probed(*, latents: Float[np.ndarray, "N F"], plans: Int[np.ndarray, "N P"]) -> float:
    """Share of the second half whose plan a linear map from the first half gets right.

    Args:
        latents: features of each row.
        plans: ids at each place.
    """
    features = np.concatenate([latents, np.ones((len(latents), 1))], axis=1)
    known, classes = np.unique(plans, return_inverse=True)
    wanted = np.eye(len(known))[classes.reshape(plans.shape)]
    half = len(plans) // 2
    gram = features[:half].T @ features[:half] + _RIDGE * np.eye(features.shape[1])
    maps = np.linalg.solve(gram, features[:half].T @ wanted[:half].reshape(half, -1))
    scores = (features[half:] @ maps).reshape(-1, plans.shape[1], len(known))
    return float(np.mean((known[scores.argmax(axis=-1)] == plans[half:]).all(axis=1)))
