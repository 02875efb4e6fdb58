"""ActQKV's probe against the mean query, and its layer budgets against equal ones, on planted data.

A window of 256 queries is filler in one direction with noise; four of its tokens also ask for one
of 64 blocks. And four layers share 64 blocks: the scores of some are sharp, of others diffuse.

Paper:    Xiao et al., "Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context
          LLMs Inference", 2025, arXiv:2502.13542.
Command:  python -m tokenlab study experiments/cache/act_qkv.py
Hardware: one CPU core, half a minute.
Expected: the activation probe finds 97 of 100 blocks, the mean query 4; shared budgets recall 0.91
          of the attention, equal ones 0.87, as do those shared at the paper's temperature of 1.
          On a trained model (``recall.py``) the activation probe is not seen to find more than the
          mean query.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from tokenlab.cache.probes import Moments, layer_budgets, probe_weights
from tokenlab.study import Claim, Measured, Study, Trial


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantedAnchors(Trial):
    """Share of windows whose probe is nearest to the block that some of its tokens ask for.

    Attributes:
        probe: how queries are put together.
        windows: windows, each of its own.
        tokens: of a window.
        anchors: tokens that ask.
        blocks: to choose from.
        shift: length of what they ask with, in lengths of a representative.
        filler: length of the common direction, in lengths of the noise.
    """

    probe: Literal["activation", "mean"]
    windows: int = 200
    tokens: int = 256
    anchors: int = 4
    blocks: int = 64
    shift: float = 4.0
    filler: float = 1.0

    def measure(self, *, seed: int) -> Measured:
        """All windows."""
        rng = np.random.default_rng(seed)
        width, found = 64, []
        for _ in range(self.windows):
            blocks = rng.normal(size=(self.blocks, width))
            filler = rng.normal(size=width)
            u = self.filler * filler + rng.normal(size=(self.tokens, width))
            asked = rng.integers(self.blocks)
            u[rng.permutation(self.tokens)[: self.anchors]] += self.shift * blocks[asked]
            probe = self._weights(u) @ u
            cosines = blocks @ probe / np.linalg.norm(blocks, axis=1)
            found.append(cosines.argmax() == asked)
        return Measured(figures={"top1/share": float(np.mean(found))}, costs={"blocks": 1.0})

    def _weights(self, u):
        valid = jnp.ones((1, len(u)), bool)
        if self.probe == "mean":
            return np.full(len(u), 1 / len(u))
        none = Moments.none(1, u.shape[1])
        return np.asarray(probe_weights(jnp.asarray(u, jnp.float32)[None], valid, none, warm=1))[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantedLayers(Trial):
    """Attention mass on the blocks that layers read, a mean over layers.

    Attributes:
        shared: whether budgets follow the entropies of the scores.
        temperature: of the entropies.
        sharpness: factor of the scores of each layer.
        blocks: of a layer.
        average: blocks read, on average over layers.
        problems: score tables.
    """

    shared: bool
    temperature: float = 0.1
    sharpness: tuple[float, ...] = (8.0, 4.0, 2.0, 1.0)
    blocks: int = 64
    average: int = 16
    problems: int = 100

    def measure(self, *, seed: int) -> Measured:
        """Scores stand for cosines; attention is their softmax at ten times the size."""
        rng = np.random.default_rng(seed)
        layers = len(self.sharpness)
        scores = rng.normal(size=(self.problems, layers, self.blocks))
        scores = jnp.asarray(scores * np.reshape(self.sharpness, (-1, 1)) / 10, jnp.float32)
        logp = jax.nn.log_softmax(scores / self.temperature, axis=-1)
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1) / np.log(self.blocks)
        shares = jnp.full((layers, self.problems), self.average)
        if self.shared:
            shares = layer_budgets(
                entropy.T, total=self.average * layers, least=2 * self.average // 3,
                most=2 * self.average,
            )  # fmt: skip
        mass = jnp.sort(jax.nn.softmax(10 * scores, axis=-1), axis=-1)[..., ::-1]
        read = jnp.arange(self.blocks)[None, None] < shares.T[..., None]
        recalled = jnp.sum(jnp.where(read, mass, 0), axis=-1).mean()
        return Measured(
            figures={
                "layers/mass": float(recalled),
                "layers/spread": float(jnp.std(shares.astype(jnp.float32), axis=0).mean()),
            },
            costs={"blocks": float(shares.sum(axis=0).mean())},
        )


def study() -> Study:
    """One block of 64 is taken; four layers read 16 blocks each on average."""
    return Study(
        name="act_qkv",
        question="Do unusual queries find their block, and diffuse layers deserve more blocks?",
        arms={
            "activation probe": PlantedAnchors(probe="activation"),
            "mean probe": PlantedAnchors(probe="mean"),
            "shared by entropy": PlantedLayers(shared=True),
            "shared, temperature 1": PlantedLayers(shared=True, temperature=1.0),
            "equal shares": PlantedLayers(shared=False),
        },
        matched="blocks",
        claims=(
            Claim(
                arm="activation probe", than="mean probe", metric="top1/share", better="higher",
                margin=0.5,
            ),
            Claim(
                arm="shared by entropy", than="equal shares", metric="layers/mass",
                better="higher",
            ),
        ),
        seeds=(0, 1, 2),
    )  # fmt: skip
