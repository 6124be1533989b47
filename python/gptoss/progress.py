"""A progress report in bytes, for work that takes minutes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = bool | Callable[[int, int], None]
"""True for a bar on stderr, False for nothing, or a function of (bytes done, bytes in all)."""


@contextmanager
def byte_progress(title: str, total: int, progress: Progress) -> Iterator[Callable[[int], object]]:
    """Gives a function that takes the bytes just done. The bar is closed however the work ends."""
    if callable(progress):
        done = 0

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        yield advance
    elif progress:
        from tqdm import tqdm

        with tqdm(
            desc=title, total=total, unit="B", unit_scale=True, unit_divisor=1024, file=sys.stderr
        ) as bar:
            yield bar.update
    else:
        yield lambda nbytes: None
