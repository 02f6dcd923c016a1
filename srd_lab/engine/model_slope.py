"""Whether a model's gradient is its slope: asked once, with small steps along the gradient and without backward hooks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from srd_lab.engine.interceptor import Watch
from srd_lab.engine.model_memory import found_of
from srd_lab.engine.rounding import RoundingWatch, far_apart, logits_of
from srd_lab.errors import Refused
from srd_lab.overflow import refuse_overflow

_SLOPE = "of its slope: "
_BY_HOOKS = (
    "backward hooks of its modules, of another tool perhaps, change the model's gradients; its maps say what they do, and "
    "not what the model does: remove the hooks"
)
_SHARES = (1, 0.3, 0.1, 0.03, 0.01)  # of the longest step


def false_slope(model: nn.Module, x: Tensor) -> str:
    """What is to be said of a model whose output does not change as autograd's gradient says; empty for all others.

    x : images (N, C, H, W), of which the first is taken some small steps up and down its gradient.
    """
    known = next((said for said in found_of(model) if said.startswith(_SLOPE)), None)
    if known is not None:
        return known.removeprefix(_SLOPE)
    if not x.detach()[:1].any():
        return ""
    if _hooks_change_gradients(model, x.detach()[:1]):
        found_of(model).add(_SLOPE + _BY_HOOKS)
        return _BY_HOOKS
    found = _false_slope_at(model, x, 0)
    if found:  # unless a kink lies between the steps, it is so beside the place as well
        found = found if _false_slope_at(model, x, 1) else ""
    if found is not None:
        found_of(model).add(_SLOPE + found)
    return found or ""


def _hooks_change_gradients(model: nn.Module, one: Tensor) -> bool:
    """Whether the gradient of the logits for an image (1, C, H, W) is another one without the modules' backward hooks."""
    hooks = [of for m in model.modules() for of in (m._backward_hooks, m._backward_pre_hooks) if of]
    if not hooks:
        return False
    kept = [dict(of) for of in hooks]
    slopes = [_slope(model, one)]
    try:
        for of in hooks:
            of.clear()
        slopes.append(_slope(model, one))
    finally:
        for of, before in zip(hooks, kept, strict=True):
            of.update(before)
    if slopes[0] is None or slopes[1] is None:
        return False
    return (
        far_apart(slopes[0].flatten(), slopes[1].flatten()) > 1e-3
    )  # more than an accelerator's order of sums


def _slope(model: nn.Module, one: Tensor) -> Tensor | None:
    """The gradient of the logits' sum of squares; None where there is none."""
    leaf = one.clone().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(Watch(model), leaf)
        if logits is None or not logits.requires_grad:
            return None
        try:
            return torch.autograd.grad(logits.square().sum(), leaf, allow_unused=True)[0]
        except RuntimeError:  # what is overwritten cannot be differentiated; not all methods have to
            return None


def _false_slope_at(model: nn.Module, x: Tensor, place: int) -> str | None:
    """The same at one place near the first image; None where the model cannot be asked."""
    watch, one = RoundingWatch(model), _off_the_kinks(x.detach()[:1], place).requires_grad_()
    with torch.enable_grad():
        logits = logits_of(watch, one)
        if logits is None or not logits.requires_grad:
            return None
        top = int(logits[0].argmax())
        try:
            (slope,) = torch.autograd.grad(logits[0, top], one, allow_unused=True)
        except RuntimeError:  # what is overwritten cannot be differentiated; not all methods have to
            return None
    if slope is None or not slope.isfinite().all():
        return None
    size, steep = float(logits.detach().abs().amax()), float(slope.double().norm())
    if not math.isfinite(steep) or not math.isfinite(size):
        return ""
    if not steep and _overflows(model, one.detach()):
        return ""
    way = (slope.double() / steep).to(slope) if steep else _drawn(one).sign()
    # the longest step changes the output by a tenth at most, and no pixel by more than a quarter of the largest
    longest = 0.25 * float(one.detach().abs().amax()) / float(way.abs().amax())
    longest = min(longest, 0.1 * size / steep) if steep else longest
    steps = [share * longest for share in _SHARES]
    with torch.no_grad():
        near = torch.cat([one.detach() + sign * step * way for step in steps for sign in (1, -1)])
        found = logits_of(watch, near)
    if found is None:
        return ""
    rises = found[:, top].view(-1, 2).diff(dim=1)[:, 0].neg()
    expected = 2 * steep * rises.new_tensor(steps)
    seen = ((rises.abs() > watch.rounding * size) | (expected > watch.rounding * size)).nonzero()[:, 0]
    if len(seen) < 2:
        return ""
    rises, expected = rises[seen[-2:]], expected[seen[-2:]]  # of the two shortest steps that show anything
    off = rises / expected if steep else rises.sign() * torch.inf
    bent = steep and float((off[0] - off[1]).abs()) > 0.1 * float(off.abs().amax())
    if bent or not bool((off - 1).abs().gt(0.1).all()):
        return ""
    return (
        f"the model's output rises by {float(rises[-1]):.2g} where its gradient says {float(expected[-1]):.2g}: "
        "something in it is rounded, detached, changed through .data, or hooks change its gradients; its maps say what "
        "autograd does, and not what the model does"
    )


def _overflows(model: nn.Module, x: Tensor) -> bool:
    """Whether a map of ``x`` that is zero everywhere would be refused, because numbers in the model overflow."""
    try:
        refuse_overflow(model, x, None, x.new_zeros(1, 1, 1), squares=True)
    except Refused:
        return True
    return False


def _off_the_kinks(x: Tensor, place: int) -> Tensor:
    """``x`` changed a little: black pixels may make activations of exactly 0, where a ReLU has no slope."""
    return x + 0.01 * x.abs().amax() * _drawn(x, place)


def _drawn(x: Tensor, seed: int = 0) -> Tensor:
    """Numbers from -0.5 to 0.5, like ``x``, that are always the same."""
    drawn = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn - 0.5).to(x.detach())
