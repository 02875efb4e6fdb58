"""Processes with several devices; their number is fixed when JAX starts."""

import os
import pathlib
import subprocess
import sys

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent


def run_on_devices(count: int, script: str) -> str:
    """What ``script`` prints in a process with ``count`` CPU devices; it may import ``tests``."""
    flags = f"--xla_force_host_platform_device_count={count}"
    paths = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
