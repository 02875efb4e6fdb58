"""The kernel of NVFP4 products: interpreted strictly, compiled for TPUs, and its bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreting import STRICT
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

from kernels_pallas.common import aot, predict
from kernels_pallas.common.schedule import schedules
from kernels_pallas.nvfp4_matmul import Nvfp4MatmulConfig, nvfp4_matmul
from kernels_pallas.nvfp4_matmul.specs import SHAPES, arguments, piece
from tests.kernels_pallas.test_nvfp4_matmul import close, make


@pytest.mark.parametrize(("contracted", "columns"), [(64, 200), (1152, 128)])
def test_nothing_races_and_nothing_unwritten_is_read(contracted, columns):
    arrays, expected = make(3, contracted, columns)
    config = Nvfp4MatmulConfig(block_columns=128, interpret=STRICT)
    out = jax.block_until_ready(nvfp4_matmul(**arrays, impl="tpu", config=config))
    assert interpreter.races is not None and not interpreter.races.races_found
    close(out, expected)


@pytest.mark.parametrize(
    ("shape", "topology"),
    [
        ("smollm2-135m-up", "v5e"),
        ("llama-3-8b-down", "v5e"),
        ("smollm2-135m-up", "v6e"),
        ("smollm2-135m-down", "v5p"),
    ],
)
def test_it_compiles(shape, topology):
    made = arguments(SHAPES[shape])

    def multiply(arrays):
        return nvfp4_matmul(**arrays)

    compiled = aot.compile_tpu(multiply, made, topology=aot.TPUS[topology])
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
    weight = made["weight"].size
    # Neither the weight in another form, nor a copy of its codes.
    assert compiled.memory_analysis().temp_size_in_bytes < max(weight // 4, 1 << 20)


def test_another_number_of_tokens_takes_the_other_form():
    made = arguments(SHAPES["smollm2-135m-up"])
    made |= {"x": jax.ShapeDtypeStruct((9, 288), jnp.uint8)}
    made |= {"x_scales": jax.ShapeDtypeStruct((9, 36), jnp.float8_e4m3fn)}
    text = aot.compile_tpu(lambda arrays: nvfp4_matmul(**arrays), made).as_text()
    assert "tpu_custom_call" not in text


def schedule(shape, topology):
    (found,) = schedules(
        "kernels_pallas.nvfp4_matmul.specs:program",
        topology=aot.TPUS[topology],
        shape=shape,
        dtype="float32",
        backward=False,
    )
    return found


@pytest.mark.parametrize(
    ("shape", "topology"),
    [
        ("llama-3-8b-up", "v5e"),
        pytest.param("llama-3-8b-down", "v6e", marks=pytest.mark.slow),
    ],
)
def test_each_byte_of_the_weight_is_read_once(shape, topology):
    """By windows and passes of the compiled loop: 4.5 bits a weight for 1 token and for 8."""
    found, named = schedule(shape, topology), SHAPES[shape]
    tile = Nvfp4MatmulConfig().tile(named.contracted, named.columns)
    steps = -(-named.columns // tile)
    assert found.steps - 2 <= steps <= found.steps
    codes, scales = found.windows[2:4]
    weights = named.contracted * named.columns
    assert steps * codes == weights / 2 and steps * scales == weights / 16
    assert np.isclose(8 * steps * (codes + scales) / weights, 4.5)
    # All else that moves is small beside it.
    assert sum(found.windows) - codes - scales < 0.5 * steps * codes
    assert found.spills == 0
    # Making numbers of codes takes longer than reading them; on a v5e less long than bfloat16.
    # The innermost loop is over pieces; a tile of one group of lanes has no loop over groups.
    inner = max(segment.loops for segment in found.segments)
    assert inner == (3 if tile > 128 else 2)
    loop = sum(segment.bundles for segment in found.segments if segment.loops == inner)
    per_weight = loop / (128 * piece(named.contracted))
    peak = predict.PEAKS[topology]
    read = 4.5 / 8 / peak.bytes_per_cycle
    assert read < per_weight < (2 / peak.bytes_per_cycle if topology == "v5e" else 5 * read)
