"""What a kernel takes of a GPU that is not there, read from its real compiler.

ptxas says how many registers a thread has and how many bytes it had to spill; Mosaic-GPU writes
down how much shared memory it launches the kernel with. Both do so only for what they really
compile, so programs are compiled in a process of their own, as for TPUs (``schedule``).

python -m kernels_pallas.common.resources OP --shape NAME [--backward]

Where warpgroups hand registers to each other, ``registers`` is what a thread starts with.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Sequence
from typing import Any

from kernels_pallas.common.aot import GPUS
from kernels_pallas.common.programs import compile_apart, shape_parser

_KERNEL = re.compile(r"Compiling entry function '(\w+?)(?:_mosaic_gpu_kernel)?' for '(\w+)'")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads\s*$", re.MULTILINE)
_SHARED = re.compile(r"dynamic_shared_memory_size %c(\d+)_i32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuResources:
    """What one kernel takes.

    Attributes:
        kernel: its name.
        architecture: such as ``"sm_90a"``.
        registers: of a thread, when the kernel starts.
        spill_bytes: stored to memory for want of registers, by a thread.
        shared_bytes: shared memory of a thread block.
    """

    kernel: str
    architecture: str
    registers: int
    spill_bytes: int
    shared_bytes: int


def parse(ptxas: str, passes: str) -> GpuResources:
    """From what the compilers wrote of one kernel.

    Args:
        ptxas: what ptxas says when it is asked to be verbose.
        passes: Mosaic-GPU's program; anything after the launch may be missing.

    Raises:
        ValueError: one of the numbers is not there.
    """
    kernel, registers = _KERNEL.search(ptxas), _REGISTERS.search(ptxas)
    spills, shared = _SPILLS.search(ptxas), _SHARED.search(passes)
    if kernel is None or registers is None or spills is None or shared is None:
        raise ValueError(f"the compiler's text has changed: {ptxas.strip()!r}")
    return GpuResources(
        kernel=kernel[1],
        architecture=kernel[2],
        registers=int(registers[1]),
        spill_bytes=int(spills[1]),
        shared_bytes=int(shared[1]),
    )


def read(folder: pathlib.Path) -> list[GpuResources]:
    """Of every Mosaic-GPU kernel whose compilation was dumped into ``folder``, by name."""
    found = []
    for path in folder.glob("*.ptxas"):
        log = path.with_suffix(".mlir-passes.log")
        with log.open() as lines:
            launch = next((line for line in lines if _SHARED.search(line)), "")
        found.append(parse(path.read_text(), launch))
    return sorted(found, key=lambda one: one.kernel)


def resources(program: str, *, gpu: str = "h100", **options: Any) -> list[GpuResources]:
    """Compiles a program in a new process and reads what its kernels take.

    Args:
        program: ``module:function`` (see :mod:`kernels_pallas.common.programs`).
        gpu: one of ``aot.GPUS``.
        **options: JSON-able.

    Raises:
        CannotCompile: the compiler refuses, or is not installed; the message is its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {"MOSAIC_GPU_DUMP_TO": folder, "JAX_ENABLE_COMPILATION_CACHE": "false"}
        compile_apart(program, {"gpu": gpu}, environment, options)
        return read(pathlib.Path(folder))


def table(found: Sequence[GpuResources]) -> str:
    """One line per kernel."""
    lines = [f"{'kernel':40}{'registers':>11}{'spill bytes':>13}{'shared bytes':>14}"]
    lines += [
        f"{one.kernel:40}{one.registers:11}{one.spill_bytes:13}{one.shared_bytes:14,}"
        for one in found
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and prints the table."""
    parser = shape_parser(__doc__ or "")
    parser.add_argument("--gpu", default="h100", choices=GPUS)
    options = parser.parse_args(arguments)
    found = resources(
        f"kernels_pallas.{options.op}.specs:program",
        gpu=options.gpu,
        shape=options.shape,
        dtype=options.dtype,
        backward=options.backward,
        impl="gpu",
    )
    print(table(found))  # noqa: T201


if __name__ == "__main__":
    main()
