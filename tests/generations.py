"""Compilations for every generation of TPUs."""

import itertools

import pytest

from kernels_pallas.common import aot


def every_generation(*dtypes):
    """Parametrises ``topology`` and ``dtype``: each generation with one dtype, in turn.

    The other pairs are the long tail.
    """
    taken = set(zip(aot.TPUS, itertools.cycle(dtypes), strict=False))
    pairs = [
        pytest.param(name, dtype, marks=() if (name, dtype) in taken else pytest.mark.slow)
        for name, dtype in itertools.product(aot.TPUS, dtypes)
    ]
    return pytest.mark.parametrize(("topology", "dtype"), pairs)
