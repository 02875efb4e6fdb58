"""LinMU: a decoder that answers questions about a grid, distilled into one of linear cost.

The teacher reads an 8 by 8 grid of coloured patches and then ten questions: the colour at the
marked patch, how many patches are red, and what lies to the right of and below each of four
landmarks. The student has M-MATE blocks in place of attention, starts from the teacher's weights
and learns from it alone, in three stages: the state space and the weights of the branches, both
branches, and all with the feed-forward layers through adapters of rank 16. Beside it stand students
with one branch, and one that trains everything at once for as many steps. The teacher is the same
at every seed; what the student begins with and reads is not.

Paper:    Hongjie Wang, Niraj K. Jha, "LinMU: Multimodal Understanding Made Linear", 2026,
          arXiv:2601.01322
Command:  python -m tokenlab study experiments/models/linmu.py
Hardware: two CPU cores; sixteen minutes beside other work, the teacher trained before.
Expected: of the ten answers the student gets 0.67 right where the teacher gets 0.79. It needs both
          branches: the state space alone has 0.26 of the neighbours (both 0.61), windows alone
          0.12 of the counts (both 0.96). Work of a patch and bytes of the state do not grow with
          the video, those of the teacher do. But it is 0.12 behind the teacher and not within 0.05,
          and three stages are no better than one of as many steps (0.67 against 0.69); so too
          after 240 steps of 32 rows at half the rate (0.10 behind; 0.69 against 0.70, one seed).
          On CPU cores (``benchmarks.mmate``, width 256) the block is slower than attention in
          blocks up to some 1,000 tokens, 1.3 times as fast at 2,048 and twice at 8,192; with its
          gradient it is slower up to 2,048 and 1.7 times as fast at 8,192. The paper has 2.7 and 9
          at minutes of video, which is longer.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from tokenlab import config as configs
from tokenlab.cache import FullCache, Recurrent
from tokenlab.core.context import Context, View
from tokenlab.data import TaskSource
from tokenlab.data.tasks import GridQuestions
from tokenlab.experiment import Experiment
from tokenlab.models import Grid, LowRank, Window, linmu, llama, with_teacher
from tokenlab.objectives import NextToken, Objective, StreamError, TeacherKL, Term
from tokenlab.study import Bound, Claim, Measured, Study, Trial
from tokenlab.study.trained import continued, trained
from tokenlab.train.optimizer import Muon, WarmupStableDecay
from tokenlab.train.run import Run

TASK = GridQuestions()
SOURCE = TaskSource(task=TASK, prompts=True)
WINDOW = Window(frames=1, height=4, width=4)
ROWS, STEPS, HELD_OUT = 16, 180, 512  # of distillation, and rows that are asked at the end
DISTILLED = Objective(
    terms={"streams": StreamError(), "teacher": Term(loss=TeacherKL(), coefficient=1.0)}
)
Branches = Literal["both", "flex", "local"]


def config() -> Experiment:
    """The teacher."""
    model = llama(
        vocab_size=TASK.tokenizer.vocab_size, dim=64, num_layers=2, num_heads=4, num_kv_heads=4,
        hidden_dim=128, max_length=TASK.length,
    )  # fmt: skip
    experiment = Experiment(
        name="linmu",
        tokenizer=TASK.tokenizer,
        data=SOURCE,
        batch_size=32,
        model=model,
        objective=Objective(terms={"next_token": Term(loss=NextToken())}),
        optimizer=Muon(learning_rate=WarmupStableDecay(peak=1e-2), weight_decay=0.01),
        steps=1500,
    )
    return configs.replace(experiment, {"model.block.mixer.rope_base": 100.0})


def student(branches: Branches, frames: int = 1):
    """The teacher's model with M-MATE blocks."""
    grid = Grid(frames=frames, height=TASK.height, width=TASK.width)
    return linmu(
        config().model, grid=grid, window=WINDOW, chunk=96, branches=branches,
        adapter=LowRank(rank=16),
    )  # fmt: skip


def stages(branches: Branches, joint: bool) -> list[tuple[str, ...]]:
    """Which parameters each stage trains."""
    parts: dict[Branches, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "both": (("*/flex/*", "*/combine/*"), ("*/local/*",)),
        "flex": (("*/flex/*",), ()),
        "local": (("*/local/*",), ()),
    }
    first, second = parts[branches]
    names: list[tuple[str, ...]] = [first, first + second, (*first, *second, "*/adapter/*")]
    return names[-1:] if joint else names


@functools.cache
def teacher() -> View:
    """The teacher, trained."""
    return trained(config())[0]


@functools.cache
def stage(branches: Branches, names: tuple[str, ...], steps: int) -> Run:
    """A stage of training; one program for all seeds."""
    changes = {
        "model": student(branches),
        "objective": DISTILLED,
        "batch_size": ROWS,
        "optimizer.trained": names,
        "optimizer.learning_rate": WarmupStableDecay(peak=1e-2),
        "steps": steps,
    }
    experiment = configs.replace(config(), changes)
    return Run.of(experiment, tokenizer=TASK.tokenizer, views={"teacher": teacher()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distilled(Trial):
    """A student after all stages.

    Attributes:
        branches: of its blocks.
        joint: whether everything is trained at once.
        steps: of all stages together, one third each.
    """

    branches: Branches = "both"
    joint: bool = False
    steps: int = STEPS

    def measure(self, *, seed: int) -> Measured:
        """Accuracy by kind of question, and how far it is from the teacher."""
        names = stages(self.branches, self.joint)
        runs = [stage(self.branches, each, self.steps // len(names)) for each in names]
        data = SOURCE.batches(tokenizer=TASK.tokenizer, batch_size=ROWS, seed=seed)
        batches = iter(data)
        first = dataclasses.replace(runs[0].trainer, seed=seed).init()
        params = with_teacher(first.params, teacher().params)
        for run in runs:
            params = continued(run, params, batches)
        view = View(model=runs[-1].experiment.model, params=params)
        figures = answered(view)
        behind = answered(teacher())["answers/all"] - figures["answers/all"]
        costs = {"steps": self.steps, "trained_tokens": self.steps * ROWS * TASK.length}
        return Measured(figures=figures | {"answers/behind_teacher": behind}, costs=costs)


def answered(view: View) -> dict[str, float]:
    """Shares of right answers, and distances from the teacher, on rows that nobody trained on."""
    source = dataclasses.replace(SOURCE, split="held_out")
    batch = next(iter(source.batches(tokenizer=TASK.tokenizer, batch_size=HELD_OUT, seed=0)))

    @jax.jit
    def run(batch):
        context = Context(batch=batch, views={"policy": view, "teacher": teacher()})
        logits = view(context.output().hidden, method="logits")
        means = {name: part.mean() for name, part in DISTILLED(context).items()}
        return jnp.argmax(logits, axis=-1) == batch["targets"], means

    right, means = jax.device_get(run(batch))
    asked = batch["tokens"] - TASK.tokenizer.encode("q0 ")[0]
    kinds = {
        "marked": asked == 0, "count": asked == 1, "neighbour": asked > 1, "all": asked >= 0,
    }  # fmt: skip
    figures = {
        f"answers/{kind}": float(np.mean(right[mask & (batch["weights"] > 0)]))
        for kind, mask in kinds.items()
    }
    return figures | {f"distance/{name}": float(value) for name, value in means.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth(Trial):
    """How costs of a token grow with the number of frames, by the ledger.

    Attributes:
        linear: whether of the student or of the teacher.
        frames: of the longer of two videos; the other has one.
    """

    linear: bool
    frames: int = 16

    def measure(self, *, seed: int) -> Measured:
        """Operations of a patch and bytes of a row, of the longer as shares of the shorter."""
        flops, kept = np.asarray([self._costs(frames) for frames in (1, self.frames)]).T
        figures = {"growth/flops_per_patch": flops[1] / flops[0], "growth/bytes": kept[1] / kept[0]}
        return Measured(figures=figures, costs={"steps": 0, "trained_tokens": 0})

    def _costs(self, frames: int) -> tuple[float, float]:
        model = student("both", frames) if self.linear else config().model
        length = frames * TASK.height * TASK.width
        positions = jnp.arange(length)[None]
        where = {"positions": positions, "segments": jnp.ones_like(positions)}
        kinds = model.block.kinds()
        turns = jnp.ones((model.num_layers // len(kinds), 1, length), bool)
        pairs = jnp.stack([kind.mixer.pairs(active=turns, read=turns, **where) for kind in kinds])
        flops = model.flops(jnp.full((model.num_layers,), float(length)), pairs)
        policy = Recurrent() if self.linear else FullCache()
        cache = jax.eval_shape(lambda: model.empty_cache(policy, batch=1, capacity=length).states)
        kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
        return float(flops) / length, float(kept)


def study() -> Study:
    """Both branches against either, three stages against one, and costs against the teacher's."""
    better = functools.partial(Claim, arm="M-MATE", better="higher")
    return Study(
        name="linmu",
        question="Does a decoder of linear cost answer what its teacher does, and what for?",
        arms={
            "M-MATE": Distilled(),
            "one stage": Distilled(joint=True),
            "Flex-MA only": Distilled(branches="flex"),
            "Local only": Distilled(branches="local"),
            "cost of M-MATE": Growth(linear=True),
            "cost of the teacher": Growth(linear=False),
        },
        matched="trained_tokens",
        claims=(
            better(than="Flex-MA only", metric="answers/neighbour"),
            better(than="Local only", metric="answers/count"),
            better(than="Local only", metric="answers/marked"),
            better(than="one stage", metric="answers/all", margin=-0.01),
            Bound(arm="M-MATE", metric="answers/behind_teacher", limit=0.05, side="below"),
            Bound(arm="cost of M-MATE", metric="growth/flops_per_patch", limit=1.001, side="below"),
            Bound(arm="cost of the teacher", metric="growth/flops_per_patch", limit=2.0),
            Bound(arm="cost of M-MATE", metric="growth/bytes", limit=1.001, side="below"),
            Bound(arm="cost of the teacher", metric="growth/bytes", limit=15.0),
        ),
    )
