"""CoT2, the second stage: mixtures of thoughts by policy gradient, from half-way supervision.

The model of ``cot2.py`` is supervised for a tenth of its steps, so that there is something left to
learn. Then it thinks in means of three tokens that it draws, eight times for each row, and is
told of each rollout only whether the answer is right. It is compared with the same model before
that, and with one that is supervised for as many FLOPs more.

Paper:    Gozeten, Ildiz, Zhang, Harutyunyan, Rawat, Oymak, "Continuous Chain of Thought Enables
          Parallel Exploration and Reasoning", 2025, arXiv:2505.23648
Command:  python -m tokenlab study experiments/latent/cot2_policy.py
Hardware: two CPU cores, busy: half an hour.
Expected: rewards improve what they are given for. Where means of three drawn tokens are fed, 0.16
          of the held-out answers are right before, 0.42 behind 300 steps of rewards (higher by
          0.26, 0.17 to 0.35), 0.23 behind more supervision. Where the expected mixture is fed,
          which was not rewarded, they harm: 0.64 before, 0.46 behind (lower by 0.19, 0.06 to 0.31),
          0.80 behind more supervision. So the second of two claims does not hold. Five seeds.
"""

import dataclasses
import functools
import pathlib
from typing import Literal

from jaxtyping import PyTree

from tokenlab import config as configs
from tokenlab.decode import Autoregressive, Greedy, ThoughtFeed
from tokenlab.experiment import Experiment
from tokenlab.files import load_module
from tokenlab.models.mixtures import ExpectedToken, MeanOfSamples
from tokenlab.objectives import MixturePolicy, Objective, Term, ThoughtRollouts
from tokenlab.study import Claim, Measured, Study, Trial
from tokenlab.study.trained import trained
from tokenlab.train.optimizer import AdamW, Constant
from tokenlab.train.run import Run

cot2 = load_module(pathlib.Path(__file__).with_name("cot2.py"))
MIXTURE = MeanOfSamples(count=3)
STEPS, ROWS, GROUP = 300, 16, 8
Stage = Literal["before", "rewards", "supervision"]


def supervised() -> Experiment:
    """A tenth of the steps of ``cot2.py``."""
    return configs.replace(cot2.config(), {"steps": cot2.STEPS // 10, "name": "cot2-tenth"})


def config() -> Experiment:
    """The second stage: rewards alone."""
    rollouts = ThoughtRollouts(
        source=supervised().data, mixture=MIXTURE, thoughts=cot2.THOUGHTS, group=GROUP
    )
    changes = {
        "name": "cot2-policy",
        "data": rollouts,
        "batch_size": ROWS,
        "objective": Objective(terms={"policy": Term(loss=MixturePolicy(mixture=MIXTURE))}),
        "optimizer": AdamW(learning_rate=Constant(peak=3e-4), weight_decay=0.0),
        "steps": STEPS,
        "log_every": 50,
    }
    return configs.replace(supervised(), changes)


def figures(params: PyTree) -> dict[str, float]:
    """Held-out answers that are right, where the expected mixture is fed and where one is drawn."""
    found = {}
    for name, mixture in (("expected", ExpectedToken()), ("drawn", MIXTURE)):
        feed = ThoughtFeed(count=cot2.THOUGHTS, mixture=mixture)
        accuracy = cot2.accuracy(Autoregressive(sampler=Greedy(), feed=feed))
        task = supervised()
        right = accuracy(model=task.model, params=params, tokenizer=task.tokenizer.fit(()))
        found[f"{name}/accuracy"] = right["accuracy"]
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continued(Trial):
    """The supervised model, and what comes of it.

    Attributes:
        stage: what it learns by then: nothing, rewards, or more supervision at the FLOPs of that.
    """

    stage: Stage

    def measure(self, *, seed: int) -> Measured:
        """Held-out accuracy behind the stage."""
        view, _ = trained(configs.replace(supervised(), {"seed": seed}))
        costs = {"supervised_steps": cot2.STEPS // 10, "flops": 0.0}
        if self.stage == "before":
            return Measured(figures=figures(view.params), costs=costs)
        experiment = config() if self.stage == "rewards" else more()
        run = Run.of(configs.replace(experiment, {"seed": seed + 1000}))
        state = run.trainer.init(view.params)
        for after, metrics in run.steps(state):
            state = after
            costs["flops"] += float(metrics.ledger.flops)
        return Measured(figures=figures(state.params), costs=costs)


def more() -> Experiment:
    """More supervision, at the rate and the FLOPs of the second stage."""
    passes = (cot2.THOUGHTS + 2) * ROWS * GROUP / cot2.config().batch_size
    changes = {"optimizer": config().optimizer, "steps": round(passes * STEPS)}
    return configs.replace(supervised(), changes)


def study() -> Study:
    """Before and behind the second stage."""
    stages: tuple[Stage, ...] = ("before", "rewards", "supervision")
    claim = functools.partial(Claim, arm="rewards", than="before", better="higher")
    return Study(
        name="cot2_policy",
        question="Do rewards for answers improve thoughts that are mixtures of tokens?",
        arms={stage: Continued(stage=stage) for stage in stages},
        matched="supervised_steps",
        seeds=(0, 1, 2, 3, 4),
        claims=(claim(metric="drawn/accuracy"), claim(metric="expected/accuracy")),
    )
