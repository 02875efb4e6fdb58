"""Whose keys and values the recursions of a loop read."""

from __future__ import annotations

from typing import Any, Literal

from tokenlab.cache import Picked, SharedKeys

KeySharing = Literal["recursion_wise", "shared", "hybrid"]


class LoopKeys:
    """What the layers of a loop are given in each recursion of one pass.

    Lives while a pass is traced.
    """

    def __init__(self, sharing: KeySharing, caches: list[Any], *, layers: int) -> None:
        """Begins a pass.

        Args:
            sharing: whose keys a recursion reads.
            caches: of the loop, in the order of ``Cache.layer``, or as many None.
            layers: layers of a recursion.
        """
        self._sharing, self._caches, self._layers = sharing, list(caches), layers
        self._shared: list[SharedKeys] = []
        self._first: Picked | None = None

    @property
    def cached(self) -> bool:
        """Whether the pass is over a cache."""
        return any(cache is not None for cache in self._caches)

    def again(self) -> LoopKeys:
        """The same at the beginning of another pass, where no cache is."""
        return LoopKeys(self._sharing, [None] * len(self._caches), layers=self._layers)

    def given(self, recursion: int, picked: Picked | None) -> list[Any]:
        """What the layers are given in a recursion, to which ``picked`` tokens come, or all."""
        if recursion == 0:
            self._first = picked
        if self._sharing == "recursion_wise":
            return self._of(recursion, picked)
        if recursion == 0:
            return [SharedKeys(cache=cache) for cache in self._of(0, picked)]
        first = self._first
        among = picked if picked is None or first is None else picked.among(first)
        if self._sharing == "shared":
            return [keys.replace(projects=False, picked=among) for keys in self._shared]
        own = self._of(recursion, first)
        return [
            keys.replace(cache=cache, picked=among)
            for keys, cache in zip(self._shared, own, strict=True)
        ]

    def left(self, recursion: int, after: list[Any]) -> None:
        """Takes what the layers gave back."""
        if self._sharing == "recursion_wise":
            self._put(recursion, after)
            return
        self._shared = after
        if self._sharing == "hybrid" and after[0].cache is not None:
            self._put(recursion, [keys.finished() for keys in after])

    def finished(self) -> list[Any]:
        """The caches after the pass."""
        if self._sharing == "shared" and self._shared[0].cache is not None:
            self._put(0, [keys.finished() for keys in self._shared])
        return self._caches

    def _of(self, recursion: int, picked: Picked | None) -> list[Any]:
        start = recursion * self._layers
        own = self._caches[start : start + self._layers]
        return [None if cache is None else cache.replace(picked=picked) for cache in own]

    def _put(self, recursion: int, after: list[Any]) -> None:
        start = recursion * self._layers
        self._caches[start : start + self._layers] = after
