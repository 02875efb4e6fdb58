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
        ("quickstart.py", MeshShape(data=2, tensor=2), ATTENTION | LOSS | ROUTING),
        pytest.param(
            "quickstart.py:plain",
            MeshShape(data=2, tensor=2),
            ATTENTION | LOSS,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "depth/mor.py", MeshShape(data=4), ATTENTION | LOSS | ROUTING, marks=pytest.mark.slow
        ),
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
    experiment = config.replace(experiment_of(EXPERIMENTS / "quickstart.py:plain"), asked)
    assert not KERNEL.findall(lowered(experiment, MeshShape(data=4)).as_text())


def mor_135m():
    """``experiments/depth/mor.py`` with the geometry of a model of 135M parameters, unshared."""
    return config.replace(
        experiment_of(EXPERIMENTS / "depth/mor.py"),
        {
            "model.vocab_size": 49_152,
            "model.dim": 576,
            "model.num_layers": 32,
            "model.block.mixer.num_heads": 9,
            "model.block.mixer.num_kv_heads": 3,
            "model.block.feedforward.hidden_dim": 1536,
            "model.dtype": "bfloat16",
            "model.max_length": 2048,
            "model.depth.remat": "dots",
            "data.length": 2048,
            "batch_size": 16,
        },
    )


@pytest.mark.slow
def test_routing_at_135m_has_static_shapes_and_no_square_of_the_length():
    compiled = lowered(mor_135m(), MeshShape(data=4)).compile()
    text = compiled.as_text()
    assert set(HLO_KERNEL.findall(text)) == ATTENTION | LOSS | ROUTING
    # Values inside of a fusion are no buffers: the ledger counts pairs there.
    parts = re.split(r"\n(?=%|ENTRY )", text)
    text = "\n".join(part for part in parts if not part.startswith("%fused_computation"))
    shapes = re.findall(r"\b(?:pred|[suf]\d+|bf16)\[([\d,<=]+)\]", text)
    assert not [shape for shape in shapes if "<=" in shape]
    # Whatever the routers keep: 2048, 1365 and 682 tokens, or the kernels' padded counts of them.
    lengths = {str(n) for n in (2048, 1365, 682)}
    squares = [s for s in set(shapes) if sum(dim in lengths for dim in s.split(",")) > 1]
    assert squares == []
    assert compiled.memory_analysis().temp_size_in_bytes < 12 * 2**30
