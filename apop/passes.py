"""Record which neurons are on, and run the network again on another input with that pattern frozen.

Algorithm 1 of the SRD paper (Appendix D) by its meaning: every ReLU call keeps ``output > 0``, every max pool call
its winners; a replay multiplies each pre-activation by the recorded mask and gathers the recorded winners. What is
recorded is a call, not a module: torchvision's ResNets use one ReLU module several times.

All else (affine layers with their biases, batch norm, average pools, concatenations, gates) runs as it is.

Example
-------
>>> from srd_lab.normalise import split_normalisation
>>> normalise, network = split_normalisation(model)
>>> given = normalise(x)
>>> logits, pattern = record(network, given)
>>> torch.allclose(replay(network, given, pattern), logits)
True
>>> replay(network, torch.zeros_like(given), pattern).shape
torch.Size([2, 10])
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apop.pattern import MAX_POOL, RELU, ActivationPattern, Entry
from srd_lab.engine.geometry import MaxPool, take
from srd_lab.engine.interceptor import Interceptor
from srd_lab.engine.preconditions import check_input
from srd_lab.engine.spellings import Call, function_name
from srd_lab.errors import BadInput, BadValue, Refused

_KINDS = {RELU: "ReLU", MAX_POOL: "max pool"}
_ADAPTIVE = (F.adaptive_max_pool2d, F.adaptive_max_pool2d_with_indices)
_OTHER_POOLS = (
    *(F.max_pool1d, F.max_pool1d_with_indices, torch.max_pool1d, torch.max_pool1d_with_indices),
    *(F.max_pool3d, F.max_pool3d_with_indices, torch.max_pool3d),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool1d_with_indices, torch.adaptive_max_pool1d),
    *(F.adaptive_max_pool3d, F.adaptive_max_pool3d_with_indices),
    *(F.fractional_max_pool2d, F.fractional_max_pool2d_with_indices),
    *(F.fractional_max_pool3d, F.fractional_max_pool3d_with_indices),
)


class _Follower(Interceptor, ABC):
    """Sees ReLU and max pool calls, with a name for each, and refuses what APOP is not defined for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._pools: Counter[str] = Counter()

    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        if call.kind != RELU:
            raise Refused(
                f"APOP is defined for ReLU networks, but activation {call.name!r} is of kind {call.kind!r}; "
                "choose a network whose activations are all ReLU, such as a VGG, a ResNet or a SqueezeNet"
            )
        return self.relu(call, x, inplace)

    def max_pool(self, pool: MaxPool) -> Any:
        def apply(x: Tensor) -> Any:
            return pool.apply(x, return_indices=True)

        return self._pool(pool.x, apply, pool.return_indices)

    def other(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function in _ADAPTIVE:
            return self._adaptive_pool(function, *args, **kwargs)
        if function in _OTHER_POOLS:
            raise Refused(
                f"{function_name(function)} in {self.where()} is a max pool whose winners cannot be frozen here; "
                "expected max_pool2d or adaptive_max_pool2d"
            )
        return function(*args, **kwargs)

    def _adaptive_pool(
        self, function: Any, input: Tensor, output_size: Any, return_indices: bool = False
    ) -> Any:
        def apply(x: Tensor) -> Any:
            return F.adaptive_max_pool2d(x, output_size, return_indices=True)

        return self._pool(input, apply, return_indices)

    def _pool(self, x: Tensor, apply: Any, return_indices: bool) -> Any:
        where = self.where()
        self._pools[where] += 1
        name = where if self._pools[where] == 1 else f"{where}#{self._pools[where]}"
        if x.dim() != 4:
            raise Refused(f"max pool {name!r} has an input {tuple(x.shape)}; expected (N, C, H, W)")
        out, indices = self.pool(name, x, apply)
        return (out, indices) if return_indices else out

    # what a subclass overrides -------------------------------------------------------------------------
    @abstractmethod
    def relu(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        """Output of a ReLU call, in place where the model asked for it."""

    @abstractmethod
    def pool(self, name: str, x: Tensor, apply: Any) -> tuple[Tensor, Tensor]:
        """Output and winners of a max pool call; ``apply(x)`` is the call itself."""


class _Recorder(_Follower):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.entries: list[Entry] = []

    def relu(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        out = call.original(x)
        self.entries.append(Entry(call.name, RELU, tuple(x.shape), out > 0))
        return out

    def pool(self, name: str, x: Tensor, apply: Any) -> tuple[Tensor, Tensor]:
        out, indices = apply(x)
        self.entries.append(Entry(name, MAX_POOL, tuple(x.shape), indices))
        return out, indices


class _Replayer(_Follower):
    def __init__(self, model: nn.Module, pattern: ActivationPattern, relu_after: bool) -> None:
        super().__init__(model)
        self.entries = pattern.entries
        self.relu_after = relu_after
        self.done = 0

    def relu(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        mask = self._next(call.name, RELU, x)
        out = x.mul_(mask) if inplace else x * mask
        return out.relu_() if self.relu_after else out

    def pool(self, name: str, x: Tensor, apply: Any) -> tuple[Tensor, Tensor]:
        winners = self._next(name, MAX_POOL, x)
        expected = tuple(apply(torch.empty_like(x, device="meta"))[0].shape)
        if expected != tuple(winners.shape):
            raise BadInput(
                f"max pool {name!r} has an output {expected}, but the pattern recorded {tuple(winners.shape)} there; "
                "replay the model that was recorded"
            )
        return take(x, winners), winners

    def _next(self, name: str, kind: str, x: Tensor) -> Tensor:
        """The recorded values for this call; refuses any other call than the one recorded."""
        if self.done == len(self.entries):
            raise BadInput(
                f"the pattern ends after {self.done} calls, but the model goes on with {_KINDS[kind]} call {name!r}; "
                "replay the model that was recorded"
            )
        entry = self.entries[self.done]
        self.done += 1
        if entry.kind != kind or entry.shape != tuple(x.shape):
            raise BadInput(
                f"{_KINDS[kind]} call {name!r} with input {tuple(x.shape)} does not fit the pattern, which recorded "
                f"{_KINDS[entry.kind]} call {entry.name!r} with input {entry.shape} there; replay the model that was "
                "recorded, on a batch of as many images of the same size"
            )
        return entry.values.to(x.device)


class _Binariser(Interceptor):
    def __init__(self, model: nn.Module, layer: int | str) -> None:
        super().__init__(model)
        self.layer = layer
        self.found = False

    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        out = call.original(x)
        if self.layer not in (call.index, call.name):
            return out
        self.found = True
        return out.gt_(0)


@torch.no_grad()
def record(model: nn.Module, x: Tensor) -> tuple[Tensor, ActivationPattern]:
    """The logits (N, K) of x (N, C, H, W), and which neurons were on.

    ``model`` takes ``x`` as it is: pixels for models of ``load_model``, normalised images for their ``network``.

    Raises BadInput for what is no batch of images, and Refused for an activation other than ReLU, a max pool whose
    winners cannot be frozen, and a model that cannot be followed.
    """
    check_input(x)
    recorder = _Recorder(model)
    logits = recorder.run(x.clone())  # a model may begin with an in-place activation
    return logits, ActivationPattern(tuple(recorder.entries))


@torch.no_grad()
def replay(model: nn.Module, x: Tensor, pattern: ActivationPattern, relu: bool = False) -> Tensor:
    """The logits (N, K) of x (N, C, H, W) with the on/off pattern frozen: every ReLU call gives ``x * mask``, which
    may be negative, every max pool call the recorded winners' values.

    pattern : of :func:`record`, on the same model and as many images of the same size.
    relu : apply ReLU after each mask ("APOP & relu").

    With the input that was recorded, the logits are those of ``record`` bit for bit.

    Raises BadInput, naming the call, where the model's calls or their shapes are not those recorded, and Refused as
    :func:`record` does.
    """
    check_input(x)
    replayer = _Replayer(model, pattern, relu)
    logits = replayer.run(x.clone())
    if replayer.done < len(pattern.entries):
        missed = pattern.entries[replayer.done]
        raise BadInput(
            f"the model made {replayer.done} of the {len(pattern.entries)} calls recorded; the first one missing is "
            f"{_KINDS[missed.kind]} call {missed.name!r}; replay the model that was recorded"
        )
    return logits


@torch.no_grad()
def binarize(model: nn.Module, x: Tensor, layer: int | str) -> Tensor:
    """The logits (N, K) of x (N, C, H, W) when one activation call gives 1 where its output is > 0, else 0 (Fig. 6).

    layer : position of the call (from 0, activation calls only) or its name, as in ``ActivationPattern.masks``.

    Raises BadValue if there is no such call, BadInput for what is no batch of images, and Refused where the model cannot
    be followed.
    """
    check_input(x)
    binariser = _Binariser(model, layer)
    logits = binariser.run(x.clone())
    if not binariser.found:
        names = ", ".join(call.name for call in binariser.calls)
        raise BadValue(
            f"the model has no activation call {layer!r}; choose 0..{len(binariser.calls) - 1} or one of {names}"
        )
    return logits
