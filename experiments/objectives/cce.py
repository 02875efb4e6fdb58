"""CCE: the vocabulary loss with and without its small gradients, and what it needs of memory.

Both training arms run the same model on the same batches, one with every gradient, one through the
TPU kernel (interpreted), whose backward pass leaves out tiles in which no gradient is above 2**-12
of its token's, the vocabulary sorted by mean logit. The trials count which tiles of a planted
Zipf-like vocabulary that leaves out, and the temporary memory of the compiled loss.

Paper:    Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024,
          arXiv:2411.09009
Command:  python -m tokenlab data fetch english_prose
          python -m tokenlab study experiments/objectives/cce.py
Hardware: two CPU cores, six minutes; speed would need a TPU.
Expected: held-out bits that differ by 0.6 % and in favour of the filter (95 % interval 0.1 to 1.0;
          1 % with thrice the learning rate and half the steps), so that agreement to 0.5 % does not
          hold: among 4,096 entries a uniform softmax lies at the threshold itself, and early in
          training whole tiles without a target are left out. 64 % of the tiles of a sorted
          vocabulary can go and none of a natural one; the loss needs 1 to 9 % of the memory of
          whole logits.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.linear_cross_entropy import LinearCrossEntropyConfig, linear_cross_entropy
from tokenlab import config as configs
from tokenlab.data import PackedText, TfdsCorpus
from tokenlab.evals import HeldOutText
from tokenlab.experiment import Experiment
from tokenlab.models import llama
from tokenlab.objectives import NextToken, Objective, Term
from tokenlab.study import Bound, Claim, Measured, Study, Trial
from tokenlab.tokenizers import SentencePieceTrainer
from tokenlab.train.checkpoint import Checkpointing
from tokenlab.train.optimizer import AdamW, WarmupStableDecay

CORPUS = TfdsCorpus(name="english_prose")
VOCABULARY, LENGTH, ROWS, STEPS = 4096, 64, 8, 300
EPSILON = 2.0**-12  # the paper's, for bfloat16
FILTERED = LinearCrossEntropyConfig(
    block_tokens=128,
    block_vocabulary=128,
    skip_below=EPSILON,
    sort_vocabulary=True,
    interpret=True,
)


def config() -> Experiment:
    """The exact arm."""
    return Experiment(
        name="cce",
        tokenizer=SentencePieceTrainer(vocab_size=VOCABULARY),
        data=PackedText(corpus=CORPUS, length=LENGTH),
        batch_size=ROWS,
        model=llama(
            vocab_size=VOCABULARY, dim=128, num_layers=2, num_heads=4, num_kv_heads=2,
            hidden_dim=384,
        ),
        objective=Objective(terms={"next_token": Term(loss=NextToken())}),
        optimizer=AdamW(learning_rate=WarmupStableDecay(peak=1e-3)),
        steps=STEPS,
        checkpoint=Checkpointing(every=STEPS),
        evals={
            "held_out": HeldOutText(
                corpus=CORPUS, length=LENGTH, stride=LENGTH // 2, max_documents=2
            )
        },
    )  # fmt: skip


def filtered() -> Experiment:
    """The same with small gradients left out."""
    loss = NextToken(impl="tpu", config=FILTERED)
    return configs.replace(config(), {"objective.terms.next_token.loss": loss})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles(Trial):
    """Tiles without a gradient above epsilon, with logits as of a vocabulary that follows Zipf.

    Attributes:
        order: of the vocabulary: as it comes (any), or by mean logit.
        tokens: rows.
        vocabulary: entries.
        width: of the hidden states.
        tile: rows and entries of a tile.
        spread: standard deviation of logits over tokens.
    """

    order: Literal["natural", "sorted"]
    tokens: int = 256
    vocabulary: int = 4096
    width: int = 64
    tile: int = 64
    spread: float = 1.0

    def measure(self, *, seed: int) -> Measured:
        """Shares, and the relative error of the hidden states' gradient."""
        rng = np.random.default_rng(seed)
        hidden = rng.normal(size=(self.tokens, self.width))
        weight = self.spread * rng.normal(size=(self.vocabulary, self.width)) / self.width**0.5
        bias = -1.5 * np.log(1.0 + rng.permutation(self.vocabulary))
        if self.order == "sorted":
            order = np.argsort(weight @ hidden.mean(axis=0) + bias)
            weight, bias = weight[order], bias[order]
        logits = hidden @ weight.T + bias
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        targets = (share.cumsum(axis=1) < rng.random((self.tokens, 1))).sum(axis=1)
        gradient = share - np.eye(self.vocabulary)[np.minimum(targets, self.vocabulary - 1)]
        tiled = gradient.reshape(-1, self.tile, self.vocabulary // self.tile, self.tile)
        kept = (np.abs(tiled) > EPSILON).any(axis=(1, 3), keepdims=True)
        exact, left = gradient @ weight, (tiled * kept).reshape(gradient.shape) @ weight
        figures = {
            "tiles/left_out": float(1 - kept.mean()),
            "tiles/entries_above": float((np.abs(gradient) > EPSILON).mean()),
            "tiles/gradient_error": float(np.linalg.norm(left - exact) / np.linalg.norm(exact)),
        }
        return Measured(figures=figures, costs={"slots": self.tokens})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory(Trial):
    """Temporary memory of the compiled loss and its gradients, in MiB.

    Attributes:
        impl: whole logits (``"ref"``) or blocks of the vocabulary (``"xla"``).
        width: of the hidden states.
    """

    impl: Literal["ref", "xla"]
    width: int = 256

    def measure(self, *, seed: int) -> Measured:
        """Of 1k and 4k tokens and of vocabularies of 8k and 64k; no number depends on the seed."""
        del seed

        def loss(hidden, weight, targets):
            out = linear_cross_entropy(
                hidden=hidden, weight=weight, targets=targets, impl=self.impl
            )
            return jnp.mean(out.log_sum_exp - out.target)

        figures = {}
        for tokens in (1024, 4096):
            for vocabulary in (8192, 65536):
                shapes = [
                    jax.ShapeDtypeStruct(shape, jnp.float32)
                    for shape in ((1, tokens, self.width), (vocabulary, self.width))
                ]
                step = jax.jit(jax.value_and_grad(loss, (0, 1)))
                compiled = step.lower(*shapes, jax.ShapeDtypeStruct((1, tokens), jnp.int32))
                needed: Any = compiled.compile().memory_analysis()
                name = f"memory/{tokens // 1024}k_by_{vocabulary // 1024}k"
                figures[name] = needed.temp_size_in_bytes / 2**20
        return Measured(figures=figures, costs={"slots": 4096})


def study() -> Study:
    """Exact against filtered training, sorted against natural tiles, blocks against logits."""
    close = functools.partial(Claim, metric="held_out/bits_per_byte", margin=-0.005, relative=True)
    return Study(
        name="cce",
        question="Is the vocabulary loss the same without whole logits and small gradients?",
        arms={
            "exact": config(),
            "filtered": filtered(),
            "natural": Tiles(order="natural"),
            "sorted": Tiles(order="sorted"),
            "blocks": Memory(impl="xla"),
            "whole": Memory(impl="ref"),
        },
        matched="slots",
        claims=(
            close(arm="filtered", than="exact"),
            close(arm="exact", than="filtered"),
            Claim(
                arm="sorted", than="natural", metric="tiles/left_out", better="higher", margin=0.2
            ),
            Bound(arm="sorted", metric="tiles/gradient_error", limit=0.005, side="below"),
            *(
                Claim(arm="blocks", than="whole", metric=metric, margin=0.5, relative=True)
                for metric in ("memory/1k_by_64k", "memory/4k_by_8k", "memory/4k_by_64k")
            ),
        ),
    )
