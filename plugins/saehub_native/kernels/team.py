"""A function of a piece's number in, all pieces done on as many threads as torch uses, out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


class Team:
    """Threads that follow `torch.get_num_threads()`. Which thread does which piece is open, so a piece's result must depend on its number alone.

    Own threads rather than numba's `parallel=True`: its pool has a size of its own, may not be entered from two threads, and its compiler
    takes several times as long. Inside a piece torch works on one thread: products share the cores as the pieces do, and no thread of OpenMP
    spins beside them waiting for more.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._size = 0

    def run(self, piece: Callable[[int], object], count: int) -> None:
        """Call `piece(0)` … `piece(count - 1)`, each once; the caller works too. The first error is raised here."""
        threads = torch.get_num_threads()
        size = min(threads, count)
        if size <= 1:
            for number in range(count):
                piece(number)
            return
        lock, numbers = threading.Lock(), iter(range(count))

        def work() -> None:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                piece(number)

        if self._pool is None or self._size < size - 1:
            self._size = threads - 1
            self._pool = ThreadPoolExecutor(self._size, thread_name_prefix="saehub-kernel")
            ready = threading.Barrier(self._size)
            for begun in [self._pool.submit(_one_thread, ready) for _ in range(self._size)]:
                begun.result()
        # What this sets holds for the calling thread; others keep theirs.
        torch.set_num_threads(1)
        try:
            others = [self._pool.submit(work) for _ in range(size - 1)]
            try:
                work()
            finally:
                for other in others:
                    other.result()
        finally:
            torch.set_num_threads(threads)


def _one_thread(ready: threading.Barrier) -> None:
    torch.set_num_threads(1)
    ready.wait()


def pieces(loop: Any, n: int, size: int, arguments: tuple[Any, ...]) -> tuple[Any, int]:
    """For `Team.run`: the loop over ranges of `size`."""
    return lambda i: loop(i * size, min(n, (i + 1) * size), *arguments), -(-n // size)
