"""Which maps of a network lie over the image.

The map of a layer is stretched over the image as if its rows and columns were the image's. A network that flips, rolls,
transposes, crops or samples its maps on the way makes that false, and no shape shows it. So the model is run once with the
coordinates of every entry beside it, see :mod:`srd_lab.engine.coordinate_calls`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from srd_lab.engine.affine import overwrites
from srd_lab.engine.coordinate_calls import CallOnPlaces, written_into
from srd_lab.engine.coordinates import Coordinates, thin
from srd_lab.engine.interceptor import Watch
from srd_lab.engine.model_memory import memory_of
from srd_lab.engine.receptive_fields import reads_elsewhere
from srd_lab.engine.spellings import Function, tensors_in
from srd_lab.engine.token_grid import TokenGrid, grid_of, grid_of_queries, laid_over
from srd_lab.errors import Refused

_WRITING = (Tensor.__setitem__, Tensor.data.__set__)  # type: ignore[attr-defined]  # and what overwrites its first operand
_ATTENDING = {F.scaled_dot_product_attention, F.softmax, torch.softmax, Tensor.softmax}
_REMEMBERED = 32  # sequences of calls of one model
_SHIFT = 0.6  # of the distance of two cells; strides alone make 0.5


@dataclass(frozen=True)
class _Known:
    """What is remembered of a model that makes the same calls with the same numbers.

    over_image, grids : see :class:`CoordinateTrace`. events : how many torch functions it calls.
    """

    over_image: dict[int, dict[int | None, bool]]
    grids: dict[int, dict[int, TokenGrid]]
    events: int


class Alignment:
    """Which maps of a model lie over the image, by what made them, and by what their cells read.

    Example
    -------
    >>> run = Watch(model)
    >>> logits = run.run(x)
    >>> Alignment.of(model, x, run.sequence).check(3, 1, "the first activation")
    """

    def __init__(self, model: nn.Module, x: Tensor, known: _Known) -> None:
        self._model, self._x, self._known = model, x, known

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, sequence: int) -> Alignment:
        """That of ``model`` when it runs on images x (N, C, H, W).

        sequence : of the calls that it makes then, see :class:`srd_lab.engine.interceptor.Interceptor`; the same calls with
            the same numbers move maps alike, and are followed once.

        Raises Refused for a model that calls other functions when it runs again.
        """
        known: dict[Any, _Known] = memory_of(model).setdefault(cls, {})
        key = sequence, tuple(x.shape)
        if key not in known:
            if len(known) >= _REMEMBERED:  # the numbers of its calls depend on the image
                known.clear()
            run = CoordinateTrace(model)
            with torch.enable_grad():  # without, torch calls other functions
                run.run(x.detach().clone().requires_grad_())
            if run.sequence != sequence:
                raise Refused(
                    "the model calls other functions when it runs again on the same images, so that it cannot be told where "
                    "its maps lie; use a method whose map is made at the image, such as srd or grad_input"
                )
            known[key] = _Known(run.over_image, run.grids, run.events)
        return cls(model, x, known[key])

    def check_made(self, event: int, what: str) -> None:
        """:meth:`check`, along whatever axis the channels lie."""
        axis = next((axis for axis, lies in self._known.over_image.get(event, {}).items() if lies), None)
        self.check(event, axis, what)

    def lies(self, event: int, axis: int | None) -> bool:
        """Whether what the model's torch function number ``event`` (from 1) put out is known to lie over the image.

        axis : of its channels; None for three dimensions: a map (N, h, w) of one channel, or (C, h, w) of one image.
        """
        return self._known.over_image.get(event, {}).get(axis, False)

    def grid(self, event: int, axis: int) -> TokenGrid | None:
        """The grid of the tokens that torch function number ``event`` put out, channels along ``axis``; None for what is no
        row of tokens, of which each lies over a cell of the image or nowhere."""
        return self._known.grids.get(event, {}).get(axis)

    def check(self, event: int, axis: int | None, what: str, *, ask: bool = True) -> None:
        """Refuse (SrdLabError) what does not (:meth:`lies`) lie over the image, or whose cells read it elsewhere.

        what : its name, for the message.
        ask : whether to ask what its cells read (:func:`reads_elsewhere`), which takes nine backward passes, once.
        """
        if not self.lies(event, axis) or (ask and self._reads_elsewhere(event, axis, None)):
            raise _not_over_image(what)

    def check_tokens(self, event: int, axis: int, what: str, *, ask: bool = True) -> TokenGrid:
        """The :meth:`grid` of tokens; refuses (SrdLabError) those that have none, and those that read the image elsewhere.

        what, ask : as for :meth:`check`.
        """
        grid = self.grid(event, axis)
        if grid is None:
            raise Refused(
                f"{what} holds tokens of which it is not known where in the image they lie: expected one for each cell of "
                "a grid of patches, beside class and register tokens; name another layer, or use a method whose map is made "
                "at the image, such as srd or grad_input"
            )
        if ask and self._reads_elsewhere(event, axis, grid):
            raise _not_over_image(what)
        return grid

    def _reads_elsewhere(self, event: int, axis: int | None, grid: TokenGrid | None) -> bool:
        events = self._known.events
        known: dict[Any, bool] = memory_of(self._model).setdefault(reads_elsewhere, {})
        key = event, axis, events, tuple(self._x.shape[1:])

        def laid(out: Tensor) -> Tensor:
            if grid is not None and axis is not None:
                return grid.lay(out, axis)
            return out if axis is None else out.movedim(axis, -3)

        if key not in known:
            known[key] = reads_elsewhere(self._model, self._x, event, laid, events)
        return known[key]


def _not_over_image(what: str) -> Refused:
    return Refused(
        f"the rows and columns of {what} are not known to be those of the image: the model flips, rolls, "
        "transposes, crops, cuts up or samples its maps on the way, so that this one cannot be laid over the image; "
        "name another layer, or use a method whose map is made at the image, such as srd or grad_input"
    )


class CoordinateTrace(Watch):
    """Runs a model and follows where its maps lie in the image.

    coordinates : of every tensor that has some.
    over_image : whether the output of a torch function lies over the image, by event and by the axis of its channels.
    grids : of outputs that are tokens over the image, by event and by the axis of their channels: of three dimensions, or of
        what attends in an attention (N, heads, T, ...), which is 3.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.over_image: dict[int, dict[int | None, bool]] = {}
        self.grids: dict[int, dict[int, TokenGrid]] = {}
        self.coordinates = WeakTensorKeyDictionary()
        self._images = 0
        self._judged: tuple[Coordinates | None, dict[int | None, bool]] = (None, {})

    def run(self, x: Tensor) -> Any:
        self._images = len(x)
        fed = x.clone()  # the model may overwrite it
        self.coordinates[fed] = Coordinates.of_image(x)
        return super().run(fed)

    def intercept(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = tensors_in(args, kwargs)
        known = {id(t): self.coordinates[t] for t in tensors if t in self.coordinates}
        writes = func in _WRITING or overwrites(func, kwargs)
        before = self.coordinates.get(args[0]) if writes and args and isinstance(args[0], Tensor) else None
        out = super().intercept(func, args, kwargs)
        if known:
            with torch.no_grad():
                self._follow(func, args, kwargs, known, out)
        if before is not None and self.coordinates.get(args[0]) is not before:
            self._forget_views(args[0])
        return out

    def _follow(
        self,
        func: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        known: dict[int, Coordinates],
        out: Any,
    ) -> None:
        if func in _WRITING:
            self._note(args[0], None if len(args) < 3 else written_into(args[0], args[1], args[2], known))
            return
        outs = out if isinstance(out, tuple | list) else (out,)
        call = CallOnPlaces(func, args, kwargs, known, outs)
        for made, coordinates in zip(outs, call.coordinates(), strict=True):
            if isinstance(made, Tensor) and made.dim():
                self._note(made, coordinates)
        found = self.coordinates.get(out) if func in _ATTENDING and isinstance(out, Tensor) else None
        if found is not None and out.dim() == 4 and len(out) == self._images:
            grid = grid_of_queries(found)
            self.grids[self.events] = {} if grid is None else {3: grid}

    def _forget_views(self, written: Tensor) -> None:
        """What else lies in the memory of what was written into has other entries now."""
        place = written.untyped_storage().data_ptr()
        for other in [t for t in self.coordinates if t is not written]:
            if other.untyped_storage().data_ptr() == place:
                del self.coordinates[other]

    def _note(self, t: Tensor, coordinates: Coordinates | None) -> None:
        if coordinates is None:
            self.coordinates.pop(t, None)
            return
        self.coordinates[t] = coordinates
        if t.dim() == 3 and len(t) == self._images and self.events not in self.grids:
            self.grids[self.events] = _grids(coordinates)
        if t.dim() in (3, 4):
            if self._judged[0] is not coordinates:
                self._judged = coordinates, self._by_axis(coordinates)
            # of a call that puts out several maps, all have to
            known = self.over_image.get(self.events, self._judged[1])
            self.over_image[self.events] = {
                axis: ok and known.get(axis, False) for axis, ok in self._judged[1].items()
            }

    def _by_axis(self, of: Coordinates) -> dict[int | None, bool]:
        """Whether a tensor lies over the image, by the axis that its channels may lie along; None for three dimensions."""
        if of.rows.dim() == 3:
            return {None: lies_over_image(of.each(lambda t: t.unsqueeze(1)))}
        if len(of.rows) != self._images:
            return {}
        channels_first = (
            (axis, replace(of, rows=of.rows.movedim(axis, 1), columns=of.columns.movedim(axis, 1)))
            for axis in (1, 2, 3)
        )
        return {axis: lies_over_image(laid) for axis, laid in channels_first}


def _grids(of: Coordinates) -> dict[int, TokenGrid]:
    """The grids that a tensor of three dimensions has over the image, by the axis that its channels may lie along."""
    found = ((axis, grid_of(of, axis)) for axis in (1, 2))
    return {
        axis: grid for axis, grid in found if grid is not None and lies_over_image(laid_over(of, grid, axis))
    }


def lies_over_image(of: Coordinates) -> bool:
    """Whether entries (N, C, h, w) lie where those of a map do that is stretched over the image, in at least one channel
    everywhere and in none elsewhere.

    Strides shift a map by half the distance of its cells, and windows without padding shrink it towards the middle.
    """
    for t, size, axis in zip((of.rows, of.columns), of.image, (2, 3), strict=True):
        cells = t.shape[axis]
        if cells == 1:  # all of the image
            continue
        middles = ((torch.arange(float(cells), device=t.device) + 0.5) * size / cells - 0.5).view(
            -1, *[1] * (3 - axis)
        )
        off = thin(t) - middles
        if bool(off.isnan().all(1).any()):
            return False
        known = ~off.isnan()
        across = (t - t.narrow(axis, 0, 1)).narrow(axis, -1, 1)
        apart = float(across.nanmean()) / (cells - 1)
        near = _SHIFT * max(apart, 0)
        shift = (off.nansum((2, 3)) / known.sum((2, 3)).clamp_min(1)).abs().amax()
        if float(shift) > max(near, size / 24) or float(off.nan_to_num().abs().amax()) > max(near, size / 5):
            return False
    return True
