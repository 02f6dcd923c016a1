"""Sums of products as ``einsum`` writes them: a letter for every axis."""

from __future__ import annotations

from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

from srd_lab.engine.spellings import Function

WRITTEN_IN_LETTERS = (torch.einsum, torch.tensordot)


def in_letters(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], list[str], str] | None:
    """The operands of a call of ``einsum`` or ``tensordot``, the letters of the axes of each, and those of the result; None
    for an ``einsum`` that leaves the result's letters out, and for all other calls.

    Example
    -------
    >>> a, b = torch.zeros(2, 3), torch.zeros(3, 4)
    >>> in_letters(torch.tensordot, (a, b), {"dims": 1})[1:]
    (['ab', 'bd'], 'ad')
    """
    if function is torch.einsum:
        return _of_einsum(*args)
    return _of_tensordot(*args, **kwargs) if function is torch.tensordot else None


def sums_nothing(function: Function, args: tuple[Any, ...]) -> bool:
    """Whether a call is an ``einsum`` that multiplies entries and adds none up."""
    found = in_letters(function, args, {}) if function is torch.einsum else None
    return found is not None and {letter for row in found[1] for letter in row} <= set(found[2])


def _of_einsum(equation: Any = None, *operands: Any) -> tuple[list[Tensor], list[str], str] | None:
    if not isinstance(equation, str) or "->" not in equation:
        return None
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = tuple(operands[0])
    inputs, _, result = equation.replace(" ", "").partition("->")
    free = [letter for letter in ascii_letters if letter not in equation]
    rows = inputs.split(",")
    hidden = [t.dim() - len(row.replace("...", "")) for row, t in zip(rows, operands, strict=True)]
    most = max((n for row, n in zip(rows, hidden, strict=True) if "..." in row), default=0)
    dots = ["".join(free[most - n : most]) for n in hidden]  # the ellipses are aligned at their ends
    letters = [row.replace("...", dot) for row, dot in zip(rows, dots, strict=True)]
    return list(operands), letters, result.replace("...", "".join(free[:most]))


def _of_tensordot(
    a: Tensor, b: Tensor, dims: Any = 2, *out: Any, **named: Any
) -> tuple[list[Tensor], list[str], str]:
    """What is left of the first comes first, then what is left of the second."""
    if isinstance(dims, int):
        dims = (list(range(a.dim() - dims, a.dim())), list(range(dims)))
    of_a, of_b = dims.tolist() if isinstance(dims, Tensor) else dims
    first = list(ascii_letters[: a.dim()])
    second = list(ascii_letters[a.dim() : a.dim() + b.dim()])
    for i, j in zip(of_a, of_b, strict=True):
        second[j] = first[i]
    summed = {first[i] for i in of_a}
    return [a, b], ["".join(first), "".join(second)], "".join(x for x in first + second if x not in summed)
