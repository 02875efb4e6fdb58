"""SkipDecode on texts that say what slots hold, beside the twin that ends early.

The prompt is a list of slots, the text 35 tokens in clauses whose order and wording are free. From
the first token that is written to the last, layers fall from 6 to 2 of 8, on average half of them.
A model of full depth is trained once for each seed, and every arm goes on from it.

Paper:    Del Corro et al., "SkipDecode: Autoregressive Skip Decoding with Batching and Caching for
          Efficient LLM Inference", 2023, arXiv:2307.02628.
Command:  python -m tokenlab study experiments/depth/skip_decode.py
Hardware: two CPU cores, ten minutes; an hour on a busy machine.
Expected: one claim of four does not show, in two settings: the text has 0.294 nats a token that
          nobody can predict, and all arms come down to it. Gone on from full depth for 300 steps:
          0.2955 nats skipping, 0.2959 ending early (lower by 0.0003, -0.0007 to 0.0014), 0.2949 at
          full depth, within 5 % of which skipping stays. In the later half of a text skipping costs
          0.1624, ending early 0.1630 and full depth 0.1617: it rises less at every seed, by 0.0005
          (0.0004 to 0.0007). A token takes 0.57 of the time of full depth (0.44 to 0.69) at 0.58 of
          its layers; measured once before on a machine that was much busier, 0.39, 0.60 and 0.59.
          The first setting, width 64 and each arm trained from the start for 1000 steps: 0.2969,
          0.2956 and 0.3386 nats (full depth misses the text's own at one seed of three), skipping
          against ending early 0.0012 worse (0.0063 worse to 0.0039 better), in the later half
          0.0014 worse (0.0079 worse to 0.0051 better); 0.64 of the time.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokenlab import config as configs
from tokenlab.core.context import View
from tokenlab.core.duration import Fraction
from tokenlab.data.tasks import SlotText, TaskSource
from tokenlab.decode import Autoregressive, Greedy
from tokenlab.depth import DepthProgram, Sequential, SkipDecode, linear_decay
from tokenlab.evals import DepthAllocation
from tokenlab.experiment import Experiment
from tokenlab.models import llama
from tokenlab.objectives import NextToken, Objective, Term
from tokenlab.study import Bound, Claim, Measured, Study, Trial
from tokenlab.study.trained import FineTuned
from tokenlab.train.checkpoint import Checkpointing
from tokenlab.train.optimizer import AdamW, Cosine

TASK = SlotText()
COLUMNS = TASK.length - TASK.prompt_length
SKIP = SkipDecode(
    counts=linear_decay(most=6, fewest=2, columns=COLUMNS), prompt_length=TASK.prompt_length
)


def full() -> Experiment:
    """The model that all arms go on from: all layers in every column."""
    return Experiment(
        name="skip_decode_full",
        tokenizer=TASK.tokenizer,
        data=TaskSource(task=TASK),
        batch_size=32,
        model=llama(
            vocab_size=TASK.tokenizer.vocab_size,
            dim=96,
            num_layers=8,
            num_heads=4,
            num_kv_heads=4,
            hidden_dim=256,
            depth=Sequential(),
        ),
        objective=Objective(terms={"next_token": Term(loss=NextToken())}),
        optimizer=AdamW(learning_rate=Cosine(peak=2e-3)),
        steps=1500,
        checkpoint=Checkpointing(every=Fraction(of_run=1.0)),
        evals={"text": DepthAllocation(task=TASK)},
        log_every=100,
    )


def config() -> Experiment:
    """The first layer and the top ones that the column has: a fifth of the steps, half the rate."""
    changes = {"name": "skip_decode", "model.depth": SKIP, "steps": 300}
    return configs.replace(full(), changes | {"optimizer.learning_rate.peak": 1e-3})


def early() -> Experiment:
    """As many layers, from the bottom."""
    return configs.replace(config(), {"model.depth.keep": "bottom"})


def longer() -> Experiment:
    """All layers, for as many steps as the others."""
    return configs.replace(config(), {"model.depth": full().model.depth})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clock(Trial):
    """Time of a written token, over that of the same model at full depth.

    Attributes:
        tokens: tokens written by each of ``batch`` rows.
        batch: rows.
        layers: layers of the model; it runs from all of them to none but the first and the last.
        repeats: turns of both, of which the best counts.
    """

    tokens: int = 64
    batch: int = 8
    layers: int = 12
    repeats: int = 5

    def measure(self, *, seed: int) -> Measured:
        """Both write in turn."""
        counts = linear_decay(most=self.layers, fewest=2, columns=self.tokens)
        parts: dict[str, DepthProgram] = {
            "full": Sequential(),
            "skip": SkipDecode(counts=counts, prompt_length=8),
        }
        prompts = jax.random.randint(jax.random.key(seed), (self.batch, 8), 0, 512).tolist()
        decoder = Autoregressive(max_new_tokens=self.tokens, sampler=Greedy(), end_ids=())
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        views = {}
        for name, depth in parts.items():
            model = llama(
                vocab_size=512, dim=256, num_layers=self.layers, num_heads=4, num_kv_heads=4,
                hidden_dim=768, depth=depth,
            )  # fmt: skip
            zeros = jnp.zeros((1, 4), jnp.int32)
            where = {"positions": zeros, "segments": zeros + 1}
            params = jax.jit(model.init)(jax.random.key(seed), zeros, **where)["params"]
            views[name] = View(model=model, params=nn.meta.unbox(params))
            decoder(views[name], prompts, key=jax.random.key(0))
        for _ in range(self.repeats):
            for name, view in views.items():
                start = time.perf_counter()
                decoder(view, prompts, key=jax.random.key(0))
                seconds[name].append(time.perf_counter() - start)
        best = {name: min(each) for name, each in seconds.items()}
        share = sum(counts) / (self.layers * self.tokens)
        return Measured(
            figures={
                "clock/share_of_time": best["skip"] / best["full"],
                "clock/share_of_layers": share,
                "clock/full_ms_per_step": 1e3 * best["full"] / self.tokens,
            },
            costs={"tokens": float(self.tokens * self.batch)},
        )


def study() -> Study:
    """All at equal tokens; the two that skip also at equal work."""
    return Study(
        name="skip_decode",
        question="Does it matter which layers late tokens run, at half of them on average?",
        arms={
            "skip": FineTuned(base=full(), experiment=config()),
            "early": FineTuned(base=full(), experiment=early()),
            "full": FineTuned(base=full(), experiment=longer()),
            "clock": Clock(),
        },
        matched="tokens",
        claims=(
            Claim(arm="skip", than="early", metric="text/nats"),
            Claim(arm="skip", than="early", metric="text/late_nats"),
            Claim(arm="skip", than="full", metric="text/nats", margin=-0.05, relative=True),
            Bound(arm="clock", metric="clock/share_of_time", limit=0.75, side="below"),
        ),
    )
