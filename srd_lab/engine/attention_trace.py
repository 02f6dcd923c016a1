"""A forward pass that keeps the attention matrices of a transformer: of torch's attention, and of ``softmax(q k^T) v``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from srd_lab.engine.affine import CASTS, COPIES, spelled
from srd_lab.engine.alignment import Alignment
from srd_lab.engine.layer_trace import LayerTrace
from srd_lab.engine.layers import leads_to
from srd_lab.engine.spellings import Function
from srd_lab.engine.token_grid import TokenGrid
from srd_lab.errors import Refused

_SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax}
_PASSING = COPIES | CASTS | spelled("dropout")
_WEIGHTING = spelled("matmul __matmul__ bmm einsum")
_CURE = "use a method for any network, such as srd or gradient"


@dataclass(frozen=True)
class Attention:
    """One attention of a running model.

    weights : in the graph, (N, heads, L, S). where : the module that makes it.
    event : which torch function of the model made the weights; None for ``nn.MultiheadAttention``, always over tokens.
    """

    weights: Tensor
    where: str
    event: int | None


class AttentionTrace(LayerTrace):
    """Runs a model as it is and keeps its attention matrices, in call order."""

    needs_activations = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, None)
        self.attentions: list[Attention] = []
        self._softmaxes = WeakTensorKeyDictionary()  # outputs of a softmax, and its number
        self._within: Function | None = None  # the call that is running
        self._unused: dict[int, str] = {}  # softmaxes that have not weighted anything yet, and what made them

    def attention(self, weights: Tensor) -> Tensor:
        """The weights of an attention in one call of torch."""
        event = None if self._within is F.multi_head_attention_forward else self.events
        self.attentions.append(Attention(weights, self.where(), event))
        return weights

    def other(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if function in _WEIGHTING and first is not None and first in self._softmaxes:
            self._unused.pop(self._softmaxes[first], None)
            self.attentions.append(Attention(first, self.where(), self._softmaxes[first]))
        self._within = function
        out = super().other(function, args, kwargs)
        if not isinstance(out, Tensor) or first is None or not self.is_map(first):
            return out
        if function in _SOFTMAXES and out.dim() > 2 and _dim(args, kwargs) in (-1, out.dim() - 1):
            self._softmaxes[out] = self.events
            self._unused[self.events] = self.where()
        elif function in _PASSING and first in self._softmaxes:
            self._softmaxes[out] = self._softmaxes[first]
        return out

    def matrices(self, images: int) -> list[Tensor]:
        """The attention matrices (N, heads, T, T) of so many images, from the first to the last.

        Raises Refused where there are none, where they are not of all tokens over all tokens, and not one behind the other.
        """
        if not self.attentions:
            raise Refused(f"the network has no attention, softmax(q k^T) v, that could be followed; {_CURE}")
        for where in self._unused.values():
            raise Refused(f"the softmax in {where} does not weight values by a product of matrices; {_CURE}")
        found = [attention.weights for attention in self.attentions]
        size = (images, found[0].shape[-1], found[0].shape[-1])
        for attention in self.attentions:
            shape = tuple(attention.weights.shape)
            if len(shape) != 4 or (shape[0], *shape[2:]) != size:
                raise Refused(
                    f"attention in {attention.where} has weights of shape {shape} for {images} images; expected "
                    "(N, heads, T, T) everywhere, all tokens over all: attention within windows, over other tokens or by "
                    f"one token alone cannot be rolled out; {_CURE}"
                )
        for earlier, later in zip(self.attentions, self.attentions[1:], strict=False):
            if not leads_to(later.weights.grad_fn, earlier.weights.grad_fn):
                raise Refused(
                    f"attention in {later.where} does not read what that in {earlier.where} puts out, so that they cannot "
                    f"be rolled out one behind the other; {_CURE}"
                )
        return found

    def grid(self, alignment: Alignment, count: int) -> TokenGrid:
        """Where ``count`` tokens lie over the image. Raises Refused where that is not known, or differs between layers."""
        grids = [
            alignment.grid(t.event, t.channels)
            for t in self.tokens
            if t.output.shape[3 - t.channels] == count
        ]
        found = [grid for grid in grids if grid is not None]
        attending = [alignment.grid(a.event, 3) for a in self.attentions if a.event is not None]
        same = (grid is not None and torch.equal(grid.cells, found[0].cells) for grid in (*found, *attending))
        if not found or not all(same):
            raise Refused(
                f"it is not known where the {count} tokens that attention is over lie in the image: expected one for "
                f"each cell of a grid of patches, beside class and register tokens; {_CURE}"
            )
        return found[0]

    def release(self) -> None:
        super().release()
        self.attentions.clear()
        self._softmaxes.clear()
        self._unused.clear()


def _dim(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs.get("dim", args[1] if len(args) > 1 else None)
