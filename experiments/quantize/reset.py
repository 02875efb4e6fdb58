"""ReSET on a generator whose right symbols and free branches are known.

A trace has steps that end with a blank line. A step opens with a branch, where four tokens are
about as likely and all are right, and goes on with symbols, of which one is right and another lies
some nats below. Logits carry noise, as quantisation leaves it. The threshold is what the paper
takes: the 80th percentile of entropies over five calibration problems. A quarter of the tokens are
branches; in the ``rare`` arms one in twelve is. The paper's check on a language model that reasons
is not part of this study.

Paper:    Lee, Lee, Yoo, et al., "ReSET: Accurate Latency-Critical NVFP4 Reasoning via Step-Aware
          Temperature Scaling", 2026, arXiv:2606.13233.
Command:  python -m tokenlab study experiments/quantize/reset.py
Hardware: one CPU core, one minute.
Expected: ReSET has 99 % of the traces right, a temperature of 0.6 has 76 % and of 1.0 has 7 %; all
          eight answers to a problem differ, where a temperature of 0.1 gives 5.5. Where branches
          are rare it loses: the percentile falls among the symbols, so that the least certain of
          them are drawn at a temperature of 1, and 38 % of the traces are right against 73 %.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tokenlab import config as configs
from tokenlab.core.arrays import Array, Float, Int
from tokenlab.decode import Categorical, History, ReSET, StepEnds, Temperature, TopP
from tokenlab.study import Claim, Measured, Study, Trial

SYMBOLS, BRANCHES = 10, 4
BLANK = SYMBOLS + BRANCHES
_NEVER = -20.0


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


def _arms(name: str, **sizes: int) -> dict[str, Traces]:
    processors = {f"at_{t}": Temperature(value=t) for t in (0.1, 0.6, 1.0)}
    processors |= {"reset": ReSET(low=0.1, ends=StepEnds(blank=(BLANK,)))}
    return {
        f"{name}{arm}": Traces(processor=processor, **sizes)
        for arm, processor in processors.items()
    }


def study() -> Study:
    """Fixed temperatures against two that are chosen token by token."""
    return Study(
        name="reset",
        question="Do two temperatures keep symbols right and branches open?",
        arms=_arms("") | _arms("rare_", open=1, symbols=10),
        matched="tokens",
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
        ),
    )
