"""Programs that are compiled in a process of their own, for what compilers say only if told early.

A program is ``module:function``; the function takes JSON-able options and returns what
``compile_tpu`` and ``compile_gpu`` take: a function and a tuple of its arguments. So an operation's
``specs.program`` is one.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kernels_pallas.common.aot import CannotCompile, compile_gpu, compile_tpu

_MODULE = "kernels_pallas.common.programs"  # __name__ is another one when it is the command
_ERROR = re.compile(r"^\S*(?:Error|CannotCompile): .*$", re.MULTILINE)


def compile_apart(
    program: str, device: Mapping[str, str], environment: dict[str, str], options: Any
) -> None:
    """Compiles a program in a new process, for what that leaves behind.

    Args:
        program: ``module:function``.
        device: ``{"topology": ...}`` of a TPU slice, or ``{"gpu": ...}``.
        environment: variables that the compiler reads as it is loaded.
        options: of the program.

    Raises:
        CannotCompile: the compiler refuses, or is not installed; the message is its last line.
    """
    done = subprocess.run(
        [sys.executable, "-m", _MODULE, program, json.dumps(device), json.dumps(options)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = _ERROR.findall(done.stderr) or [done.stderr]
        raise CannotCompile(f"{program} for {', '.join(device.values())}: {said[-1]}")


def shape_parser(description: str) -> argparse.ArgumentParser:
    """The arguments of commands about one call of an operation."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("op", help="such as block_sparse_attention")
    parser.add_argument("--shape", required=True, help="a name of the op's shapes in its specs")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backward", action="store_true", help="the backward pass as well")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Compiles the program; what :func:`compile_apart` starts."""
    program, device, options = arguments[0], json.loads(arguments[1]), json.loads(arguments[2])
    module, _, name = program.partition(":")
    make = vars(importlib.import_module(module))[name]
    function, operands = make(**options)
    compiler: Callable[..., Any] = compile_gpu if "gpu" in device else compile_tpu
    compiler(function, *operands, **device)


if __name__ == "__main__":
    main(sys.argv[1:])
