"""Peers in environments of their own, which take turns with us."""

import os
import pathlib
import subprocess


class Peer:
    """A script that waits in another interpreter and works once per call.

    Attributes:
        parameters: of its model.
    """

    def __init__(self, python: str, script: str, *arguments: object) -> None:
        """Starts ``script`` of this folder under ``python`` and waits until it is warm."""
        path = pathlib.Path(__file__).parent / script
        threads = len(os.sched_getaffinity(0))
        command = [python, str(path), *map(str, arguments), "--threads", str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        ready = self._line().split()
        self.parameters = int(ready[1])

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer ended with code {self._process.wait()}")
        return line

    def __call__(self) -> None:
        """One piece of work."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._line()

    def close(self) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.wait()
