"""A function of a block's number in; the same blocks out, the next of them made in the background while this one is used."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Holds one block beside the one in use, never more. A block depends on its number alone, so it is the same either way.

    Args:
        make: called with a number, in this object's one thread, never twice at a time.
        end: the number after the last.
        begin: called once, in that thread.
    """

    def __init__(self, make: Callable[[int], T], end: int, begin: Callable[[], object] | None = None):
        self._make, self._end = make, end
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saehub-extract", initializer=begin)
        self._next: tuple[int, Future[T]] | None = None

    def take(self, number: int) -> T:
        """Block `number`; the one after it is begun. What goes wrong in the background is raised where its block is taken."""
        held, self._next = self._next, None
        if held is not None and held[0] != number:
            _settle(held[1])
            held = None
        block = (held[1] if held is not None else self._pool.submit(self._make, number)).result()
        if number + 1 < self._end:
            self._next = number + 1, self._pool.submit(self._make, number + 1)
        return block

    def close(self) -> None:
        """Wait for what is being made, and drop it."""
        if self._next is not None:
            _settle(self._next[1])
            self._next = None
        self._pool.shutdown(wait=True)


def _settle(future: Future[T]) -> None:
    if not future.cancel():
        future.exception()
