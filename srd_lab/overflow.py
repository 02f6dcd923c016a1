"""Numbers that leave the range of their type: maps made of them are refused, with the place where it began."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from srd_lab.errors import Refused


def refuse_overflow(
    model: nn.Module, x: Tensor, logits: Tensor | None, raw: Tensor | None = None, *, squares: bool = False
) -> None:
    """Refuse logits and raw maps that are not finite, and maps that are zero because numbers inside the model overflow.

    x : images (N, C, H, W). logits : (N, K), or None = not looked at. raw : maps (N, h, w), or None = not looked at.
    squares : whether the map is made with squares of activations, which overflow long before these do.

    A map that is zero for another reason passes. The model is run again only where something is wrong.

    Raises Refused, with the place where the overflow began if it is found.
    """
    sane, plain = _looked_at(logits, raw)
    if sane and plain:
        return
    place, large = _Look(model).through(x)
    cure = "check its weights and the range of the pixels"
    if x.dtype == torch.float32:
        cure += ", or compute in float64 (.double() on the model and on x)"
    if place or not sane:
        began = f" (it begins at {place})" if place else ""
        raise Refused(f"numbers inside the model overflow {_name(x)}{began}, so there is no map; {cure}")
    broken = [i for i, one in enumerate([] if raw is None else raw) if not _finite(one)]
    if large and (squares or broken):
        raise Refused(
            f"numbers inside the model are so large ({large}) that their squares overflow {_name(x)}, so there is no map; "
            f"{cure}"
        )
    if broken:
        raise Refused(
            f"the map of image {broken[0]} is not finite, though the model's numbers are: the method's own overflow "
            f"{_name(x)}; {cure}, or use another method"
        )


def largest_square_root(dtype: torch.dtype) -> float:
    """The largest number whose square is finite in this floating-point type.

    Example
    -------
    >>> f"{largest_square_root(torch.float32):.2g}"
    '1.8e+19'
    """
    return math.sqrt(torch.finfo(dtype).max)


def _looked_at(logits: Tensor | None, raw: Tensor | None) -> tuple[bool, bool]:
    """Whether logits are finite, and maps finite and not zero, each where there are any; in one look at the device."""
    found = {}
    if logits is not None:
        found["sane"] = logits.detach().isfinite().all()
    if raw is not None:
        found["plain"] = ~_suspicious(raw).any()
    told = dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True)) if found else {}
    return told.get("sane", True), told.get("plain", True)


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _finite(t: Tensor) -> bool:
    return bool(t.detach().isfinite().all())


def _suspicious(raw: Tensor) -> Tensor:
    """Whether a map is zero or not finite, (N,)."""
    top = raw.detach().abs().flatten(1).amax(1)  # NaN wherever there is one
    return ~top.isfinite() | (top == 0)


class _Look(TorchFunctionMode):
    """Runs a model and notes which torch call was the first to make numbers that are not finite, and to make very large
    ones, of finite ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()}
        self.running: list[str] = []
        self.place = self.large = ""

    def through(self, x: Tensor) -> tuple[str, str]:
        """The two places, each empty where there is none or the model cannot be run so."""
        handles = (
            nn.modules.module.register_module_forward_pre_hook(self._enter),
            nn.modules.module.register_module_forward_hook(self._leave),
        )
        try:
            with torch.no_grad(), self:
                self.model(x.detach().clone())
        except Exception:  # whatever it is, the refusal stands without a place
            return "", ""
        finally:
            for handle in handles:
                handle.remove()
        return self.place, self.large

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self.running.append(self.names.get(id(module), ""))

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.running.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = (*args, *(kwargs or {}).values())
        was_finite = self.place or all(map(_is_finite, given))  # -inf that a model puts into a mask is meant
        output = func(*args, **(kwargs or {}))
        if not self.place and was_finite and isinstance(output, Tensor) and output.is_floating_point():
            self._note(func, output)
        return output

    def _note(self, func: Any, output: Tensor) -> None:
        where = next((name for name in reversed(self.running) if name), type(self.model).__name__)
        called = f"{getattr(func, '__name__', 'a call')} in {where}"
        top = float(output.abs().amax()) if output.numel() else 0.0
        if not math.isfinite(top):
            self.place = called
        elif top > largest_square_root(output.dtype) and not self.large:
            self.large = f"{top:.2g}, at {called}"


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or _finite(value)
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
