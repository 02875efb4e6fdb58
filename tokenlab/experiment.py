"""The one declarative object a run is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tokenlab.core.duration import Duration
from tokenlab.data.base import Source
from tokenlab.decode import Samples
from tokenlab.evals.base import Evaluation
from tokenlab.models.transformer import Transformer
from tokenlab.objectives.base import Objective
from tokenlab.tokenizers.base import TokenizerTrainer
from tokenlab.train.checkpoint import Checkpointing
from tokenlab.train.mesh import MeshShape
from tokenlab.train.optimizer import Optimizer

# What a resumed run may change: when it stops and when it looks at itself.
RESUMABLE = ("steps", "log_every", "evals", "checkpoint", "samples", "name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A training run, whole: data, model, objective, optimiser, and when to look at it.

    Attributes:
        name: names the run folder.
        seed: of every random stream.
        tokenizer: how the tokenizer is made from the training documents.
        data: where batches come from.
        batch_size: rows of a step, over all devices and micro-batches.
        accumulation: micro-batches a step is computed in.
        model: the network.
        objective: what is minimised.
        optimizer: how.
        ema_decay: decay of a moving average of the parameters, used in evaluation; or None.
        steps: length of the run.
        mesh: how devices are used.
        checkpoint: when checkpoints are written.
        evals: evaluations by name.
        samples: text to generate, or None.
        log_every: steps between lines of metrics.jsonl.
    """

    name: str
    tokenizer: TokenizerTrainer
    data: Source
    model: Transformer
    objective: Objective
    optimizer: Optimizer
    steps: Duration
    batch_size: int
    seed: int = 0
    accumulation: int = 1
    ema_decay: float | None = None
    mesh: MeshShape = MeshShape()
    checkpoint: Checkpointing = Checkpointing()
    evals: Mapping[str, Evaluation] = dataclasses.field(default_factory=dict)
    samples: Samples | None = None
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of "
                f"accumulation {self.accumulation}"
            )
