"""What is tried once with every model: whether its images are apart, whether its gradient is its slope, and whether
following it leaves it what it is.

All is asked with an image or a few when a model is first explained, and remembered as long as the model lives.
"""

from __future__ import annotations

import random
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from srd_lab.engine.affine import LIKE, overwrites
from srd_lab.engine.interceptor import Watch, functions_of
from srd_lab.engine.spellings import Call, Function, tensors_in
from srd_lab.errors import Refused
from srd_lab.overflow import refuse_overflow

_APART = "its images are apart"
_SLOPE = "of its slope: "
_BY_HOOKS = (
    "backward hooks of its modules, of another tool perhaps, change the model's gradients; its maps say what they do, and "
    "not what the model does: remove the hooks"
)
_SHARES = (1, 0.3, 0.1, 0.03, 0.01)  # of the longest step
_COMMON = 0.03  # of the size of what logits have in common, which is rounded, too
_TRIES = 3  # with images that the model tells apart too little to say
_BYTES = 2.0**-8
_TENSOR_CORES = 2.0**-10  # relative rounding of products there, of float32 numbers too
_memories: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()
_passed: WeakKeyDictionary[nn.Module, dict[str, set[str]]] = WeakKeyDictionary()


def passes_as(surrogate: nn.Module, original: nn.Module) -> None:
    """``surrogate`` need not be asked what ``original`` was asked: it differs in its activations alone."""
    _of(original)
    _passed[surrogate] = _passed[original]
    _memories[surrogate] = memory_of(original)


def memory_of(model: nn.Module) -> dict[Any, Any]:
    """What other modules remember of a model as long as it lives; a surrogate shares that of its original."""
    return _memories.setdefault(model, {})


def has_changed(model: nn.Module, network: nn.Module) -> bool:
    """Whether ``network``, which was just run, has called other functions of torch than when it was asked, as one with an
    exchanged part does; what was found of it, and of the ``model`` that it is a part of, is then forgotten."""
    key = has_changed, state_of(network)
    known: set[int] = memory_of(network).setdefault(key, set())
    changed = bool(known) and functions_of(network) not in known
    if changed:
        for part in (model, network):
            _of(part).clear()
            memory_of(part).clear()
        memory_of(network)[key] = known
    known.add(functions_of(network))
    return changed


def check_images_apart(model: nn.Module, x: Tensor) -> None:
    """Refuse (SrdLabError) a model whose output for an image depends on the images beside it.

    x : images (N, C, H, W), of which the first is tried: alone, and beside another in either order.
    """
    if _APART in _of(model):
        return
    one = x.detach()[:1]
    _check_no_chance(model, one)
    other, watch = one.flip((2, 3)) / 2, _Rounding(model)
    with torch.no_grad():
        alone = [_logits(watch, image) for image in (one, other)]
        beside, turned = _logits(watch, torch.cat([one, other])), _logits(watch, torch.cat([other, one]))
    if alone[0] is None or alone[1] is None or beside is None or turned is None:
        return
    each = torch.cat([alone[0], alone[1]])
    apart = max(_far(beside, each), _far(turned, each.flip(0)))
    if apart > watch.rounding:
        raise Refused(
            f"the model mixes the images of a batch: beside another one, an image has logits that differ by {apart:.2g} of "
            "the largest, so that it has no map of its own; take what runs along the first axis out of forward()"
        )
    if _is_reordered(watch):
        raise Refused(
            "the model works on the images of a batch in another order than it is given them, so that its maps inside are "
            "those of other images; take what moves the first axis out of forward()"
        )
    tries = f"asked {sum(said.startswith('asked') for said in _of(model)) + 1} times"
    told_apart = _far(each[:1], each[1:]) > watch.rounding  # else a mixture would not show
    _of(model).add(_APART if told_apart or tries == f"asked {_TRIES} times" else tries)


class SameOutput:
    """Whether a model puts out the same when it is followed; made before it is, as what runs last is what a model keeps.

    follower : what follows it. model, x : the model, and images (N, C, H, W), of which the first is tried.
    """

    def __init__(self, follower: str, model: nn.Module, x: Tensor) -> None:
        self._said, self._model = f"followed by {follower} it is the same", model
        self._watch, self._plain = _Rounding(model), None
        if self._said not in _of(model):
            with torch.no_grad():
                self._plain = _logits(self._watch, x.detach()[:1])

    def check(self, logits: Any) -> None:
        """Refuse (SrdLabError) a model that, followed, puts out other ``logits`` (N, K)."""
        plain = self._plain
        if plain is None or not isinstance(logits, Tensor) or plain.shape != logits[:1].shape:
            return
        apart = _far(logits.detach()[:1], plain)
        if apart > self._watch.rounding:
            raise Refused(
                f"the model puts out logits that differ by {apart:.2g} of the largest when its calls are followed: it does "
                "something that cannot be followed; use another method on it, and please report the model"
            )
        _of(self._model).add(self._said)


def false_slope(model: nn.Module, x: Tensor) -> str:
    """What is to be said of a model whose output does not change as autograd's gradient says; empty for all others.

    x : images (N, C, H, W), of which the first is taken some small steps up and down its gradient.
    """
    known = next((said for said in _of(model) if said.startswith(_SLOPE)), None)
    if known is not None:
        return known.removeprefix(_SLOPE)
    if not x.detach()[:1].any():
        return ""
    if _hooks_change_gradients(model, x.detach()[:1]):
        _of(model).add(_SLOPE + _BY_HOOKS)
        return _BY_HOOKS
    found = _false_slope_at(model, x, 0)
    if found:  # unless a kink lies between the steps, it is so beside the place as well
        found = found if _false_slope_at(model, x, 1) else ""
    if found is not None:
        _of(model).add(_SLOPE + found)
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
    return _far(slopes[0].flatten(), slopes[1].flatten()) > 1e-3  # more than an accelerator's order of sums


def _slope(model: nn.Module, one: Tensor) -> Tensor | None:
    """The gradient of the logits' sum of squares; None where there is none."""
    leaf = one.clone().requires_grad_()
    with torch.enable_grad():
        logits = _logits(Watch(model), leaf)
        if logits is None or not logits.requires_grad:
            return None
        try:
            return torch.autograd.grad(logits.square().sum(), leaf, allow_unused=True)[0]
        except RuntimeError:  # what is overwritten cannot be differentiated; not all methods have to
            return None


def _false_slope_at(model: nn.Module, x: Tensor, place: int) -> str | None:
    """The same at one place near the first image; None where the model cannot be asked."""
    watch, one = _Rounding(model), _off_the_kinks(x.detach()[:1], place).requires_grad_()
    with torch.enable_grad():
        logits = _logits(watch, one)
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
    if not steep and _overflows(model, one.detach()):
        return ""
    way = (slope.double() / steep).to(slope) if steep else _drawn(one).sign()
    # the longest step changes the output by a tenth at most, and no pixel by more than a quarter of the largest
    longest = 0.25 * float(one.detach().abs().amax()) / float(way.abs().amax())
    longest = min(longest, 0.1 * size / steep) if steep else longest
    steps = [share * longest for share in _SHARES]
    with torch.no_grad():
        near = torch.cat([one.detach() + sign * step * way for step in steps for sign in (1, -1)])
        found = _logits(watch, near)
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


class _Rounding(Watch):
    """Runs a model as it is, and knows how far two of its outputs may be apart that are the same but for rounding.

    eps : relative rounding of the coarsest numbers of what was made of the image. sums : of every run, of the absolute
        values that each activation call puts out, by row.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.eps = 0.0
        self.sums: list[list[Tensor]] = []
        self._of_image = WeakTensorKeyDictionary()

    def run(self, x: Tensor) -> Any:
        self._of_image[x] = True
        self.sums.append([])
        return super().run(x)

    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        out = super().activate(call, x, inplace)
        if out.dim() > 1 and out.is_floating_point():
            self.sums[-1].append(out.detach().abs().flatten(1).sum(1, dtype=torch.float64))
        return out

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        if func in LIKE or not any(t in self._of_image for t in tensors_in(args, kwargs)):
            return out
        if type(func).__module__ == "torch._ops" and not str(func).startswith("aten."):
            self.eps = max(self.eps, _BYTES)  # the way to quantised layers, and to what else has few bits
        written = args[:1] if func is Tensor.__setitem__ or overwrites(func, kwargs or {}) else ()
        for t in tensors_in((out, *written)):
            self._of_image[t] = True
            if t.is_floating_point():
                eps = torch.finfo(t.dtype).eps
                self.eps = max(self.eps, eps if t.device.type == "cpu" or eps < 1e-8 else _TENSOR_CORES)
        return out

    @property
    def rounding(self) -> float:
        """As a share of the largest logit: 1e-4 for float32, 1e-9 at least, 0.05 at most."""
        return min(max(1e3 * self.eps, 1e-9), 0.05)


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


def state_of(model: nn.Module) -> str:
    """What tells a model as it is from what hooks, or another ``forward``, make of it."""
    hooks = (
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )
    return f"{sum(hooks)} hooks, forward {id(vars(model).get('forward'))}"


def _of(model: nn.Module) -> set[str]:
    """What was found of the model as it is."""
    return _passed.setdefault(model, {}).setdefault(state_of(model), set())


def _check_no_chance(model: nn.Module, one: Tensor) -> None:
    """Refuse a model that draws at random, or whose output for an image (1, C, H, W) depends on earlier runs."""
    for _ in range(2):  # another thread may have drawn
        watches, states = (_Rounding(model), _Rounding(model)), [_random_states(one)]
        with torch.no_grad():
            outputs = []
            for watch in watches:
                outputs.append(_logits(watch, one))
                states.append(_random_states(one))
        if outputs[0] is None or outputs[1] is None:
            return
        if states[0] == states[1] and watches[0].own_draws == watches[1].own_draws:
            break
    else:
        raise Refused(
            "the model draws at random, so that the model has no one map for an image; call model.eval() first, or take "
            "chance out of forward()"
        )
    if _far(outputs[0], outputs[1]) > watches[0].rounding:
        raise Refused(
            "the model puts out other logits when it is run again on the same image, so that it has no one map for it: it "
            "draws at random, or keeps something from run to run; take that out of forward()"
        )


def _random_states(like: Tensor) -> list[Any]:
    """The states of the random number generators of Python, NumPy and PyTorch, on the CPU and where ``like`` is."""
    found = [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().numpy().tobytes()]  # noqa: NPY002
    if like.is_cuda:
        found.append(torch.cuda.get_rng_state(like.device).numpy().tobytes())
    return found


def _is_reordered(watch: _Rounding) -> bool:
    """Whether an activation call of the third run, of two images, has not what those of the first two, of one each, have."""
    one, other, both, *_ = watch.sums
    for first, second, pair in zip(one, other, both, strict=False):
        if len(first) == len(second) == 1 and len(pair) == 2:  # else rows are no images
            expected = torch.cat([first, second])
            if _far(pair, expected) > watch.rounding and _far(pair, expected.flip(0)) <= watch.rounding:
                return True
    return False


def _logits(watch: Watch, x: Tensor) -> Tensor | None:
    """The logits (N, K) of the model itself; None where it has none, or cannot be run: whoever runs it next says why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again, of the run that counts
            out = watch.run(x.clone())
    except Exception:  # whatever the model raises
        return None
    return out if isinstance(out, Tensor) and out.dim() == 2 else None


def _far(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest number in either, less what logits (N, K) have in common, which is
    no part of any map; 0 where that is 0 or not finite."""
    size = torch.maximum(one.abs().amax(), other.abs().amax())
    if one.dim() == 2 and one.shape[1] > 1:
        spread = (one.amax(1) - one.amin(1)).amax()
        size = torch.maximum(spread, _COMMON * size)
    share = float((one - other).abs().amax() / size)
    return share if share < float("inf") else 0.0
