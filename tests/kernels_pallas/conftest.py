"""Fixtures of the kernels' tests."""

import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter


@pytest.fixture
def copied(monkeypatch):
    """Bytes of every copy that a kernel of its own starts in the interpreter, as it is made."""
    sizes = []
    run = interpreter.DMA.execute_read

    def counted(self):
        fresh = self.data is None
        run(self)
        if fresh:
            sizes.append(self.data_size)

    monkeypatch.setattr(interpreter.DMA, "execute_read", counted)
    return sizes
