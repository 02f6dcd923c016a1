"""Where the encoder of a network ends: the last map before global pooling or flattening, or the last tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from srd_lab.engine.affine import RESHAPES
from srd_lab.engine.channels import Channels, has_extent, places
from srd_lab.engine.geometry import Convolution
from srd_lab.engine.layers import check_rows, is_cut, leads_to
from srd_lab.engine.record import Records, original_of
from srd_lab.engine.spellings import Call, Function
from srd_lab.errors import BadValue, Refused

ANOTHER_ENCODER = 'name another submodule with encoder="..."'
_GLOBAL_POOLS = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)


@dataclass(frozen=True)
class End:
    """Where an encoder ends.

    output : its output as it was then; version : of the tensor then. channels : the axis of its channels.
    call : the activation call that made it, None after anything else.
    event : which torch function of the model made it, where the trace counts them.
    """

    output: Tensor
    version: int
    channels: int
    call: Call | None
    event: int | None


class EncoderEnd:
    """Looks for the end of the encoder while a model runs; a trace tells it what happens.

    name : dotted name of the submodule that is the encoder, "" for the model itself, None to find its end.
    """

    def __init__(self, model: nn.Module, name: str | None, records: Records, channels: Channels) -> None:
        self.name = name
        self._module = None if name is None else find_module(model, name)
        self._records, self._channels = records, channels
        self._found: End | None = None
        self._pooled = set[Any]()  # what it was pooled and flattened into: nodes of autograd's graph
        self._others: list[tuple[End, set[Any]]] = []  # the same of other branches, pooled each by itself

    def clear(self) -> None:
        """Drop the reference to the output."""
        self._found = None
        self._pooled.clear()
        self._others.clear()

    def layer(self, x: Tensor, axis: int) -> None:
        """A layer reads ``x``: where that has spatial extent, what was pooled before was a side branch, not the end."""
        if self._module is None and has_extent(x, axis):
            self._found, self._pooled, self._others = None, set(), []

    def convolved(self, conv: Convolution, out: Tensor) -> None:
        """The model convolved a map: with a kernel as large as that, it is flattened and given to a linear layer."""
        self.layer(conv.x, 1)
        sides = tuple(d * (k - 1) + 1 for k, d in zip(conv.weight.shape[2:], conv.dilation, strict=True))
        if sides == tuple(conv.x.shape[2:]) and conv.stride == (1, 1) and not any(conv.padding):
            self.call(F.conv2d, conv.x, out)

    def call(self, function: Function, first: Tensor, out: Tensor) -> None:
        """The model called ``function`` on the map ``first``, which gave ``out``."""
        if self._module is not None or not first.requires_grad:
            return
        if (
            self._found is not None
            and function in RESHAPES
            and out.shape == self._found.output.shape
            and first.dim() < 3
        ):
            self._found, self._pooled, self._others = None, set(), []  # flattened, and back again
        extended = has_extent(first, self._channels.of(first))
        if first.dim() not in (3, 4) or (first.dim() == 3 and not extended):
            return
        axis = self._channels.of(first)
        sides = zip(places(first, axis), places(out, self._channels.of(out)), strict=False)
        # along one axis, maybe, and then along the other
        pooled = out.dim() == first.dim() and any(before > 1 == after for before, after in sides)
        flattened = 0 < out.dim() < first.dim() and out.shape[0] == first.shape[0]
        if not (pooled or flattened or (function in _GLOBAL_POOLS and first.dim() == 4)):
            return
        self._records.note(out, pooled=True)
        if self._found is None:
            self._found, self._pooled = self._end(first), {out.grad_fn}
        elif original_of(first) is self._found.output or _is_some_of(first, self._found.output):
            self._pooled.add(out.grad_fn)
        elif _is_some_of(self._found.output, original_of(first)):
            self._found = self._end(first)
            self._pooled.add(out.grad_fn)
        elif extended and not self._records[first].pooled:
            # a gate, say, whose pooled factor is the map's own: the later map is the end; or one branch of several
            apart = not leads_to(first.grad_fn, self._found.output.grad_fn)
            if not apart and not leads_to(first.grad_fn, self._found.output.grad_fn, self._pooled):
                return  # made of what was pooled alone, such as the logits of several views: behind the end
            self._others = [*self._others, (self._found, self._pooled)] if apart else []
            self._found, self._pooled = self._end(first), {out.grad_fn}

    def returned(self, module: nn.Module, output: Any) -> bool:
        """``module`` has returned ``output``; whether it is the encoder."""
        if module is not self._module:
            return False
        if not isinstance(output, Tensor):
            raise Refused(f"encoder {self.name!r} puts out {type(output).__name__}; expected one tensor")
        self._found = self._end(output)
        return True

    def found(self, images: int, top: Any, bottom: Any) -> End:
        """Where the encoder ended in the last pass, of so many images.

        top, bottom : nodes of autograd's graph, that of the model's output and that of the image.

        Raises SrdLabError where no end was found, or several, where it was overwritten, and for no map and no tokens.
        """
        if self._found is None:
            raise Refused(
                "no end of an encoder was found (a map with spatial extent before global pooling or flattening, or "
                "tokens before one is picked or all are averaged); "
                'name the submodule that puts it out with encoder="..." ("" is the model itself)'
            )
        ends = [*self._others, (self._found, self._pooled)]
        if self._others:  # heads that have no part in the output do not count
            below = _nodes_below(top)
            ends = [(end, pooled) for end, pooled in ends if pooled & below]
        if len(ends) != 1:
            raise Refused(
                "several maps are pooled, each by itself, before the logits, so that none is the encoder's output; name the "
                'submodule to explain with encoder="..."'
            )
        end = ends[0][0]
        output = end.output
        if output._version != end.version:
            raise Refused(
                "what was found as the encoder's output is overwritten by the model later on; name the submodule that "
                'puts it out with encoder="..."'
            )
        if output.dim() < 3:
            raise Refused(
                f"encoder {self.name!r} puts out shape {tuple(output.shape)}; expected a map "
                "(N, C, h, w) or tokens (N, S, D): name a submodule before pooling or flattening"
            )
        check_rows("the encoder", output.shape, images, ANOTHER_ENCODER)
        # what the scores of an attention that pools are made of, say, is not all
        if self._module is None and not is_cut(output.grad_fn, top, bottom):
            raise Refused(
                "what was found as the encoder's output has only a part in the logits, which are made of the image on other "
                'ways as well; name the submodule to explain with encoder="..."'
            )
        return end

    def _end(self, output: Tensor) -> End:
        output = original_of(output)  # other branches do not pass a view
        base = output._base
        # an activation in another shape is the activation
        if (
            base is not None
            and base.dim() > 2
            and base.numel() == output.numel()
            and self._records[base].call
        ):
            output = base
        known = self._records[output]
        return End(output, output._version, self._channels.of(output), known.call, known.event)


def _nodes_below(top: Any) -> set[Any]:
    """All that a node of autograd's graph is made of, what counts as a constant too."""
    found, waiting = set[Any](), [top]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [below for below, _ in node.next_functions]
    return found


def _is_some_of(part: Tensor, found: Tensor) -> bool:
    """Whether ``part`` is some of the tokens ``found``: patches, say, that are averaged beside the class token."""
    return part.dim() == found.dim() == 3 and part._base is not None and original_of(part._base) is found


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The submodule of that dotted name; a wrapper's prefix may be left out. Raises SrdLabError for none and for several.

    Example
    -------
    >>> find_module(model, "features.0")
    Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    modules = dict(model.named_modules())
    if name in modules:
        return modules[name]
    matches = [module for full, module in modules.items() if full.endswith("." + name)]
    if len(matches) != 1:
        known = ", ".join(full for full, _ in model.named_children())
        raise BadValue(f"the model has no submodule {name!r}; its parts are {known} (dotted names go deeper)")
    return matches[0]
