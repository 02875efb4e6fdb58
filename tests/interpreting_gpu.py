"""Mosaic-GPU's interpreter, with what the kernels use and it does not have.

JAX interprets copies, barriers, loops and products of matrices in shared memory. Added here are
what an accumulator starts from, layouts, which mean nothing to values, and products whose left side
is in registers; for older versions of JAX, loads with a layout and products whose right side is
transposed as well. Products end at once, so an operand that is overwritten before its product has
ended goes unnoticed.
"""

import contextlib
import functools
import threading

import jax
import numpy as np
import pytest
from jax import lax
from jax._src import callback
from jax._src.pallas.mosaic.interpret import thread_map, utils
from jax._src.pallas.mosaic_gpu import core, primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax._src.state import types
from jax._src.state.primitives import get_p, swap_p
from jax.extend.core import Var

# With a clock for each of many copies none is taken to be done because a later one is.
STRICT = InterpretGPUParams(
    detect_races=True,
    uninitialized_memory="nan",
    out_of_bounds_reads="raise",
    num_tma_threads_per_device=64,
)
NEWER = jax.__version_info__ >= (0, 12)
PLAIN = InterpretGPUParams(uninitialized_memory="nan", out_of_bounds_reads="raise")


@contextlib.contextmanager
def extended():
    """The interpreter is this one; gives what it finds out about races, kernel by kernel."""
    found = []
    name = "GPURaceDetectionState" if NEWER else "RaceDetectionState"
    state = vars(gpu_callbacks)[name]

    def remembered(**options):
        races = state(**options)
        if NEWER:
            races.check_read = _unless_registers(races.check_read)
            races.check_write = _unless_registers(races.check_write)
        found.append(races)
        return races

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                jaxpr_interpret, "JaxprInterpreter", _Interpreter if NEWER else _OlderInterpreter
            )
            patch.setattr(thread_map, "_run_jaxpr", _run)
            patch.setattr(gpu_callbacks, name, remembered)
            if not NEWER:  # refuses indices that are known when it runs only, which work
                patch.setattr(gpu_callbacks, "_validate_transforms", lambda transforms: None)
            yield found
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()
        _compiled.cache_clear()


def _unless_registers(check):
    """Registers are one warpgroup's own; the interpreter takes two writes of it for a race."""
    space = gpu_callbacks.memory.get_memory_space_idx(core.MemorySpace.REGS)

    def checked(*arguments, **options):
        if all(getattr(one, "memory_space_id", None) != space for one in arguments):
            check(*arguments, **options)

    return checked


_compiling = threading.Lock()


@functools.cache
def _compiled(jaxpr, layout, avals):
    def evaluate(*leaves):
        consts, arguments = jax.tree.unflatten(layout, leaves)
        jax.core.eval_jaxpr(jaxpr, consts, *arguments)

    return jax.jit(evaluate).lower(*avals).compile()


def _run(jaxpr, consts, *arguments):
    """Compiles a kernel once, instead of in each thread of each thread block."""
    leaves, layout = jax.tree.flatten((consts, arguments))
    with _compiling:
        run = _compiled(jaxpr, layout, tuple(jax.typeof(leaf) for leaf in leaves))
    run(*leaves)


class _Interpreter(jaxpr_interpret.JaxprInterpreter):
    def interpret(self, jaxpr, token, *arguments):
        return super().interpret(_plain(jaxpr), token, *arguments)

    def _interpret_arithmetic_primitive(self, eqn, get_invals):
        if eqn.primitive is core.layout_cast_p:
            return get_invals()[0]
        return super()._interpret_arithmetic_primitive(eqn, get_invals)

    def _interpret_wgmma_ref_p(self, eqn, token, get_invals):
        if isinstance(eqn.invars[1].aval, types.AbstractRef):
            return super()._interpret_wgmma_ref_p(eqn, token, get_invals)
        accumulator, a, b, *leaves = get_invals()
        of_b = jax.tree.unflatten(eqn.params["b_transforms_tree"], leaves)
        place = self.mesh_location, self.thread
        result = gpu_callbacks.TOKEN_SHAPE_DTYPE
        return callback.io_callback(_multiply, result, token, place, accumulator, a, b, of_b), []


@functools.cache
def _plain(jaxpr):
    """Loads with a layout are loads, and an accumulator is a buffer like others."""

    def plain(eqn):
        if eqn.primitive is primitives.load_p:
            return _plain_load(eqn)
        if eqn.primitive is primitives.wgmma_accumulator_store_p:
            return [eqn.replace(primitive=swap_p, params={"tree": jax.tree.structure(())})]
        return [eqn]

    return jaxpr.replace(eqns=[new for eqn in jaxpr.eqns for new in plain(eqn)])


def _plain_load(eqn):
    """A load, and then a transposition where the reference is transposed."""
    transforms = jax.tree.unflatten(eqn.params["tree"], eqn.invars[1:])
    turns = [one for one in transforms if isinstance(one, types.TransposeTransform)]
    if not turns:
        return [eqn.replace(primitive=get_p, params={"tree": eqn.params["tree"]})]
    assert turns == [transforms[-1]], "an index after a transposition"
    (out,), order = eqn.outvars, turns[0].permutation
    shape = tuple(out.aval.shape[axis] for axis in np.argsort(order))
    loaded = Var(out.aval.update(shape=shape))
    params = {"tree": jax.tree.structure(tuple(transforms[:-1]))}
    load = eqn.replace(primitive=get_p, params=params, outvars=[loaded])
    turn = {"primitive": lax.transpose_p, "params": {"permutation": tuple(order)}}
    return [load, eqn.replace(**turn, invars=[loaded], effects=set())]


def _multiply(token, place, accumulator, a, b, of_b):
    memory, (mesh_location, thread) = gpu_callbacks._get_shared_memory(), place
    of_b = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(of_b))
    keys = [gpu_callbacks.HostAllocationKey.from_array(key) for key in (accumulator, b)]
    spans = [memory.access(key, of) for key, of in zip(keys, ((), of_b), strict=True)]
    logging = {"logging_info": gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, None)}
    total, right = (
        memory.get_buffer_content(key, span, thread, **logging)[0]
        for key, span in zip(keys, spans, strict=True)
    )
    left = np.asarray(a)
    assert left.dtype == right.dtype
    total = total + left.astype(np.float32) @ right.astype(np.float32)
    memory.store_buffer_content(keys[0], spans[0], total, thread, **logging)
    return token


class _OlderInterpreter(_Interpreter):
    def _interpret_wgmma_ref_p(self, eqn, token, get_invals):
        accumulator, a, b, *leaves = get_invals()
        names = ("acc_transforms_tree", "a_transforms_tree", "b_transforms_tree")
        trees = [eqn.params[name] or jax.tree.structure([]) for name in names]
        of_accumulator, of_a, of_b = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
        assert not of_accumulator
        in_registers = not isinstance(eqn.invars[1].aval, types.AbstractRef)
        multiply = functools.partial(_older_multiply, in_registers=in_registers)
        place = self.device_info.device_id, self.grid_point_coords, self.thread_id
        operands = accumulator, a, of_a, b, of_b
        result = gpu_callbacks.TOKEN_SHAPE_DTYPE
        return callback.io_callback(multiply, result, token, place, *operands), []


class _Buffer:
    """A buffer as a thread sees it."""

    def __init__(self, place, key):
        device, grid_point, thread = place
        self.device, self.thread = int(device), int(thread)
        self.key = gpu_callbacks.HostAllocationKey.from_array(key)
        self.memory = gpu_callbacks._get_shared_memory()
        self.whom = self.memory.get_global_thread_id(self.device, self.thread)
        self.logging = utils.GPULoggingInfo(
            device_id=self.device,
            grid_point_coords=tuple(int(x) for x in grid_point),
            thread_id=self.thread,
            source_info=None,
        )

    def read(self, transforms=()):
        """Contents, with indices and then transpositions applied."""
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
        turns = [t for t in transforms if isinstance(t, types.TransposeTransform)]
        indices = [t for t in transforms if not isinstance(t, types.TransposeTransform)]
        assert list(transforms) == indices + turns, "an index after a transposition"
        span = utils.to_range(indices)
        content, _, clock = self.memory.get_buffer_content(
            self.key, span, self.whom, logging_info=self.logging
        )
        if self.memory.detect_races:
            races = gpu_callbacks.get_races()
            races.check_read(self.device, self.thread, clock, self.key, span, source_info=None)
        content = np.asarray(content)
        for turn in turns:
            content = content.transpose(turn.permutation)
        return content

    def write(self, value):
        self.memory.store_buffer_content(self.key, (), value, self.whom, logging_info=self.logging)


def _older_multiply(token, place, accumulator, a, of_a, b, of_b, *, in_registers):
    left = np.asarray(a) if in_registers else _Buffer(place, a).read(of_a)
    right = _Buffer(place, b).read(of_b)
    total = _Buffer(place, accumulator)
    assert left.dtype == right.dtype
    total.write(total.read() + left.astype(np.float32) @ right.astype(np.float32))
    return token
