"""Every named shape for every generation in both dtypes, by the real compilers."""

import importlib

import pytest

from kernels_pallas.common import aot

OPERATIONS = (
    "block_sparse_attention",
    "decode_attention",
    "linear_cross_entropy",
    "nvfp4_matmul",
    "token_routing",
)
# A gradient has the forward kernels in it.
WITHOUT_BACKWARD = ("decode_attention", "nvfp4_matmul")


def cases():
    for op in OPERATIONS:
        specs = vars(importlib.import_module(f"kernels_pallas.{op}.specs"))
        for shape in specs.get("TPU_SHAPES", specs["SHAPES"]):
            for dtype in ("bfloat16", "float32"):
                yield op, specs["program"], shape, dtype


@pytest.mark.slow
@pytest.mark.parametrize("topology", aot.TPUS.values(), ids=aot.TPUS)
@pytest.mark.parametrize(
    ("op", "program", "shape", "dtype"),
    list(cases()),
    ids=[f"{op}-{shape}-{dtype}" for op, _, shape, dtype in cases()],
)
def test_it_compiles(op, program, shape, dtype, topology):
    function, arguments = program(shape=shape, dtype=dtype, backward=op not in WITHOUT_BACKWARD)
    compiled = aot.compile_tpu(function, *arguments, topology=topology)
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30
