"""SRD a second time: by two plain loops over the graph of a network's elementary operations, intercepting nothing.

`torch.export` writes a network down as a list of ATen operations, each with what it reads. Both passes are loops over that
list. Forwards, every operation is called. Backwards, a signal G goes from each operation to what it reads, where <t, G> over
the channels of a map t is the relevance of t at a position:

- an activation v = f(u) turns G_v into u <v, G_v> / ||u||^2: relevance stays at its position;
- an affine operation passes on its vector-Jacobian product and gives away what its constant b earned, <b, G>. A convolution
  (or a batch norm directly behind one) gives every position i of the receptive field the part ||x_i|| / sum_k ||x_k||;
  any other operation has a single vector x at the position, which takes all of it. To give an amount a to a vector x is
  to send it the signal a x / ||x||^2;
- the gate of a product and the scale of a layer norm are held: nothing goes to them.

The pass starts at the last map with more than one position, and the map is the relevance of the pixels. The mathematics is
that of `docs/method.md`; nothing here is shared with the package, so that an error would have to be made twice.
The loops are ordinary differentiable code and hold no derivative back: whoever differentiates the map by the image gets the
derivative of the whole expression, forward values and held factors included.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg

aten = torch.ops.aten
CONVOLUTION = aten.convolution.default
BATCH_NORM = aten._native_batch_norm_legit_no_training.default
LAYER_NORM = aten.native_layer_norm.default
LINEAR = aten.addmm.default
PRODUCT = aten.mul.Tensor
ACTIVATIONS = {aten.relu.default, aten.hardtanh.default, aten.gelu.default, aten.silu.default}
GATES = {aten.sigmoid.default}
SEVERAL = {aten.add.Tensor, aten.cat.default}  # affine in all the maps that they read
CONSTANT = {CONVOLUTION, BATCH_NORM, LINEAR, aten.add.Tensor}  # affine, with a constant that earns relevance
AFFINE = {
    *(SEVERAL | CONSTANT | {PRODUCT}),
    *(aten.view.default, aten.permute.default, aten.clone.default, aten.split_with_sizes.default),
    *(aten.max_pool2d_with_indices.default, aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default),
}


@dataclass
class Graph:
    """A network up to its encoder's end: operations in order, and what their constants are."""

    image: Node
    operations: list[Node]
    constants: dict[Node, Tensor]  # what the image has no part in
    axes: dict[Node, int | None]  # along which axis vectors run; None where they are torn apart

    def axis(self, node: Node) -> int:
        """Along which axis the vectors of this map run."""
        axis = self.axes[node]
        assert axis is not None, f"the vectors of {node} are torn apart"
        return axis


def export(model: nn.Module, image: Tensor) -> Graph:
    """Writes the network down for images of this shape."""
    table = torch.export.default_decompositions()
    table.pop(aten.silu.default, None)  # else x sigmoid(x) looks like a gate
    program = torch.export.export(model, (image.detach(),)).run_decompositions(table)
    tensors = {**program.state_dict, **program.constants}
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    places = [node for node in program.graph.nodes if node.op == "placeholder"]
    (start,) = (node for node in places if kinds[node.name].kind is InputKind.USER_INPUT)
    constants = {node: tensors[str(kinds[node.name].target)] for node in places if node is not start}
    operations: list[Node] = []
    axes: dict[Node, int | None] = {start: 1}
    for node in (node for node in program.graph.nodes if node.op == "call_function"):
        if all(read in constants for read in node.all_input_nodes):
            constants[node] = call(node, constants)
        else:
            operations.append(node)
            axes[node] = vector_axis(node, axes)
    end = max(index for index, node in enumerate(operations) if has_extent(node, axes[node]))
    return Graph(start, operations[: end + 1], constants, axes)


def shape(node: Node) -> list[int]:
    """The sizes of a map, of the first one where an operation makes several."""
    value = node.meta["val"]
    return list(value.shape if isinstance(value, Tensor) else value[0].shape)


def has_extent(node: Node, axis: int | None) -> bool:
    """Whether this is a map of vectors at more than one position."""
    if not isinstance(node.meta["val"], Tensor) or len(shape(node)) != 4 or axis is None:
        return False
    return prod(shape(node)[1:]) > shape(node)[axis]


def vector_axis(node: Node, axes: dict[Node, int | None]) -> int | None:
    """The axis along which vectors run, followed through permutations and reshapes that leave it whole."""
    if node.target in (CONVOLUTION, BATCH_NORM):
        return 1
    if node.target in (LINEAR, LAYER_NORM):
        return len(shape(node)) - 1
    source = next(read for read in node.all_input_nodes if read in axes)
    axis = axes[source]
    if axis is None:
        return None
    if node.target is aten.permute.default:
        order: Any = node.args[1]
        return list(order).index(axis)
    before, after = shape(source), shape(node)
    if node.target is aten.view.default:
        whole = (prod(before[:axis]), before[axis])
        return next((i for i, size in enumerate(after) if (prod(after[:i]), size) == whole), None)
    return axis if len(before) == len(after) else None


def maker(node: Node) -> Node:
    """The operation whose output this is: that before it, where it picks one of several outputs."""
    return node.all_input_nodes[0] if node.target is operator.getitem else node


def call(node: Node, values: dict[Node, Any]) -> Any:
    """What the operation makes of these values."""
    function: Any = node.target
    return function(*map_arg(node.args, values.__getitem__), **map_arg(node.kwargs, values.__getitem__))


def forward(graph: Graph, image: Tensor) -> dict[Node, Any]:
    """Every value in the network."""
    values: dict[Node, Any] = {**graph.constants, graph.image: image}
    for node in graph.operations:
        values[node] = call(node, values)
    return values


def give(vector: Tensor, amount: Tensor, axis: int) -> Tensor:
    """The signal that gives every vector its amount of relevance; a vector that is 0 takes none."""
    square = vector.square().sum(axis, keepdim=True)
    return vector * torch.where(square > 0, amount / torch.where(square > 0, square, 1), 0)


def give_field(x: Tensor, amount: Tensor, layer: Any) -> Tensor:
    """Shares what a bias earned at the outputs of a convolution among the receptive fields in its input, by norms."""
    weight, _, *geometry = layer.args[1:6]
    window: Any = dict(zip(("stride", "padding", "dilation"), geometry, strict=True))
    window["kernel_size"] = list(weight.meta["val"].shape[2:])
    square = x.square().sum(1, keepdim=True)
    norm = torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)
    fields = F.unfold(norm, **window)  # (N, positions of the field, outputs)
    total = fields.sum(1, keepdim=True)
    shares = torch.where(total > 0, fields / torch.where(total > 0, total, 1), 0)
    received = F.fold(shares * amount.flatten(2), x.shape[2:], **window)
    return give(x, received, 1)


def affine(node: Node, reads: list[Node], values: dict[Node, Any]) -> Callable[..., Tensor]:
    """An operation as a function of those maps, all else as it is; of several outputs the one that `node` picks."""

    def function(*maps: Tensor) -> Tensor:
        result = call(maker(node), {**values, **dict(zip(reads, maps, strict=True))})
        return result if maker(node) is node else call(node, {maker(node): result})

    return function


def layer_norm(norm: Any, signal: Tensor, values: dict[Node, Any]) -> Tensor:
    """Centring is linear, the scale is held, and the shift belongs to the vector that it is added to."""
    source, _, weight, bias, eps = [values[arg] if isinstance(arg, Node) else arg for arg in norm.args]
    scale = (source.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    scaled = signal * weight * scale
    earned = (bias * signal).sum(-1, keepdim=True)
    return scaled - scaled.mean(-1, keepdim=True) + give(source, earned, -1)


def backward(graph: Graph, values: dict[Node, Any], start: dict[Node, Tensor]) -> Tensor:
    """The signal at the image when this one starts within the network."""
    signals: dict[Node, Any] = defaultdict(float, start)
    owed: dict[Node, Any] = defaultdict(float)  # by a convolution: what the shift behind it has earned
    for node in reversed(graph.operations):
        if node not in signals:
            continue
        signal, source = signals.pop(node), maker(node)
        reads = [read for read in source.all_input_nodes if read not in graph.constants]
        if source.target is PRODUCT and len(reads) > 1:
            reads = [read for read in reads if read.target not in GATES]
        assert len(reads) == 1 or source.target in SEVERAL, f"no rule for {source.format_node()}"
        first = reads[0]
        if source.target in ACTIVATIONS:
            axis = graph.axis(node)
            signals[first] += give(values[first], (values[node] * signal).sum(axis, keepdim=True), axis)
            continue
        if source.target is LAYER_NORM:
            signals[first] += layer_norm(source, signal, values)
            continue
        assert source.target in AFFINE, f"no rule for {source.format_node()}"
        function, maps = affine(node, reads, values), [values[read] for read in reads]
        for read, part in zip(reads, torch.func.vjp(function, *maps)[1](signal), strict=True):
            signals[read] += part
        if source.target not in CONSTANT or len(reads) > 1:
            continue
        axis, constant = graph.axis(node), function(torch.zeros_like(maps[0]))
        earned = (constant * signal).sum(axis, keepdim=True) + owed.pop(node, 0.0)
        if source.target is CONVOLUTION:
            signals[first] += give_field(maps[0], earned, source)
        elif source.target is BATCH_NORM and first.target is CONVOLUTION:
            owed[first] += earned
        else:
            signals[first] += give(maps[0], earned, axis)
    return signals[graph.image]


def srd_map(graph: Graph, image: Tensor) -> Tensor:
    """The map (N, H, W) of relevance at the pixels, from ones at the encoder's end."""
    values, end = forward(graph, image), graph.operations[-1]
    axis, start = graph.axis(end), end.all_input_nodes[0] if end.target in ACTIVATIONS else end
    ones = torch.ones_like(values[start].sum(axis, keepdim=True))
    signal = backward(graph, values, {start: give(values[start], ones, axis)})
    return (image * signal).sum(1)
