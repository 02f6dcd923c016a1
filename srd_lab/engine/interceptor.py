"""See every activation, affine and pooling call of an unmodified model while it runs.

Module hooks miss functional activations and cannot tell apart the calls of a shared module, and graph rewriting
fails on control flow; a ``TorchFunctionMode`` sees each call as it happens and leaves the model untouched.
What a call becomes is decided by subclasses of :class:`Interceptor`, which override one method per kind of call.
In-place activations keep their meaning: every reference to the tensor still sees it change.

Not seen by any such mode, and therefore refused: scripted modules, modules replicated to other threads
(DataParallel) and recomputation by checkpointing. Compiled functions run uncompiled.

Example
-------
>>> seen = Interceptor(model)
>>> logits = seen.run(x)
>>> [call.name for call in seen.calls][:3]
['network.features.1', 'network.features.3', 'network.features.6']
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import cuda
from torch.overrides import TorchFunctionMode

from srd_lab.engine.geometry import (
    BatchNorm,
    Convolution,
    MaxPool,
    batch_norm_of,
    convolution_of,
    linear_of,
    max_pool_of,
)
from srd_lab.engine.preconditions import check_model
from srd_lab.engine.record import is_one_with
from srd_lab.engine.softplus import in_place
from srd_lab.engine.spellings import (
    DROPPING,
    MAX_POOLS,
    Call,
    Function,
    draws,
    first_tensor,
    function_name,
    in_one_spelling,
    recognise,
    tensors_in,
)
from srd_lab.errors import Refused
from srd_lab.logits import class_logits

_ATTENTION = (
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp),
)

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")
_BATCH_NORMS = {F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm}
_TURNED = {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}


_called: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # which functions, when it was last run


def functions_of(model: nn.Module) -> int:
    """A number that is the same for two runs of a model that called the same functions of torch, when it was last run."""
    return _called.get(model, 0)


class Interceptor(TorchFunctionMode):
    """Runs a model and passes each call of interest to a method; the base class changes nothing.

    A subclass overrides ``activation``, ``convolution``, ``linear``, ``batch_norm``, ``max_pool`` or ``other``.
    Inside these methods interception is off, so they may use any torch function.

    model : what is run; its weights, flags and hooks are left alone.
    calls : its activation calls so far, in call order. events : how many torch functions it has called.
    sequence : a number that is the same for two runs if they called the same functions with the same numbers.
    """

    needs_activations = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[Call] = []
        self.events = 0  # torch functions that the model has called; not counted: what its backward hooks do
        self.sequence = 0  # tells which functions these were, with which numbers
        self.functions = 0  # and which, with whatever numbers
        self.own_draws: list[bytes] = []  # states of the model's own generators before it drew from them
        self._names = {id(module): name for name, module in model.named_modules()}
        self._containers = {name.rpartition(".")[0] for name in self._names.values()}
        self._path: list[str] = []
        self._used: Counter[str] = Counter()

    # what a subclass may override ------------------------------------------------------------------------
    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        """The output of activation ``call`` for ``x``, of its shape; ``inplace``: the model wants ``x`` overwritten."""
        return in_place(x, lambda u: self.activation(call, u)) if inplace else self.activation(call, x)

    def activation(self, call: Call, u: Tensor) -> Tensor:
        """The output for the pre-activation ``u``, of its shape."""
        return call.function(u)

    def convolution(self, conv: Convolution) -> Tensor:
        """The output (N, C, h, w) of a 2d convolution."""
        return conv.call()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output (..., out) of a linear layer for ``x`` (..., in); weight : (out, in); bias : (out,)."""
        return F.linear(x, weight, bias)

    def batch_norm(self, norm: BatchNorm, run: Callable[[], Tensor]) -> Tensor:
        """The output of a batch norm with fixed statistics; ``run`` makes the call."""
        return run()

    def max_pool(self, pool: MaxPool) -> Any:
        """The output (N, C, h, w) of a 2d max pool, with the winners' indices if the model asked for them."""
        return pool.apply(pool.x, pool.return_indices)

    def other(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What any other torch function returns."""
        return function(*args, **kwargs)

    def left(self, module: nn.Module, output: Any) -> Any:
        """Called when ``module`` has returned ``output``; what this returns takes its place, unless None."""
        return None

    # running ------------------------------------------------------------------------------------------
    def run(self, x: Tensor) -> Any:
        """The model's class logits (N, K) for ``x`` (N, C, H, W); its output as it is, if it has none.

        Raises SrdLabError for what interception cannot see through, and for what chance or the batch decides.
        """
        check_model(self.model)
        with _plain_torch, self._following_modules(), self:
            output = self.model(x)
        _called[self.model] = self.functions
        if self.needs_activations and not self.calls:
            raise Refused(
                "no activation call was seen in the model; expected ReLU, LeakyReLU, ELU, SiLU, GELU, Tanh or softplus "
                "called through torch: use an eager (not scripted, not compiled) network"
            )
        return self.finished(output, len(x))

    def finished(self, output: Any, images: int) -> Any:
        """The class logits in the model's ``output``. Raises SrdLabError if they have other than ``images`` rows."""
        logits = class_logits(output)
        if isinstance(logits, Tensor) and logits.dim() and len(logits) != images:
            raise Refused(
                f"the model puts out shape {tuple(logits.shape)} for {images} images; expected one row per image: take "
                "averages and copies of the batch out of forward()"
            )
        return logits

    @contextmanager
    def _following_modules(self) -> Iterator[None]:
        """Know which module is running, by process-wide hooks that leave the model's own hooks alone."""
        thread = threading.get_ident()

        def enter(module: nn.Module, inputs: Any) -> None:
            if threading.get_ident() == thread and id(module) in self._names:
                self._path.append(self._names[id(module)])

        def leave(module: nn.Module, inputs: Any, output: Any) -> Any:
            if threading.get_ident() == thread and id(module) in self._names:
                self._path.pop()
                counted = self.events, self.sequence, self.functions
                out = self.left(module, output)
                self.events, self.sequence, self.functions = (
                    counted  # what is done here is not the model's doing
                )
                return out
            return None

        handles = (
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.intercept(*in_one_spelling(func, args, kwargs or {}))

    def intercept(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call of a torch function, in the one spelling that all of its spellings come in."""
        if torch.is_inference_mode_enabled():
            raise Refused(
                f"{self.where()} runs in torch.inference_mode, where nothing can be traced; use torch.no_grad there, or "
                "neither"
            )
        autocast_off()
        # backward hooks of modules, which run only where gradients are on, take views of tensors and look at flags
        if func is Tensor.view_as and args[0] is args[-1]:
            view = func(*args)
            is_one_with(view, args[0])
            return view
        if getattr(func, "__name__", "") != "__get__" or func in _TURNED:
            self.count(func, args, kwargs)
        found = recognise(func, args, kwargs)
        if found is None:
            out = self._dispatch(func, args, kwargs)
            return _laid_out(func, out) if func in _BATCH_NORMS else out
        kind, pure, inplace = found
        first, rest = first_tensor(args, kwargs), args[1:]
        kwargs = {name: value for name, value in kwargs.items() if name != "input"}
        options = {name: value for name, value in kwargs.items() if name != "inplace"}
        call = Call(
            index=len(self.calls),
            name=self._name(kwargs.get("stands_for", kind)),
            kind=kind,
            function=lambda u: pure(u, *rest, **options),
            original=lambda x: func(x, *rest, **kwargs),
        )
        return self._activate(call, first, inplace)

    def count(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model has called one more torch function."""
        self.events += 1
        activates = recognise(func, args, kwargs) is not None
        if not getattr(func, "__name__", "").startswith(
            ("is_", "__len__")
        ):  # a surrogate asks, and bends otherwise
            self.functions = hash((self.functions, None if activates else func))
        numbers = () if activates else _numbers((args, *kwargs.items()))
        self.sequence = hash((self.sequence, func, numbers))  # less the bend of an activation

    def _activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        self.calls.append(call)
        return self.activate(call, x, inplace)

    def _dispatch(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.conv2d:
            return self.convolution(convolution_of(self._pad, *args, **kwargs))
        if func is F.linear:
            return self.linear(*linear_of(*args, **kwargs))
        if func is F.batch_norm and not self._is_parameter(first_tensor(args, kwargs)):
            return self.batch_norm(batch_norm_of(*args, **kwargs), lambda: func(*args, **kwargs))
        if func in MAX_POOLS:
            return self.max_pool(
                max_pool_of(*args, **{"return_indices": func is F.max_pool2d_with_indices, **kwargs})
            )
        if func in DROPPING and DROPPING[func](*args, **kwargs):
            raise Refused(f"dropout is active in {self.where()}; call model.eval() first")
        if isinstance(own := kwargs.get("generator"), torch.Generator):
            self.own_draws.append(own.get_state().numpy().tobytes())
        if draws(func, args, kwargs):
            raise Refused(
                f"{function_name(func)} in {self.where()} draws at random, so that the model has no one map for an image; "
                "call model.eval() first, or take chance out of forward()"
            )
        return self.other(func, args, kwargs)

    @cached_property
    def _parameters(self) -> set[int]:
        return {id(t) for t in (*self.model.parameters(), *self.model.buffers())}

    def _is_parameter(self, t: Tensor) -> bool:
        """Whether ``t`` is a weight or a view of one: standardised weights have statistics of their own."""
        return id(t if t._base is None else t._base) in self._parameters

    def _pad(self, x: Tensor, sides: list[int]) -> Tensor:
        return self.other(F.pad, (x, sides), {})

    def _name(self, kind: str) -> str:
        module = self._path[-1] if self._path else ""
        base = module if module and module not in self._containers else f"{module}.{kind}".lstrip(".")
        self._used[base] += 1
        return base if self._used[base] == 1 else f"{base}#{self._used[base]}"

    def where(self) -> str:
        """The running module, for messages."""
        return (self._path[-1] if self._path else "") or type(self.model).__name__


def _laid_out(func: Function, out: Any) -> Any:
    """``out`` of a batch norm, whose gradient will lie in memory as it does. torch reads that of a single image so, even
    where it comes with its channels last, and then returns a wrong one."""
    with torch._C.DisableTorchFunction():  # whoever else intercepts counts the model's calls
        single = isinstance(out, Tensor) and (len(out) == 1 or func not in (F.batch_norm, torch.batch_norm))
        if single and out.requires_grad and out.is_contiguous():
            out.register_hook(lambda g: None if g is None else g.contiguous())
    return out


def _numbers(arg: Any) -> Any:
    """What a call was given beside tensors."""
    if isinstance(arg, tuple | list):
        return tuple(map(_numbers, arg))
    if isinstance(arg, slice):
        return _numbers((arg.start, arg.stop, arg.step))
    return repr(arg) if isinstance(arg, int | float | str) else type(arg)  # -1 and -2 have one hash


def autocast_off() -> None:
    """Turn off the autocast that the running model has turned on, which ends where the model ends it: what is explained is
    the network itself."""
    for device in _AUTOCAST:
        if torch.is_autocast_enabled(device):
            torch.set_autocast_enabled(device, False)


class _PlainTorch:
    """Within: attention that is not fused, which can be differentiated twice, as the attack must; and compiled functions
    run as they were written, so that their calls are seen. Torch's switches are the process's: the first thread that
    comes in turns them, and the last that goes turns them back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[bool] = []
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = [enabled() for enabled, _ in _ATTENTION]
                for _, turn in _ATTENTION:
                    turn(turn is cuda.enable_math_sdp)
                self._stance = torch.compiler.set_stance("force_eager")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for (_, turn), before in zip(_ATTENTION, self._before, strict=True):
                    turn(before)
                self._stance.__exit__(*error)


_plain_torch = _PlainTorch()


class Watch(Interceptor):
    """Runs a model just as it is; what chance or the batch would decide is refused all the same.

    Example
    -------
    >>> Watch(model).run(x).shape
    torch.Size([2, 10])
    """

    needs_activations = False

    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        return call.original(x)

    def convolution(self, conv: Convolution) -> Tensor:
        return conv.apply(conv.x, conv.weight, conv.bias)


class Exchange(Watch):
    """Runs a model in which what its torch function number ``event`` returned is exchanged for ``by`` of it.

    event : from 1, as ``events`` counts. by : makes the tensor that takes the place of what was returned.

    Model and control flow are those of the run that counted ``events``; the batch may grow on the way, unless (RuntimeError)
    the call was in place and what it overwrote is read again.
    """

    def __init__(self, model: nn.Module, event: int, by: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model)
        self.event, self.by = event, by
        self._overwritten: Tensor | None = None

    def finished(self, output: Any, images: int) -> Any:
        return class_logits(output)

    def intercept(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands, before = tensors_in(args, kwargs), self.events
        if any(t is self._overwritten for t in operands):
            raise RuntimeError("what was exchanged is read under the name that it had before the call")
        out = super().intercept(func, args, kwargs)
        if not before < self.events == self.event:
            return out
        made = self.by(out)
        if any(t is out for t in operands):  # in place: every reference to it is to see the exchange
            if made.shape == out.shape:
                return out.copy_(made)
            self._overwritten = out
        return made
