"""The real steps, compiled for an absent TPU slice: the kernels are in them."""

import dataclasses
import pathlib
import re

import pytest

from kernels_pallas.common import aot
from tokenlab import config
from tokenlab.files import experiment_of
from tokenlab.tokenizers import ByteTokenizer
from tokenlab.train.mesh import MeshShape
from tokenlab.train.run import Run

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
ATTENTION = {f"block_sparse_attention_{part}" for part in ("forward", "backward")}
LOSS = {f"linear_cross_entropy_{part}" for part in ("forward", "by_hidden", "by_weight")}
ROUTING = {f"{op}_tokens{part}" for op in ("gather", "scatter_add") for part in ("", "_backward")}
KERNEL = re.compile(r'kernel_name = "(\w+)"')
HLO_KERNEL = re.compile(r'%(\w+)[.\d]* = .*custom_call_target="tpu_custom_call"')


def lowered(experiment, mesh):
    """The step of an experiment as it is, on the four chips of a v5e:2x2."""
    trainer = Run.of(experiment, tokenizer=ByteTokenizer()).trainer
    devices = mesh.build(list(aot.tpu_devices("v5e:2x2")))
    trainer = dataclasses.replace(trainer, mesh=devices)
    return trainer.lower(batch_size=experiment.batch_size, length=experiment.data.tokens_per_row)


@pytest.mark.parametrize(
    ("file", "mesh", "kernels"),
    [
        ("quickstart.py", MeshShape(data=2, tensor=2), ATTENTION | LOSS),
        ("depth/mor.py", MeshShape(data=4), ATTENTION | LOSS | ROUTING),
    ],
)
def test_the_step_holds_every_kernel_that_serves_it(file, mesh, kernels):
    compiled = lowered(experiment_of(EXPERIMENTS / file), mesh).compile()
    text = compiled.as_text()
    assert set(HLO_KERNEL.findall(text)) == kernels


@pytest.mark.parametrize("impl", ["ref", "xla"])
def test_another_form_is_taken_where_it_is_asked_for(impl):
    asked = {
        "model.block.mixer.impl": impl,
        "objective.terms.next_token.loss.impl": impl,
        "objective.terms.z_loss.loss.impl": impl,
    }
    experiment = config.replace(experiment_of(EXPERIMENTS / "quickstart.py"), asked)
    assert not KERNEL.findall(lowered(experiment, MeshShape(data=4)).as_text())
