"""ReSET on a generator whose right symbols and free branches are known.

A trace has steps that end with a blank line. A step opens with a branch, where four tokens are
about as likely and all are right, and goes on with symbols, of which one is right and another lies
some nats below. Logits carry noise, as quantisation leaves it. The threshold is what the paper
takes: the 80th percentile of entropies over five calibration problems. A quarter of the tokens are
branches; in the ``rare`` arms one in twelve is.

And on a small decoder that was trained to work through arithmetic, with weights and activations in
NVFP4, in the ``weights`` arms only the former: a step of its thoughts opens with one of four words
of the same meaning, where steps end here in place of blank lines. Its threshold is calibrated
likewise, on what it draws at 0.6, and the tensor scales of its activations on 64 problems. A model
of each seed.

Paper:    Lee, Lee, Yoo, et al., "ReSET: Accurate Latency-Critical NVFP4 Reasoning via Step-Aware
          Temperature Scaling", 2026, arXiv:2606.13233.
Command:  python -m tokenlab study experiments/quantize/reset.py
Hardware: two CPU cores, about six minutes, and four more for the models of ``swi_reasoning.py``.
Expected: ReSET has 99 % of the traces right, a temperature of 0.6 has 76 % and of 1.0 has 8 %; all
          eight answers to a problem differ, where a temperature of 0.1 gives 5.4. Where branches
          are rare it loses: the percentile falls among the symbols, so that the least certain of
          them are drawn at a temperature of 1, and 37 % of the traces are right against 73 %.
          The decoder has 0.859 of its answers right at 0.6 (0.99 to 0.49 by model), with weights in
          NVFP4 0.831 and with both 0.747, a loss of 0.11 (0.05 to 0.17 over five models). There
          ReSET has 0.785: above 0.6 by 0.038 (0.020 to 0.056), above 1.0 by 0.14 (0.09 to 0.19),
          and 0.008 (-0.003 to 0.019) behind 0.1, the best fixed one, at which 7.2 of eight samples
          still differ (7.4 with ReSET). Entropies from 0.5 to 1 nat are more common in few bits:
          0.07 of the tokens against 0.04. With weights alone and three models the same arms did
          not tell the loss (0.036, -0.06 to 0.14) nor the gain over 0.6 (0.037, -0.03 to 0.10).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tokenlab import config as configs
from tokenlab.core.arrays import Array, Float, Int
from tokenlab.core.context import View
from tokenlab.decode import (
    Autoregressive,
    Categorical,
    Generation,
    History,
    ReSET,
    StepEnds,
    Temperature,
    TopP,
)
from tokenlab.files import load_module
from tokenlab.models import rounded, unrolled
from tokenlab.quantize import NVFP4, Layerwise
from tokenlab.study import Claim, Measured, Study, Trial

# The models that reason.
thinking = load_module(pathlib.Path(__file__).parents[1] / "latent" / "swi_reasoning.py")

SYMBOLS, BRANCHES = 10, 4
BLANK = SYMBOLS + BRANCHES
_NEVER = -20.0
CALIBRATION = 64  # problems that set the tensor scales of activations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traces(Trial):
    """Samples of a generator, judged by their symbols and counted by their branches.

    Attributes:
        processor: the temperature; the threshold of a ReSET is replaced by the calibrated one.
        problems: problems of a seed.
        samples: of each problem.
        steps: of a trace.
        open: branches of a step.
        symbols: of a step.
        gap: nats from the right symbol to the wrong one, before noise.
        noise: of every logit.
        spread: of the branches of a problem, besides.
    """

    processor: Temperature | ReSET
    problems: int = 200
    samples: int = 8
    steps: int = 4
    open: int = 3
    symbols: int = 8
    gap: float = 2.5
    noise: float = 0.4
    spread: float = 0.5

    def measure(self, *, seed: int) -> Measured:
        """Accuracy of traces, error of symbols, and distinct answers among the samples."""
        rng = np.random.default_rng(seed)
        processor = self.processor
        if isinstance(processor, ReSET):
            processor = configs.replace(processor, {"threshold": self._threshold(rng)})
        logits, right = self._draw(rng, self.problems)
        tokens = self._sample(processor, logits, seed)
        wrong = (tokens != right[:, None]) & (right >= 0)[:, None]
        branches = tokens[:, :, self._places() < self.open]
        distinct = [len({tuple(row) for row in rows}) for rows in branches.tolist()]
        return Measured(
            figures={
                "trace/accuracy": float(np.mean(~wrong.any(axis=2))),
                "trace/symbol_error": wrong.sum() / (self.samples * (right >= 0).sum()),
                "trace/distinct": float(np.mean(distinct)),
            },
            costs={"tokens": tokens.size},
        )

    def _places(self) -> Int[np.ndarray, " T"]:
        """Places of a trace's tokens in their steps."""
        return np.tile(np.arange(self.open + self.symbols + 1), self.steps)

    def _draw(
        self, rng: np.random.Generator, problems: int
    ) -> tuple[Float[np.ndarray, "P T V"], Int[np.ndarray, "P T"]]:
        """Logits of every place, and its right symbol, -1 where there is none."""
        place = self._places()
        logits = np.full((problems, len(place), BLANK + 1), _NEVER)
        right = np.full(logits.shape[:2], -1)
        for p in range(problems):
            for t, at in enumerate(place):
                if at < self.open:
                    logits[p, t, SYMBOLS:BLANK] = self.spread * rng.normal(size=BRANCHES)
                elif at == self.open + self.symbols:
                    logits[p, t, BLANK] = 0.0
                else:
                    right[p, t], other = rng.choice(SYMBOLS, 2, replace=False)
                    logits[p, t, right[p, t]], logits[p, t, other] = 0.0, -self.gap
        noisy = logits + self.noise * rng.normal(size=logits.shape)
        return noisy.astype(np.float32), right

    def _threshold(self, rng: np.random.Generator) -> float:
        """The 80th percentile of entropies; what is drawn does not change these logits."""
        logp = np.asarray(jax.nn.log_softmax(jnp.asarray(self._draw(rng, 5)[0]), axis=-1))
        return float(np.percentile(-np.sum(np.exp(logp) * logp, axis=-1), 80))

    def _sample(
        self, processor: Temperature | ReSET, logits: Float[np.ndarray, "P T V"], seed: int
    ) -> Int[np.ndarray, "P S T"]:
        rows = jnp.asarray(np.repeat(logits, self.samples, axis=0))
        count, length, _ = rows.shape
        sampler = Categorical(processors=(processor, TopP(p=0.95)))
        keys = jax.random.split(jax.random.key(seed), count)
        none = jnp.zeros(count, jnp.int32)

        def step(carry: tuple[History, tuple], t: Array) -> tuple[tuple[History, tuple], None]:
            history, state = carry
            here = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
            draw, state = sampler(rows[:, t], state, history=history, keys=here)
            return (history.append(draw.token, jnp.ones(count, bool)), state), None

        history = History(jnp.zeros((count, length), jnp.int32), none, none)
        run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(length))[0])
        history, _ = run((history, sampler.init(batch=count)))
        return np.asarray(history.tokens).reshape(len(logits), self.samples, length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reasoning(Trial):
    """Answers of a small decoder, several to a problem, and the entropies that it drew from.

    Attributes:
        processor: the temperature; the threshold of a ReSET is replaced by the calibrated one.
        weights: whether they are in NVFP4.
        activations: likewise, of what every projection reads.
        problems: problems of a seed.
        samples: of each problem.
    """

    processor: Temperature | ReSET
    weights: bool = True
    activations: bool = True
    problems: int = 200
    samples: int = 8

    def measure(self, *, seed: int) -> Measured:
        """Accuracy, distinct thoughts among the samples, and the histogram of entropies."""
        task, processor = thinking.WORDING, self.processor
        view = _view(self.weights, self.activations, seed)
        if isinstance(processor, ReSET):
            five = [problem.prompt for problem in task.problems(seed=(2, seed), count=5)]
            drawn = _written(view, Temperature(value=0.6), five, seed)
            threshold = float(np.percentile(_entropies(view, five, drawn), 80))
            processor = configs.replace(processor, {"threshold": threshold})
        problems = task.problems(seed=(1, seed), count=self.problems)
        problems = [problem for problem in problems for _ in range(self.samples)]
        prompts = [problem.prompt for problem in problems]
        written = _written(view, processor, prompts, seed)
        texts = thinking.completions(written)
        several = [texts[i : i + self.samples] for i in range(0, len(texts), self.samples)]
        entropies = _entropies(view, prompts, written)
        figures = {
            "answers/accuracy": thinking.judged(task, problems, texts)["thinking/accuracy"],
            "answers/distinct": float(np.mean([len(set(map(tuple, one))) for one in several])),
            "answers/tokens": float(written.lengths.mean()),
        }
        edges = (0.0, 0.01, 0.1, 0.5, 1.0, np.inf)
        shares = np.histogram(entropies, edges)[0] / len(entropies)
        figures |= {
            f"entropy/from_{low:g}": float(share) for low, share in zip(edges, shares, strict=False)
        }
        if isinstance(processor, ReSET):
            figures["answers/threshold"] = processor.threshold
        return Measured(figures=figures, costs={"tokens": written.tokens.size})


@functools.cache
def _view(weights: bool, activations: bool, seed: int) -> View:
    """The model of a seed, in few bits."""
    trained = thinking.thinker(thinking.WORDING, seed)
    model, params = unrolled(trained.model, trained.params)
    whole = View(model=model, params=params)
    if weights:
        params = Layerwise(quantizer=NVFP4())(model, params).params
    if activations:
        model = rounded(model, params, tokens=_calibration(whole, seed))
    return View(model=model, params=params)


def _written(
    view: View, processor: Temperature | ReSET, prompts: Sequence[Sequence[int]], seed: int
) -> Generation:
    decoder = Autoregressive(
        max_new_tokens=thinking.longest(thinking.WORDING),
        sampler=Categorical(processors=(processor, TopP(p=0.95))),
    )
    return decoder(view, prompts, key=jax.random.key(seed))


def _calibration(view: View, seed: int) -> Int[Array, "P T"]:
    """Problems with what the model wrote before it was quantised, as long as the shortest."""
    problems = thinking.WORDING.problems(seed=(3, seed), count=CALIBRATION)
    prompts = [problem.prompt for problem in problems]
    written = _written(view, Temperature(value=0.6), prompts, seed)
    tokens = np.concatenate([prompts, written.tokens[:, : written.lengths.min()]], axis=1)
    return jnp.asarray(tokens)


def _entropies(
    view: View, prompts: Sequence[Sequence[int]], written: Generation
) -> Float[np.ndarray, " N"]:
    """Of the distributions of the model behind every written token, nats; prompts of one length."""
    begin = len(prompts[0])
    tokens = jnp.concatenate([jnp.asarray(prompts), jnp.asarray(written.tokens)], axis=1)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    there = np.arange(written.tokens.shape[1])[None] < written.lengths[:, None]

    @jax.jit
    def entropies(params):
        model = View(model=view.model, params=params)
        out = model(tokens, positions=positions, segments=jnp.ones_like(tokens))
        logp = jax.nn.log_softmax(model(out.hidden[:, begin - 1 : -1], method="logits"))
        return -jnp.sum(jnp.exp(logp) * logp, axis=-1)

    return np.asarray(entropies(view.params))[there]


def _arms(name: str, **sizes: int) -> dict[str, Traces]:
    processors = {f"at_{t}": Temperature(value=t) for t in (0.1, 0.6, 1.0)}
    processors |= {"reset": ReSET(low=0.1, ends=StepEnds(blank=(BLANK,)))}
    return {
        f"{name}{arm}": Traces(processor=processor, **sizes)
        for arm, processor in processors.items()
    }


def _reasoning() -> dict[str, Reasoning]:
    task = thinking.WORDING
    vocabulary = task.tokenizer.vocab_size
    openings = StepEnds(blank=tuple(range(vocabulary - task.openings, vocabulary)))
    arms = {f"nvfp4_at_{t}": Reasoning(processor=Temperature(value=t)) for t in (0.1, 0.6, 1.0)}
    arms |= {
        f"full_at_{t}": Reasoning(processor=Temperature(value=t), weights=False, activations=False)
        for t in (0.6, 1.0)
    }
    reset = Reasoning(processor=ReSET(low=0.1, ends=openings))
    weights = {"nvfp4_reset": reset, "nvfp4_at_0.6": arms["nvfp4_at_0.6"]}
    arms |= {
        name.replace("nvfp4", "weights"): dataclasses.replace(arm, activations=False)
        for name, arm in weights.items()
    }
    return arms | {"nvfp4_reset": reset}


def study() -> Study:
    """Fixed temperatures against two that are chosen token by token."""
    answers = functools.partial(Claim, metric="answers/accuracy", better="higher")
    return Study(
        name="reset",
        question="Do two temperatures keep symbols right and branches open?",
        arms=_arms("") | _arms("rare_", open=1, symbols=10) | _reasoning(),
        matched="tokens",
        seeds=tuple(range(5)),
        claims=(
            Claim(
                arm="reset",
                than="at_1.0",
                metric="trace/accuracy",
                better="higher",
                margin=0.1,
            ),
            # As good as the better of the fixed ones that keep branches open, to two points.
            Claim(
                arm="reset",
                than="at_0.6",
                metric="trace/accuracy",
                better="higher",
                margin=-0.02,
            ),
            Claim(
                arm="reset",
                than="at_0.1",
                metric="trace/distinct",
                better="higher",
                margin=1.0,
            ),
            # Where it does not help: fewer than a fifth of the tokens are open.
            Claim(
                arm="rare_at_0.6",
                than="rare_reset",
                metric="trace/accuracy",
                better="higher",
                margin=0.1,
            ),
            answers(arm="full_at_0.6", than="nvfp4_at_0.6"),
            # As good as the best fixed one, to two points.
            *(answers(arm="nvfp4_reset", than=f"nvfp4_at_{t}", margin=-0.02) for t in (0.1, 0.6)),
            answers(arm="nvfp4_reset", than="nvfp4_at_1.0"),
        ),
    )
