"""VQ-Logits: how much worse a language model is whose tokens share rows of its output.

A small model of English prose is trained with a row per token, and with K shared rows under three
maps: equal bins of tokens by frequency, a balanced random map, and the clusters (k-means) of the
output embedding of the model with a row per token, whose centres are the first codebook. Beside
each stand the two bounds: what independent tokens lose (the floor), and what the untied model's
own distributions lose when they are tied (the projection gap).

Paper:    Shao et al., "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via
          Vector Quantized Logits", 2025, arXiv:2505.10202
Command:  python -m tokenlab data fetch english_prose
          python -m tokenlab study experiments/models/vq_logits.py
Hardware: two CPU cores, ten minutes.
Expected: perplexity rises as K falls, to 1.4, 1.8 and 2.4 times that of a row per token for V/2,
          V/4 and V/16 rows by frequency; clusters do better (1.4 and 1.7), a random map far worse
          (2.4 and 5.5), and nothing comes near the paper's 4 %. The projection gap foretells all of
          it to within a tenth of a nat. A random map of V/4 rows is not surely beyond its floor
          (0.04 nats, 95 % interval -0.09 to 0.17; -0.01 after 250 steps), for the floor is counted
          from the text's own distribution, which the model with a row per token has not learned
          either: so the study as a whole does not hold.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tokenlab import config as configs
from tokenlab.core.context import Context, View
from tokenlab.data import PackedText, TfdsCorpus
from tokenlab.evals import HeldOutText, windows
from tokenlab.experiment import Experiment
from tokenlab.models import LinearHead, VQHead, llama
from tokenlab.models.codes import (
    frequency_codes,
    k_means,
    projection_gap,
    random_codes,
    unigram_floor,
    with_codes,
)
from tokenlab.objectives import NextToken, Objective, Term
from tokenlab.study import Bound, Claim, Measured, Study, Trial
from tokenlab.tokenizers import SentencePieceTrainer
from tokenlab.train.optimizer import AdamW, WarmupStableDecay
from tokenlab.train.run import Run

CORPUS = TfdsCorpus(name="english_prose")
VOCABULARY, LENGTH, ROWS, STEPS = 4096, 64, 8, 400


def config() -> Experiment:
    """The model with a row per token."""
    return Experiment(
        name="vq_logits",
        tokenizer=SentencePieceTrainer(vocab_size=VOCABULARY),
        data=PackedText(corpus=CORPUS, length=LENGTH),
        batch_size=ROWS,
        model=llama(
            vocab_size=VOCABULARY, dim=128, num_layers=2, num_heads=4, num_kv_heads=2,
            hidden_dim=384, head=LinearHead(),
        ),
        objective=Objective(terms={"next_token": Term(loss=NextToken())}),
        optimizer=AdamW(learning_rate=WarmupStableDecay(peak=3e-3)),
        steps=STEPS,
        evals={
            "held_out": HeldOutText(
                corpus=CORPUS, length=LENGTH, stride=LENGTH // 2, max_documents=2
            )
        },
    )  # fmt: skip


@functools.cache
def untied(seed: int, steps: int):
    """The run with a row per token, its parameters, and how often it met each token."""
    run = Run.of(configs.replace(config(), {"seed": seed, "steps": steps}))
    counts = np.zeros(VOCABULARY)
    for batch in itertools.islice(run.batches(), steps):
        np.add.at(counts, batch["targets"][batch["weights"] > 0], 1.0)
    return run, trained(run, run.trainer.init()), counts


def trained(run: Run, state):
    """The parameters after all steps of a run that starts at ``state``."""
    for after, _ in run.steps(state):
        state = after
    return state.params


def nats(run: Run, params) -> float:
    """Held-out nats per token."""
    found = run.experiment.evals["held_out"](
        model=run.experiment.model, params=params, tokenizer=run.tokenizer
    )
    return math.log(found["perplexity"])


def gap(run: Run, params, codes) -> float:
    """Projection gap of the untied model, over the first held-out document."""
    model, tokenizer = run.experiment.model, run.tokenizer
    text = CORPUS.documents("held_out")[0].text
    ids = np.asarray([tokenizer.bos_id, *tokenizer.encode(text)], np.int32)
    rows = list(windows(ids, LENGTH, LENGTH // 2))[:64]
    batch = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}

    @jax.jit
    def of(batch):
        context = Context(batch=batch, views={"policy": View(model=model, params=params)})
        logits: Any = model.apply({"params": params}, context.output().hidden, method="logits")
        log_p = jax.nn.log_softmax(logits).reshape(-1, VOCABULARY)
        found = projection_gap(log_p, batch["targets"].reshape(-1), jnp.asarray(codes))
        weights = batch["weights"].reshape(-1)
        return jnp.sum(found * weights) / jnp.sum(weights)

    return float(of(batch))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tied(Trial):
    """A model with K rows.

    Attributes:
        rows: K; as many as tokens is a row per token.
        codes: how tokens share them.
        steps: of training.
    """

    rows: int
    codes: Literal["none", "frequency", "random", "k_means"]
    steps: int

    def measure(self, *, seed: int) -> Measured:
        """Held-out perplexity beside that of a row per token, and both bounds."""
        run, params, counts = untied(seed, self.steps)
        full = nats(run, params)
        floor = projected = 0.0
        ours = full
        if self.codes != "none":
            codes, centres = self.map(seed)
            head = VQHead(num_codes=self.rows)
            tied = Run.of(
                configs.replace(run.experiment, {"model.head": head}), tokenizer=run.tokenizer
            )
            state = tied.trainer.init()
            placed = jax.tree.map(lambda leaf: leaf.sharding, state.params)
            first = with_codes(state.params, codes, centres)
            state = dataclasses.replace(state, params=jax.device_put(first, placed))
            ours = nats(tied, trained(tied, state))
            floor, projected = unigram_floor(counts, codes), gap(run, params, codes)
        figures = {
            "vq/perplexity": math.exp(ours),
            "vq/perplexity_factor": math.exp(ours - full),
            "vq/nats_more": ours - full,
            "vq/floor": floor,
            "vq/projection_gap": projected,
            "vq/beyond_floor": ours - full - floor,
        }
        costs = {"tokens": self.steps * ROWS * LENGTH, "output_rows": self.rows}
        return Measured(figures=figures, costs=costs)

    def map(self, seed: int):
        """The map, and the codebook it comes with or None."""
        _, params, counts = untied(seed, self.steps)
        if self.codes == "frequency":
            return frequency_codes(counts, self.rows), None
        if self.codes == "random":
            return random_codes(VOCABULARY, self.rows, seed=seed), None
        kernel = params["head"]["kernel"]
        codes, centres = jax.jit(k_means, static_argnums=1)(
            kernel, self.rows, key=jax.random.key(seed)
        )
        return np.asarray(codes), centres


def study() -> Study:
    """Fewer rows, and three ways to share them."""
    tied = functools.partial(Tied, steps=STEPS)
    arms = {"full": tied(rows=VOCABULARY, codes="none")}
    for part in (2, 4, 16):
        arms[f"frequency-{part}"] = tied(rows=VOCABULARY // part, codes="frequency")
    for part in (4, 16):
        arms[f"random-{part}"] = tied(rows=VOCABULARY // part, codes="random")
        arms[f"k_means-{part}"] = tied(rows=VOCABULARY // part, codes="k_means")
    worse = functools.partial(Claim, metric="vq/nats_more")
    return Study(
        name="vq_logits",
        question="What does a language model lose whose tokens share rows of its output?",
        arms=arms,
        matched="tokens",
        claims=(
            worse(arm="full", than="frequency-2"),
            worse(arm="frequency-2", than="frequency-4"),
            worse(arm="frequency-4", than="frequency-16"),
            worse(arm="frequency-16", than="random-16", margin=0.1),
            worse(arm="k_means-16", than="random-16", margin=0.1),
            *(Bound(arm=arm, metric="vq/beyond_floor", limit=0.0) for arm in arms if arm != "full"),
        ),
    )
