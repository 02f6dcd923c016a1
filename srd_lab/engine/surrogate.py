"""The softplus surrogate of a network (Dombrowski et al. 2019)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from srd_lab.engine.interceptor import Interceptor
from srd_lab.engine.model_memory import passes_as
from srd_lab.engine.preconditions import refuse_checkpoint
from srd_lab.engine.softplus import smooth_clip, smooth_relu
from srd_lab.engine.spellings import Call
from srd_lab.normalise import split_normalisation


class SmoothModel(nn.Module):
    """The softplus surrogate of a model: ReLU-like calls become softplus(beta), all else stays (Dombrowski et al. 2019).

    ReLU, LeakyReLU, ReLU6 and hardtanh are replaced; activations that are smooth already stay.

    beta : > 0; the larger, the closer to the model: softplus(u) = log(1 + exp(beta u)) / beta.

    Example
    -------
    >>> (SmoothModel(model, 100.0)(x) - model(x)).abs().max() < (SmoothModel(model, 10.0)(x) - model(x)).abs().max()
    tensor(True)
    """

    def __init__(self, model: nn.Module, beta: float) -> None:
        super().__init__()
        self.model = model
        self.beta = beta
        passes_as(self, model)
        self.training = model.training  # its own flag alone: train() would set those of the model's parts

    def normalisation_and_network(self) -> tuple[nn.Module, nn.Module]:
        """The original's normalisation, and the surrogate of its network."""
        normalise, network = split_normalisation(self.model)
        return normalise, SmoothModel(network, self.beta)

    def forward(self, x: Tensor) -> Tensor:
        """What the surrogate puts out for images x (N, C, H, W), in the form of the model's own output."""
        return _Smooth(self.model, self.beta).run(x)


class _Smooth(Interceptor):
    def __init__(self, model: nn.Module, beta: float) -> None:
        super().__init__(model)
        self.beta = beta

    def finished(self, output: Any, images: int) -> Any:
        return output  # the caller looks

    def activate(self, call: Call, x: Tensor, inplace: bool) -> Tensor:
        refuse_checkpoint(call.name)
        if call.kind == "relu":
            return smooth_relu(x, 0.0, self.beta, inplace=inplace)
        if call.kind == "leaky_relu":
            slope = -call.value_at(-1.0)
            return smooth_relu(x, slope, self.beta, inplace=inplace, stands_for=call.kind)
        if call.kind in ("relu6", "hardtanh"):
            low, high = call.value_at(-1e30), call.value_at(1e30)
            return smooth_clip(x, low, high, self.beta, inplace=inplace, stands_for=call.kind)
        return call.original(x)
