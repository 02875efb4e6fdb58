"""Searches block sizes by predicted time, with the real compiler and no TPU.

python -m kernels_pallas.common.tune OP --shape NAME [--topology v5e:2x2] [--dtype bfloat16]

Each candidate is compiled in a process of its own and judged by ``predict``; the best of each pass
goes into the operation's ``tuned.json``, where it holds for the device kind of the topology.
An operation can be tuned if it has a module ``cost`` with what :class:`Tunable` lists.
"""

import argparse
import dataclasses
import importlib
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from kernels_pallas.common import predict, tuned
from kernels_pallas.common.aot import TPUS, CannotCompile, tpu_devices
from kernels_pallas.common.schedule import Schedule, schedules

_FOLDER = pathlib.Path(__file__).parent.parent


@runtime_checkable
class Tunable(Protocol):
    """What a module ``kernels_pallas.OP.cost`` offers.

    Its function ``kernel(*, which, shape, dtype, **sizes)`` is a program of one kernel for
    ``kernels_pallas.common.schedule``.
    """

    PASSES: Sequence[str]
    SHAPES: Mapping[str, Any]

    def candidates(self, which: str, shape: str, dtype: str) -> Sequence[Mapping[str, int]]:
        """Sizes to try."""
        ...

    def tuned_name(self, which: str, shape: str, dtype: str) -> str:
        """The key of an entry."""
        ...

    def predicted(
        self,
        found: Schedule,
        peak: predict.Peak,
        which: str,
        shape: str,
        dtype: str,
        sizes: Mapping[str, int],
    ) -> float:
        """Cycles of the whole call."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One candidate.

    Attributes:
        sizes: its block sizes.
        cycles: predicted for the call; None if the compiler refuses.
        refusal: what the compiler said.
    """

    sizes: Mapping[str, int]
    cycles: float | None = None
    refusal: str = ""


Predictor = Callable[[str, Mapping[str, int]], float]


def search(
    which: str, candidates: Sequence[Mapping[str, int]], predictor: Predictor
) -> tuple[Trial | None, list[Trial]]:
    """The best candidate of a pass, None if all are refused, and all trials.

    Args:
        which: the pass.
        candidates: sizes to try, small ones first: the first wins that is within 1 % of the
            fastest, as small tiles leave more room in VMEM.
        predictor: cycles of a call, or raises ``CannotCompile``.
    """
    trials = []
    for sizes in candidates:
        try:
            trials.append(Trial(sizes=sizes, cycles=predictor(which, sizes)))
        except CannotCompile as error:
            trials.append(Trial(sizes=sizes, refusal=str(error)))
    limit = 1.01 * min((one.cycles for one in trials if one.cycles is not None), default=0.0)
    near = (one for one in trials if one.cycles is not None and one.cycles <= limit)
    return next(near, None), trials


def generation(topology: str) -> str:
    """``"v5e"`` of ``"v5e:2x2"``.

    Raises:
        CannotCompile: nothing is known of that generation.
    """
    name = topology.partition(":")[0]
    if name not in predict.PEAKS:
        raise CannotCompile(f"no peaks of {topology!r}; known are {sorted(predict.PEAKS)}")
    return name


def tune(op: str, cost: Tunable, *, shape: str, topology: str, dtype: str) -> None:
    """Searches every pass of an operation, prints the trials and writes what is best.

    Raises:
        CannotCompile: the topology is not known, or every candidate of a pass is refused.
    """
    peak = predict.PEAKS[generation(topology)]
    kind = tpu_devices(topology)[0].device_kind

    def predictor(which: str, sizes: Mapping[str, int]) -> float:
        options = {"which": which, "shape": shape, "dtype": dtype, **sizes}
        program = f"kernels_pallas.{op}.cost:kernel"
        (found,) = schedules(program, topology=topology, **options)
        return cost.predicted(found, peak, which, shape, dtype, sizes)

    for which in cost.PASSES:
        best, trials = search(which, cost.candidates(which, shape, dtype), predictor)
        for trial in trials:
            cycles = trial.refusal if trial.cycles is None else f"{trial.cycles:14,.0f}"
            print(f"{which:12}{_words(trial.sizes):40}{cycles}", flush=True)  # noqa: T201
        if best is None or best.cycles is None:
            raise CannotCompile(f"{op} {which} {shape}: the compiler refuses every candidate")
        entry = {**best.sizes, "cycles": round(best.cycles)}
        key = cost.tuned_name(which, shape, dtype)
        tuned.store(tuned.path(op), kind, {key: entry})
        print(f"{kind}: {key}: {_words(best.sizes)}", flush=True)  # noqa: T201


def _words(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def _cost_of(op: str) -> Any:
    known = sorted(file.parent.name for file in _FOLDER.glob("*/cost.py"))
    if op not in known:
        raise SystemExit(f"tune: no operation {op!r}; use one of {', '.join(known)}")
    return importlib.import_module(f"kernels_pallas.{op}.cost")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and tunes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("op", help="such as block_sparse_attention")
    parser.add_argument("--shape", required=True, help="a name of the op's shapes")
    parser.add_argument("--topology", default=TPUS["v5e"])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    options = parser.parse_args(arguments)
    cost = _cost_of(options.op)
    if options.shape not in cost.SHAPES:
        names = ", ".join(cost.SHAPES)
        raise SystemExit(f"tune: {options.op} has no shape {options.shape!r}; use one of {names}")
    try:
        tune(
            options.op,
            cost,
            shape=options.shape,
            topology=options.topology,
            dtype=options.dtype,
        )
    except CannotCompile as error:
        raise SystemExit(f"tune: {error}") from error


if __name__ == "__main__":
    main(sys.argv[1:])
