"""The box of the pixels, which z^B wants to know at the first layer (Montavon et al. 2017), behind a normalisation too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from srd_lab.engine.affine import exchanged, overwrites, spelled
from srd_lab.engine.record import Records
from srd_lab.engine.spellings import Function, tensors_in
from srd_lab.errors import Refused

_TAKEN_OFF_SECOND = spelled("rsub __rsub__")
_DIFFERENCES = spelled("sub subtract __sub__ __isub__") | _TAKEN_OFF_SECOND
Box = tuple[
    Tensor, Tensor
]  # the lowest and the highest value that each entry of a tensor can have, of its shape


class PixelBox:
    """Follows the box through affine calls on what is made of the image, maybe beside activations: each is run on both ends.

    records : of the tensors of the pass, where the box of each is kept.
    modify : what becomes of a weight w where activations t are read, ``w - l w^+ - h w^-`` with two numbers: with the ends
        ``l t`` and ``h t``, z^B makes the same of them.
    """

    def __init__(self, records: Records, modify: Callable[[Tensor], Tensor]) -> None:
        self._records = records
        one = torch.ones(())
        self._of_one = float(1 - modify(one)), float(1 + modify(-one))

    def put(self, t: Tensor, ends: Box) -> None:
        """``t`` lies between ``ends``, in either order. Raises SrdLabError for complex numbers, which have none."""
        if t.is_complex():
            raise Refused(
                "the model makes complex numbers of the image, which this rule cannot follow; use another method"
            )
        box = (torch.minimum(*ends), torch.maximum(*ends))
        self._records.note(t, box=box, overwritten=False)

    def concerns(self, tensors: list[Tensor]) -> bool:
        """Whether any of a call's operands has a box."""
        return any(self._records[t].box for t in tensors)

    def follow(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]
    ) -> Any:
        """The result of a call, which ``run`` makes, with the box of what it made or wrote into."""
        tensors = tensors_in(args, kwargs)
        ends = {id(t): self._of(t) for t in tensors}
        if (
            function in _DIFFERENCES and len(tensors) == 2
        ):  # the most that is left is what the least was taken off
            taken = tensors[1] if function not in _TAKEN_OFF_SECOND else tensors[0]
            ends[id(taken)] = ends[id(taken)][::-1]
        written = args[0] if function is Tensor.__setitem__ or overwrites(function, kwargs) else None
        whole = None if written is None or written._base is None else self._of(written._base)
        made = [self._at_end(i, function, args, kwargs, ends, written) for i in (0, 1)]  # before it writes
        out = run()
        if written is None:
            pairs = zip(*[(m,) if isinstance(m, Tensor) else m for m in made], strict=True)
            for t, pair in zip((out,) if isinstance(out, Tensor) else out, pairs, strict=True):
                self.put(t, pair)
            return out
        low, high = made
        self.put(written, (low, high))
        if whole is not None:
            base = written._base
            self.put(base, (_with(whole[0], base, written, low), _with(whole[1], base, written, high)))
        return out

    def _of(self, t: Tensor) -> Box:
        if (box := self._records[t].box) is not None:
            return box
        low, high = self._of_one if self._records.is_map(t) else (1, 1)
        return low * t, high * t

    def _at_end(
        self,
        i: int,
        function: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        ends: dict[int, Box],
        written: Tensor | None,
    ) -> Any:
        """What a call makes of the low (0) or the high (1) ends of its operands, or writes into the first of them."""
        args, kwargs = exchanged(args, kwargs, {key: pair[i] for key, pair in ends.items()})
        if written is None:
            return function(*args, **kwargs)
        target = args[0].clone()
        function(target, *args[1:], **kwargs)
        return target


def _with(whole: Tensor, base: Tensor, view: Tensor, part: Tensor) -> Tensor:
    """``whole``, which stands for ``base``, with ``part`` in the place of ``view``, a view of ``base``."""
    laid_out = torch.empty_strided(base.shape, base.stride(), dtype=whole.dtype, device=whole.device).copy_(
        whole
    )
    place = laid_out.as_strided(view.shape, view.stride(), view.storage_offset() - base.storage_offset())
    place.copy_(part)
    return laid_out
