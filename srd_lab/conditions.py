"""Conditions on numbers, and the errors where they do not hold: looked at one by one, or many at once.

Whoever looks at a number of an accelerator waits until all that was asked of it is done. So a loop looks once a round.

Example
-------
::

    with together() as looks:
        for _ in range(steps):
            finite, ended = looks.look(*step())  # and at all that step() requires
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local

import torch
from torch import Tensor

_here = local()


class Looks:
    """Conditions that nobody has looked at; made by :func:`together`."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Callable[[], None]]] = []

    def add(self, holds: Tensor, fail: Callable[[], None]) -> None:
        """A condition for the next look; arguments are those of :func:`require`."""
        self._waiting.append((holds, fail))

    def look(self, *flags: Tensor) -> list[Tensor]:
        """Flags (N,) bool as tensors of the CPU; conditions that wait are looked at with them, and their errors raised."""
        waiting, self._waiting = self._waiting, []
        if not waiting and not flags:
            return []
        told = torch.cat([*(holds.reshape(1) for holds, _ in waiting), *flags]).cpu()
        for (_, fail), holds in zip(waiting, told.tolist(), strict=False):
            if not holds:
                fail()
        return list(told[len(waiting) :].split([len(flag) for flag in flags]))


def require(holds: Tensor, fail: Callable[[], None]) -> None:
    """Have an error raised where a condition does not hold: now, or on a device at the next look within :func:`together`.

    holds : () bool. fail : raises the error, or warns.
    """
    looks: Looks | None = getattr(_here, "looks", None)
    if looks is not None and holds.device.type != "cpu":
        looks.add(holds, fail)
    elif not holds:
        fail()


@contextmanager
def together() -> Iterator[Looks]:
    """Within: what is required of numbers on a device is looked at when the caller looks, and at the end."""
    before = getattr(_here, "looks", None)
    looks = _here.looks = Looks()
    try:
        yield looks
    finally:
        _here.looks = before
    looks.look()
