"""Literal, slow oracle for the fast methods: the papers' definitions written out, in float64, for toy nets.

Nothing here imports srd_lab, and relevance is never obtained by automatic differentiation (the fast code's
way): contributions are carried *forwards* as explicit vectors, one copy of every tensor per contributing
position, ratios are formed from them one by one, and relevance is a plain matrix product. A single image is
``(C, H, W)`` throughout.

Names: a tensor is called after the step that makes it; the image is ``"input"``. A *layer* is ``"input"`` or
an activation step. A *target* is the pre-activation of an activation step (under that step's name), or the
last tensor where the net does not end in an activation (under the last step's name).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = int | tuple[int, int]
Unit = Literal["vector", "scalar"]
Values = Literal["pre", "post"]
Style = Literal["modules", "shared_inplace", "functional"]
Rule = Literal["right", "left", "midpoint", "trapezoid"]
INPUT = "input"

# ------------------------------------------------------------------------------------------------------------
# The description of a network
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Conv:
    name: str
    source: str
    weight: Tensor
    bias: Tensor | None = None
    stride: Pair = 1
    padding: Pair = 0
    dilation: Pair = 1
    groups: int = 1


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """Batch norm in eval mode: gamma * (x - mean) / sqrt(var + eps) + beta."""

    name: str
    source: str
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    eps: float = 1e-5

    @property
    def scale(self) -> Tensor:
        return self.gamma / torch.sqrt(self.var + self.eps)

    @property
    def shift(self) -> Tensor:
        return self.beta - self.mean * self.scale


@dataclass(frozen=True, eq=False)
class Activation:
    """kind: relu, leaky_relu, elu, silu, gelu, tanh or softplus (only softplus reads beta)."""

    name: str
    source: str
    kind: str = "relu"
    beta: float = 1.0


@dataclass(frozen=True, eq=False)
class MaxPool:
    name: str
    source: str
    kernel: Pair = 2
    stride: Pair = 2
    padding: Pair = 0


@dataclass(frozen=True, eq=False)
class AvgPool:
    """Padding counts in the mean, as torch does by default."""

    name: str
    source: str
    kernel: Pair = 2
    stride: Pair = 2
    padding: Pair = 0


@dataclass(frozen=True, eq=False)
class Add:
    name: str
    left: str
    right: str


@dataclass(frozen=True, eq=False)
class Concat:
    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class GlobalAvgPool:
    """(C, H, W) -> (C, 1, 1)."""

    name: str
    source: str


@dataclass(frozen=True, eq=False)
class Flatten:
    """(C, H, W) -> (C * H * W,)."""

    name: str
    source: str


@dataclass(frozen=True, eq=False)
class Linear:
    name: str
    source: str
    weight: Tensor
    bias: Tensor | None = None


Step = Conv | BatchNorm | Activation | MaxPool | AvgPool | Add | Concat | GlobalAvgPool | Flatten | Linear


@dataclass(frozen=True, eq=False)
class Graph:
    """Steps in call order; the last step's tensor is the output."""

    input_shape: tuple[int, int, int]
    steps: tuple[Step, ...]

    @property
    def output(self) -> str:
        return self.steps[-1].name

    @property
    def activations(self) -> tuple[str, ...]:
        return tuple(step.name for step in self.steps if isinstance(step, Activation))

    @property
    def layers(self) -> tuple[str, ...]:
        return (INPUT, *self.activations)

    @property
    def targets(self) -> tuple[str, ...]:
        if isinstance(self.steps[-1], Activation):
            return self.activations
        return (*self.activations, self.output)

    def step(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)

    def until(self, name: str) -> Graph:
        """The net cut off after the tensor `name`."""
        index = [step.name for step in self.steps].index(name)
        return Graph(self.input_shape, self.steps[: index + 1])


def sources_of(step: Step) -> tuple[str, ...]:
    if isinstance(step, Add):
        return (step.left, step.right)
    if isinstance(step, Concat):
        return step.parts
    return (step.source,)


def _activate(step: Activation, x: Tensor) -> Tensor:
    if step.kind == "softplus":
        return F.softplus(x, beta=step.beta)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "leaky_relu": F.leaky_relu,
        "elu": F.elu,
        "silu": F.silu,
        "gelu": F.gelu,
        "tanh": torch.tanh,
    }
    return functions[step.kind](x)


def forward(graph: Graph, x: Tensor) -> dict[str, Tensor]:
    """Every tensor of the net by name, ``"input"`` included, without a batch dimension."""
    values = {INPUT: x.double()}
    for step in graph.steps:
        operands = [values[name] for name in sources_of(step)]
        a = operands[0]
        match step:
            case Conv():
                out = F.conv2d(
                    a[None], step.weight, step.bias, step.stride, step.padding, step.dilation, step.groups
                )[0]
            case BatchNorm():
                out = step.scale[:, None, None] * a + step.shift[:, None, None]
            case Activation():
                out = _activate(step, a)
            case MaxPool():
                out = F.max_pool2d(a[None], step.kernel, step.stride, step.padding)[0]
            case AvgPool():
                out = F.avg_pool2d(a[None], step.kernel, step.stride, step.padding)[0]
            case Add():
                out = a + operands[1]
            case Concat():
                out = torch.cat(operands)
            case GlobalAvgPool():
                out = a.mean(dim=(1, 2), keepdim=True)
            case Flatten():
                out = a.flatten()
            case Linear():
                out = F.linear(a, step.weight, step.bias)
        values[step.name] = out
    return values


# ------------------------------------------------------------------------------------------------------------
# The same network as a torch module
# ------------------------------------------------------------------------------------------------------------


def _activation_module(step: Activation, inplace: bool) -> nn.Module:
    match step.kind:
        case "relu":
            return nn.ReLU(inplace=inplace)
        case "leaky_relu":
            return nn.LeakyReLU(inplace=inplace)
        case "elu":
            return nn.ELU(inplace=inplace)
        case "silu":
            return nn.SiLU(inplace=inplace)
        case "gelu":
            return nn.GELU()
        case "tanh":
            return nn.Tanh()
        case "softplus":
            return nn.Softplus(beta=step.beta)
    raise ValueError(f"unknown activation {step.kind!r}")


class Network(nn.Module):
    """A graph as a frozen float64 module in eval mode, taking and returning batches.

    Every convolution, batch norm and linear layer is the submodule named like its step. Activations and pools
    depend on the style: ``modules`` gives each its own submodule named like its step; ``shared_inplace``
    gives each kind of activation one in-place submodule ``shared_<kind>`` called many times (ResNet style,
    and ``+=`` for additions); ``functional`` gives them none.
    """

    def __init__(self, graph: Graph, style: Style) -> None:
        super().__init__()
        self.graph = graph
        self.style = style
        self.activation_calls = graph.activations
        for step in graph.steps:
            module = self._module(step)
            if module is not None:
                self.add_module(step.name, module)
            elif isinstance(step, Activation) and style == "shared_inplace":
                self._modules.setdefault(f"shared_{step.kind}", _activation_module(step, inplace=True))
        self.double().eval().requires_grad_(False)

    def _module(self, step: Step) -> nn.Module | None:
        module: nn.Module | None = None
        match step:
            case Conv(weight=weight, bias=bias):
                module = nn.Conv2d(
                    weight.shape[1] * step.groups,
                    weight.shape[0],
                    (weight.shape[2], weight.shape[3]),
                    step.stride,
                    step.padding,
                    step.dilation,
                    step.groups,
                    bias=bias is not None,
                ).double()
                state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
                module.load_state_dict(state)
            case BatchNorm():
                module = nn.BatchNorm2d(len(step.gamma), eps=step.eps).double()
                module.load_state_dict(
                    {
                        "weight": step.gamma,
                        "bias": step.beta,
                        "running_mean": step.mean,
                        "running_var": step.var,
                        "num_batches_tracked": torch.tensor(0),
                    }
                )
            case Linear(weight=weight, bias=bias):
                module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).double()
                module.load_state_dict(
                    {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
                )
            case Activation() if self.style == "modules":
                module = _activation_module(step, inplace=False)
            case MaxPool() if self.style != "functional":
                module = nn.MaxPool2d(step.kernel, step.stride, step.padding)
            case AvgPool() if self.style != "functional":
                module = nn.AvgPool2d(step.kernel, step.stride, step.padding)
        return module

    def _call(self, step: Step, operands: list[Tensor], may_overwrite: bool) -> Tensor:
        if step.name in self._modules:
            return self.get_submodule(step.name)(operands[0])
        a = operands[0]
        in_place = self.style == "shared_inplace"
        match step:
            case Activation():
                if in_place:
                    # A tensor that someone else reads too must not be overwritten.
                    return self.get_submodule(f"shared_{step.kind}")(a if may_overwrite else a.clone())
                return _activate(step, a)
            case MaxPool():
                return F.max_pool2d(a, step.kernel, step.stride, step.padding)
            case AvgPool():
                return F.avg_pool2d(a, step.kernel, step.stride, step.padding)
            case Add():
                if in_place and may_overwrite:
                    a += operands[1]
                    return a
                return a + operands[1]
            case Concat():
                return torch.cat(operands, dim=1)
            case GlobalAvgPool():
                return F.adaptive_avg_pool2d(a, 1)
            case Flatten():
                return torch.flatten(a, 1)
        raise TypeError(f"no rule for {step}")

    def _run(self, values: dict[str, Tensor], steps: Iterable[Step]) -> dict[str, Tensor]:
        readers: dict[str, int] = {}
        for step in self.graph.steps:
            for name in sources_of(step):
                readers[name] = readers.get(name, 0) + 1
        given = set(values)
        for step in steps:
            first = sources_of(step)[0]
            # Only what a convolution, batch norm or addition has just made is overwritten, as in published
            # code.
            overwrite = (
                first not in given
                and readers[first] == 1
                and isinstance(self.graph.step(first), Conv | BatchNorm | Add | Linear)
            )
            values[step.name] = self._call(step, [values[name] for name in sources_of(step)], overwrite)
        return values

    def forward(self, x: Tensor) -> Tensor:
        return self._run({INPUT: x}, self.graph.steps)[self.graph.output]

    def encode(self, x: Tensor, name: str) -> Tensor:
        """The tensor `name`, for a batch of images."""
        return self._run({INPUT: x}, self.graph.until(name).steps)[name]

    def head(self, features: Tensor, name: str) -> Tensor:
        """The output, from a batch of the tensor `name` on; nothing after it may read an earlier tensor."""
        after = self.graph.steps[[step.name for step in self.graph.steps].index(name) + 1 :]
        return self._run({name: features}, after)[self.graph.output]


def as_module(graph: Graph, style: Style = "modules") -> Network:
    return Network(graph, style)


# ------------------------------------------------------------------------------------------------------------
# Contributions: which part of a tensor came from which position of which layer
# ------------------------------------------------------------------------------------------------------------

# Contributions to one tensor t: for every source layer a tensor (P, *t.shape) whose entry p is the part of t
# that came from unit p of that layer. Units are positions (row-major) or, for unit="scalar", neurons
# (channel, row, column).
Parts = dict[str, Tensor]


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b with 0 / 0 := 0, and with nothing at all where b is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def _own(value: Tensor, unit: Unit) -> Tensor:
    """A layer's contributions to itself: copy p holds unit p alone, all else is zero."""
    if unit == "scalar":
        return torch.diag(value.flatten()).reshape(value.numel(), *value.shape)
    channels, height, width = value.shape
    parts = value.new_zeros(height * width, channels, height, width)
    for row in range(height):
        for column in range(width):
            parts[row * width + column, :, row, column] = value[:, row, column]
    return parts


def _share_of_pfv(part: Tensor, x: Tensor) -> Tensor:
    """(P, h, w): <c, x_i> / ||x_i||^2 at every position i, for every part c of the tensor x."""
    return _divide(torch.einsum("pchw,chw->phw", part, x), (x * x).sum(0))


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _sum_of_taps(x: Tensor, weight: Tensor, step: Conv) -> Tensor:
    """The linear part of a convolution, (P, C, H, W) -> (P, C', h, w), as a matrix on receptive fields."""
    (down, right), (top, side), (dy, dx) = (_pair(v) for v in (step.stride, step.padding, step.dilation))
    rows, columns = weight.shape[2:]
    height = (x.shape[2] + 2 * top - dy * (rows - 1) - 1) // down + 1
    width = (x.shape[3] + 2 * side - dx * (columns - 1) - 1) // right + 1
    # A grouped convolution's matrix is block diagonal.
    groups = x.shape[1] // weight.shape[1]
    matrix = torch.block_diag(*weight.flatten(1).chunk(groups))
    # A few contributions at a time: the fields of all of them would not fit into a cache.
    out = [
        matrix @ F.unfold(some, (rows, columns), step.dilation, step.padding, step.stride)
        for some in x.split(16)
    ]
    return torch.cat(out).reshape(len(x), len(weight), height, width)


def _through_conv(parts: Parts, x: Tensor, step: Conv, weight: Tensor, bias: Tensor | None) -> Parts:
    """Contributions behind a convolution with input x.

    The linear part sends a contribution through the weights. For the bias the backward form says

        s_j = <b, G_j> / sum_{k in RF_j} ||x_k||,      G_x_i += x_i / ||x_i|| * sum_{j: i in RF_j} s_j ,

    and a contribution c to x_i finally earns <c, G_x_i>. Its part owed to the bias of position j is thus

        <c, x_i> / ||x_i|| * <b, G_j> / sum_k ||x_k||
            =  < (b * ||x_i|| / sum_k ||x_k||) * (<c, x_i> / ||x_i||^2), G_j >

    in which the left factor is a vector at j: Eq. 11's share of x_i in the bias, of which c takes the same
    fraction that it has in x_i itself (its own sharing ratio, so the fractions over all c of one x_i sum to
    1). Where x_i is the activation's PFV, c = x_i and this is Eq. 11 as printed. The box of positions is the
    kernel's, with its stride and dilation; groups do not matter (a PFV spans all channels), and padded
    positions have norm 0.
    """
    box = torch.ones(1, 1, *weight.shape[2:], dtype=torch.float64)
    norm = x.norm(dim=0)
    field_norm = _sum_of_taps(norm[None, None], box, step)
    out = {}
    for layer, part in parts.items():
        out[layer] = _sum_of_taps(part, weight, step)
        if bias is not None:
            weighted = (_share_of_pfv(part, x) * norm)[:, None]
            share = _divide(_sum_of_taps(weighted, box, step), field_norm)
            out[layer] = out[layer] + bias[:, None, None] * share
    return out


def _through_batchnorm(parts: Parts, x: Tensor, scale: Tensor, shift: Tensor | None) -> Parts:
    """Batch norm by itself: a 1x1 affine map, whose shift belongs to the one PFV it is added to."""
    out = {}
    for layer, part in parts.items():
        out[layer] = scale[:, None, None] * part
        if shift is not None:
            out[layer] = out[layer] + shift[:, None, None] * _share_of_pfv(part, x)[:, None]
    return out


def _through_maxpool(parts: Parts, x: Tensor, step: MaxPool) -> Parts:
    """Eq. 12: only the winners' contributions pass."""
    pooled, winners = F.max_pool2d(x[None], step.kernel, step.stride, step.padding, return_indices=True)
    out = {}
    for layer, part in parts.items():
        index = winners.flatten(2).expand(len(part), -1, -1)
        out[layer] = part.flatten(2).gather(2, index).reshape(len(part), *pooled.shape[1:])
    return out


def _sum_parts(left: Parts, right: Parts) -> Parts:
    out = dict(left)
    for layer, part in right.items():
        out[layer] = out[layer] + part if layer in out else part
    return out


def _concat_parts(operands: list[Parts], values: list[Tensor]) -> Parts:
    out = {}
    for layer in dict.fromkeys(layer for parts in operands for layer in parts):
        units = next(len(parts[layer]) for parts in operands if layer in parts)
        blocks = [
            parts.get(layer, value.new_zeros(units, *value.shape))
            for parts, value in zip(operands, values, strict=True)
        ]
        out[layer] = torch.cat(blocks, dim=1)
    return out


def _propagate(
    graph: Graph,
    values: dict[str, Tensor],
    begin: Callable[[Tensor], Tensor],
    *,
    bias_shares: bool,
    positive: bool = False,
) -> dict[str, Parts]:
    """Carry each layer's units through the affine steps up to the next targets.

    begin makes a layer's contributions to itself; positive replaces every weight (batch norm folded first) by
    its positive part.
    """

    def part_of(weight: Tensor) -> Tensor:
        return weight.clamp(min=0) if positive else weight

    reached: dict[str, Parts] = {INPUT: {INPUT: begin(values[INPUT])}}
    targets: dict[str, Parts] = {}
    for step in graph.steps:
        operands = [reached[name] for name in sources_of(step)]
        x = values[sources_of(step)[0]]
        parts = operands[0]
        match step:
            case Activation():
                targets[step.name] = parts
                out = {step.name: begin(values[step.name])}
            case Conv():
                out = _through_conv(parts, x, step, part_of(step.weight), step.bias if bias_shares else None)
            case BatchNorm():
                maker = None if step.source == INPUT else graph.step(step.source)
                if isinstance(maker, Conv):
                    # Folded: one convolution with scaled weights, whose bias is shared through its receptive
                    # field.
                    weight = maker.weight * step.scale[:, None, None, None]
                    bias = step.shift if maker.bias is None else step.shift + step.scale * maker.bias
                    out = _through_conv(
                        reached[maker.source],
                        values[maker.source],
                        maker,
                        part_of(weight),
                        bias if bias_shares else None,
                    )
                else:
                    out = _through_batchnorm(
                        parts, x, part_of(step.scale), step.shift if bias_shares else None
                    )
            case MaxPool():
                out = _through_maxpool(parts, x, step)
            case AvgPool():
                out = {k: F.avg_pool2d(p, step.kernel, step.stride, step.padding) for k, p in parts.items()}
            case Add():
                out = _sum_parts(parts, operands[1])
            case Concat():
                out = _concat_parts(operands, [values[name] for name in step.parts])
            case GlobalAvgPool():
                out = {k: p.mean(dim=(2, 3), keepdim=True) for k, p in parts.items()}
            case Flatten():
                out = {k: p.flatten(1) for k, p in parts.items()}
            case Linear():
                if bias_shares:
                    raise ValueError("SRD ends where the linear head begins")
                out = {k: F.linear(p, part_of(step.weight)) for k, p in parts.items()}
        reached[step.name] = out
    if graph.output not in targets:
        targets[graph.output] = reached[graph.output]
    return targets


def contributions(graph: Graph, x: Tensor, *, unit: Unit = "vector") -> dict[str, Parts]:
    """vhat_{i->j}: target -> source layer -> (units of the source, C, h, w).

    For unit="scalar" a bias (or a batch norm's shift) takes part in no share.
    """
    values = forward(graph, x)
    return _propagate(graph, values, lambda value: _own(value, unit), bias_shares=unit == "vector")


# ------------------------------------------------------------------------------------------------------------
# SRD
# ------------------------------------------------------------------------------------------------------------


def _target_value(graph: Graph, values: dict[str, Tensor], target: str) -> Tensor:
    """u: the tensor which the contributions to this target make up."""
    step = graph.step(target)
    return values[step.source if isinstance(step, Activation) else target]


def _reference_value(graph: Graph, values: dict[str, Tensor], target: str, mode: Values) -> Tensor:
    """The vector that contributions are projected on: u, or for values="post" the activation v."""
    return _target_value(graph, values, target) if mode == "pre" else values[target]


def all_ratios(
    graph: Graph, x: Tensor, *, unit: Unit = "vector", values: Values = "pre"
) -> dict[str, dict[str, Tensor]]:
    """Direct sharing ratios mu: target -> source layer -> (units of the source, units of the target).

    For vectors <vhat, u> / ||u||^2, for neurons the same of vectors with one entry: vhat / u. 0 / 0 := 0.
    """
    tensors = forward(graph, x)
    ratios: dict[str, dict[str, Tensor]] = {}
    for target, parts in contributions(graph, x, unit=unit).items():
        reference = _reference_value(graph, tensors, target, values)
        ratios[target] = {}
        for layer, part in parts.items():
            ratio = _share_of_pfv(part, reference) if unit == "vector" else _divide(part, reference)
            ratios[target][layer] = ratio.flatten(1)
    return ratios


def srd(
    graph: Graph, x: Tensor, start: Tensor, *, unit: Unit = "vector", values: Values = "pre"
) -> dict[str, Tensor]:
    """Relevance of every layer, one number per position: ``{"input": (H, W), activation name: (h, w), ...}``.

    start is the relevance at the positions of the last tensor. With unit="scalar" the neurons of a position
    receive it in proportion to the square of their value in the reference vector (so that both units begin
    with the same signal u R / ||u||^2), and the neurons' relevance is summed over channels in the result.
    """
    tensors = forward(graph, x)
    ratios = all_ratios(graph, x, unit=unit, values=values)
    relevance: dict[str, Tensor] = {}
    for layer in graph.layers:
        shape = tensors[layer].shape[1:] if unit == "vector" else tensors[layer].shape
        relevance[layer] = torch.zeros(shape, dtype=torch.float64)
    start = start.double()
    injected = start
    if unit == "scalar":
        reference = _reference_value(graph, tensors, graph.output, values)
        injected = start * _divide(reference**2, (reference**2).sum(0))
    for target in reversed(graph.targets):
        received = injected if target == graph.output else relevance[target]
        for layer, ratio in ratios[target].items():
            passed = ratio @ received.flatten()
            relevance[layer] = relevance[layer] + passed.reshape(relevance[layer].shape)
    if unit == "scalar":
        relevance = {layer: r.sum(0) for layer, r in relevance.items()}
    if graph.output in relevance:
        relevance[graph.output] = start
    return relevance


def unshared(graph: Graph, x: Tensor, *, values: Values = "pre") -> dict[str, Tensor]:
    """What dead receptive fields (and dead PFVs) absorb: target -> (h, w), one minus the sum of the ratios
    into it."""
    tensors = forward(graph, x)
    out = {}
    for target, ratios in all_ratios(graph, x, values=values).items():
        shape = _target_value(graph, tensors, target).shape[1:]
        total = torch.zeros(shape, dtype=torch.float64)
        for ratio in ratios.values():
            total = total + ratio.sum(0).reshape(shape)
        out[target] = 1 - total
    return out


def sharing_ratios(
    graph: Graph,
    x: Tensor,
    source: str,
    target: str,
    *,
    paths: Literal["direct", "all"] = "direct",
    values: Values = "pre",
) -> Tensor:
    """(positions of the source layer, positions of the target), both row-major.

    direct: mu of Eq. 6, zero unless only affine steps lie between. all: summed over all trajectories of such
    steps (Eq. 17), which is the relevance at the source when a single 1 is put at a position of the target.
    """
    tensors = forward(graph, x)
    ratios = all_ratios(graph, x, values=values)
    positions = {name: tensors[name][0].numel() for name in (*graph.layers, graph.output)}
    if paths == "direct":
        zero = torch.zeros(positions[source], positions[target], dtype=torch.float64)
        return ratios[target].get(source, zero)
    # total[k] = the ratios from the source to layer k: over the last hop, sum_l total[l] @ mu_{l->k}.
    total = {source: torch.eye(positions[source], dtype=torch.float64)}
    order = (*graph.layers, *(() if graph.output in graph.layers else (graph.output,)))
    for name in order[order.index(source) + 1 :]:
        total[name] = torch.zeros(positions[source], positions[name], dtype=torch.float64)
        for layer, ratio in ratios[name].items():
            if layer in total:
                total[name] = total[name] + total[layer] @ ratio
    return total[target]


def forward_erfs(graph: Graph, x: Tensor, *, values: Values = "pre") -> dict[str, Tensor]:
    """Effective receptive fields built forwards by Eq. 1 and 2: layer or last tensor -> (h * w, H, W)."""
    _, height, width = graph.input_shape
    fields = {INPUT: torch.eye(height * width, dtype=torch.float64).reshape(-1, height, width)}
    for target, ratios in all_ratios(graph, x, values=values).items():
        positions = next(iter(ratios.values())).shape[1]
        field = torch.zeros(positions, height, width, dtype=torch.float64)
        for layer, ratio in ratios.items():
            field = field + torch.einsum("ij,ihw->jhw", ratio, fields[layer])
        fields[target] = field
    return fields


# ------------------------------------------------------------------------------------------------------------
# LRP: z+ above, z^B at the input
# ------------------------------------------------------------------------------------------------------------


def _basis(value: Tensor) -> Tensor:
    return torch.eye(value.numel(), dtype=torch.float64).reshape(-1, *value.shape)


def affine_matrices(graph: Graph, x: Tensor, *, positive: bool = False) -> dict[str, Parts]:
    """Dense matrices between activations: target -> source layer -> (source neurons, target neurons), no
    biases.

    Max-pool winners are those of x. positive=True takes the positive part of every convolution, linear layer
    or batch norm by itself (a batch norm behind a convolution folded first) and multiplies the results.
    """
    targets = _propagate(graph, forward(graph, x), _basis, bias_shares=False, positive=positive)
    return {t: {layer: part.flatten(1) for layer, part in parts.items()} for t, parts in targets.items()}


def lrp_zplus(graph: Graph, x: Tensor, target: int, low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """Relevance of every neuron: ``{"input": (C, H, W), activation name: its shape, ...}``.

    graph ends in logits; relevance starts as the logit of class `target`. Between activations the z+ rule,

        R_i = sum_j x_i W_ij^+ / (sum_i' x_i' W_i'j^+) R_j ,

    and for what comes from the input z^B, with x_i W_ij^+ replaced by x_i w_ij - l_i w_ij^+ - h_i w_ij^-. All
    sources of a neuron j stand in one denominator; biases take no part. low and high broadcast to the input.
    At the input w^+ and w^- are parts of the composed map from the input to the first activations.
    """
    for name in graph.activations:
        step = graph.step(name)
        if isinstance(step, Activation) and step.kind not in ("relu", "softplus"):
            raise ValueError(f"z+ needs activations that are never negative, not {step.kind}")
    tensors = forward(graph, x)
    exact = affine_matrices(graph, x)
    nonnegative = affine_matrices(graph, x, positive=True)
    relevance = {layer: torch.zeros_like(tensors[layer]) for layer in graph.layers}
    pixels = tensors[INPUT].flatten()[:, None]
    lowest = low.double().expand(graph.input_shape).flatten()[:, None]
    highest = high.double().expand(graph.input_shape).flatten()[:, None]
    logits = tensors[graph.output]
    for name in reversed(graph.targets):
        if name == graph.output:
            received = torch.zeros_like(logits)
            received[target] = logits[target]
        else:
            received = relevance[name]
        shares = {}
        for layer in exact[name]:
            if layer == INPUT:
                w = exact[name][layer]
                shares[layer] = pixels * w - lowest * w.clamp(min=0) - highest * w.clamp(max=0)
            else:
                shares[layer] = tensors[layer].flatten()[:, None] * nonnegative[name][layer]
        denominator = torch.zeros(received.numel(), dtype=torch.float64)
        for share in shares.values():
            denominator = denominator + share.sum(0)
        for layer, share in shares.items():
            passed = share @ _divide(received.flatten(), denominator)
            relevance[layer] = relevance[layer] + passed.reshape(relevance[layer].shape)
    return relevance


# ------------------------------------------------------------------------------------------------------------
# Gradient methods (these are defined by gradients, so autograd gives them; the sums are written out)
# ------------------------------------------------------------------------------------------------------------


def _class_gradient(model: Callable[[Tensor], Tensor], x: Tensor, target: int) -> Tensor:
    leaf = x[None].detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(leaf)[0, target], leaf)
    return gradient[0]


def integrated_gradients(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    target: int,
    *,
    baseline: Tensor | None = None,
    steps: int = 30,
    rule: Rule = "right",
) -> Tensor:
    """(C, H, W): (x - x0) times the mean gradient on the line from x0, zero by default, one step at a
    time."""
    origin = torch.zeros_like(x) if baseline is None else baseline
    match rule:
        case "right":
            nodes = [((k + 1) / steps, 1 / steps) for k in range(steps)]
        case "left":
            nodes = [(k / steps, 1 / steps) for k in range(steps)]
        case "midpoint":
            nodes = [((k + 0.5) / steps, 1 / steps) for k in range(steps)]
        case "trapezoid":
            nodes = [(k / steps, (0.5 if k in (0, steps) else 1) / steps) for k in range(steps + 1)]
    total = torch.zeros_like(x)
    for position, weight in nodes:
        total = total + weight * _class_gradient(model, origin + position * (x - origin), target)
    return (x - origin) * total


def gradcam_start(
    features: Tensor,
    head: Callable[[Tensor], Tensor],
    target: int,
    *,
    mode: Literal["contrastive", "gradcam"] = "contrastive",
) -> Tensor:
    """(h, w): Eq. 4 with its K backward passes, max(Phi^c - mean_k Phi^k, 0); mode="gradcam" leaves out the
    mean.

    features is one encoder output (C, h, w); head maps a batch of them to a batch of logits.
    """
    classes = head(features[None]).shape[1]
    maps = []
    for k in range(classes):
        alpha = _class_gradient(head, features, k).mean(dim=(1, 2))
        maps.append((alpha[:, None, None] * features).sum(0))
    phi = maps[target]
    if mode == "contrastive":
        phi = phi - torch.stack(maps).mean(0)
    return phi.clamp(min=0)


# ------------------------------------------------------------------------------------------------------------
# Toy networks
# ------------------------------------------------------------------------------------------------------------


class _Builder:
    """Draws seeded weights and keeps track of channel numbers; each method returns the new tensor's name."""

    def __init__(self, input_shape: tuple[int, int, int], seed: int) -> None:
        self.input_shape = input_shape
        self.random = torch.Generator().manual_seed(seed)
        self.steps: list[Step] = []
        self.channels = {INPUT: input_shape[0]}

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64)

    def _push(self, step: Step, channels: int) -> str:
        self.steps.append(step)
        self.channels[step.name] = channels
        return step.name

    def conv(
        self,
        name: str,
        source: str,
        out: int,
        kernel: Pair = 3,
        *,
        bias: bool = True,
        stride: Pair = 1,
        padding: Pair = 1,
        dilation: Pair = 1,
        groups: int = 1,
    ) -> str:
        rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
        fan_in = self.channels[source] // groups
        weight = self.draw(out, fan_in, rows, columns) * (2 / (fan_in * rows * columns)) ** 0.5
        offset = 0.3 * self.draw(out) if bias else None
        return self._push(Conv(name, source, weight, offset, stride, padding, dilation, groups), out)

    def norm(self, name: str, source: str) -> str:
        n = self.channels[source]
        # An eps large enough that leaving it out anywhere shows.
        return self._push(
            BatchNorm(
                name,
                source,
                gamma=1 + 0.4 * self.draw(n),
                beta=0.4 * self.draw(n),
                mean=0.3 * self.draw(n),
                var=0.4 + self.draw(n).abs(),
                eps=1e-2,
            ),
            n,
        )

    def act(self, name: str, source: str, kind: str = "relu", beta: float = 1.0) -> str:
        return self._push(Activation(name, source, kind, beta), self.channels[source])

    def max_pool(self, name: str, source: str, kernel: Pair = 2, stride: Pair = 2, padding: Pair = 0) -> str:
        return self._push(MaxPool(name, source, kernel, stride, padding), self.channels[source])

    def avg_pool(self, name: str, source: str, kernel: Pair = 2, stride: Pair = 2, padding: Pair = 0) -> str:
        return self._push(AvgPool(name, source, kernel, stride, padding), self.channels[source])

    def add(self, name: str, left: str, right: str) -> str:
        return self._push(Add(name, left, right), self.channels[left])

    def concat(self, name: str, *parts: str) -> str:
        return self._push(Concat(name, parts), sum(self.channels[part] for part in parts))

    def conv_norm(
        self,
        name: str,
        source: str,
        out: int,
        kernel: Pair = 3,
        *,
        bias: bool = False,
        stride: Pair = 1,
        padding: Pair = 1,
    ) -> str:
        made = self.conv(f"conv_{name}", source, out, kernel, bias=bias, stride=stride, padding=padding)
        return self.norm(f"bn_{name}", made)

    def graph(self) -> Graph:
        return Graph(self.input_shape, tuple(self.steps))


def _vgg(bias: bool) -> Graph:
    b = _Builder((3, 12, 12), seed=1)
    t = b.act("relu1", b.conv("conv1", INPUT, 4, bias=bias))
    t = b.act("relu2", b.conv("conv2", t, 5, bias=bias))
    t = b.max_pool("pool1", t)
    t = b.act("relu3", b.conv("conv3", t, 6, bias=bias))
    t = b.act("relu4", b.conv("conv4", t, 5, bias=bias))
    b.max_pool("pool2", t)
    return b.graph()


def _residual() -> Graph:
    """Stem with an overlapping pool, a block with identity branch, one with a strided projection branch."""
    b = _Builder((3, 12, 12), seed=2)
    t = b.act("relu_stem", b.conv_norm("stem", INPUT, 5))
    block = b.max_pool("pool_stem", t, 3, 2, 1)
    t = b.act("relu_a1", b.conv_norm("a1", block, 5))
    t = b.conv_norm("a2", t, 5)
    block = b.act("relu_a2", b.add("sum_a", t, block))
    t = b.act("relu_b1", b.conv_norm("b1", block, 4, stride=2))
    t = b.conv_norm("b2", t, 6, bias=True)
    side = b.conv_norm("side", block, 6, 1, stride=2, padding=0)
    b.act("relu_b2", b.add("sum_b", t, side))
    return b.graph()


def _inception() -> Graph:
    b = _Builder((3, 10, 10), seed=338)
    stem = b.act("relu_stem", b.conv_norm("stem", INPUT, 4, stride=2))
    left = b.act("relu_left", b.conv_norm("left", stem, 3, 1, padding=0))
    right = b.act("relu_right1", b.conv_norm("right1", stem, 3, (1, 3), padding=(0, 1)))
    right = b.act("relu_right2", b.conv_norm("right2", right, 3, (3, 1), padding=(1, 0)))
    pooled = b.avg_pool("pool", stem, 3, 1, 1)  # joins without an activation of its own
    t = b.concat("joined", left, right, pooled)
    b.act("relu_out", b.conv_norm("out", t, 5))
    return b.graph()


def _geometry() -> Graph:
    b = _Builder((4, 11, 12), seed=4)
    t = b.act("relu1", b.conv("strided", INPUT, 6, 3, stride=2, padding=1))
    t = b.act("relu2", b.conv("dilated", t, 6, 3, dilation=2, padding=2))
    t = b.act("relu3", b.conv("grouped", t, 4, 3, groups=2, padding=(1, 0)))
    t = b.act("relu4", b.conv("depthwise", t, 4, (3, 2), groups=4, stride=(1, 2), dilation=(2, 1)))
    b.act("relu5", b.conv("pointwise", t, 5, 1, padding=0))
    return b.graph()


def _preactivation() -> Graph:
    """bn -> relu -> conv blocks: batch norm stands on a pooled map, behind convolutions, and on sums."""
    b = _Builder((3, 8, 8), seed=5)
    skip = b.max_pool("pool_in", b.act("relu_in", b.conv("conv_in", INPUT, 4)), 3, 1, 1)
    t = b.act("relu1", b.norm("bn1", skip))
    t = b.conv("conv1", t, 4)
    t = b.act("relu2", b.norm("bn2", t))
    t = b.conv("conv2", t, 4)
    skip = b.add("sum1", t, skip)
    t = b.act("relu3", b.norm("bn3", skip))
    t = b.conv("conv3", t, 4)
    t = b.norm("bn4", b.add("sum2", t, skip))
    t = b.act("relu4", t)
    b.avg_pool("pool_out", t)
    return b.graph()


def _conv_read_twice() -> Graph:
    """A convolution's output goes both into batch norm (where it is folded) and past it."""
    b = _Builder((3, 8, 8), seed=12)
    skip = b.conv("conv_in", INPUT, 4)
    t = b.act("relu1", b.norm("bn1", skip))
    t = b.conv("conv1", t, 4)
    b.act("relu2", b.add("sum", t, skip))
    return b.graph()


def _dense() -> Graph:
    """Features are concatenated, and batch norm stands on the concatenation (DenseNet)."""
    b = _Builder((3, 8, 8), seed=6)
    t = b.act("relu0", b.conv_norm("stem", INPUT, 3))
    kept = b.max_pool("pool", t)
    grown = b.conv("conv1", b.act("relu1", b.norm("bn1", kept)), 3, bias=False)
    kept = b.concat("cat1", kept, grown)
    grown = b.conv("conv2", b.act("relu2", b.norm("bn2", kept)), 2, bias=False)
    kept = b.concat("cat2", kept, grown)
    b.act("relu3", b.norm("bn3", kept))
    return b.graph()


def _non_square() -> Graph:
    b = _Builder((2, 6, 10), seed=7)
    t = b.act("relu1", b.conv("conv1", INPUT, 5))
    t = b.max_pool("pool1", t, (2, 3), (1, 2))
    b.act("relu2", b.conv("conv2", t, 4, (3, 1), padding=(1, 0)))
    return b.graph()


def _pooled_input() -> Graph:
    b = _Builder((3, 11, 9), seed=8)
    t = b.max_pool("pool0", INPUT, 3, 2, 1)
    t = b.act("relu1", b.conv("conv1", t, 5))
    t = b.conv("conv2", t, 5)
    t = b.max_pool("pool2", t, 3, 1, 1)  # between convolution and activation
    t = b.act("relu2", t)
    b.act("relu3", b.conv("conv3", t, 4))
    return b.graph()


def _average_pool() -> Graph:
    b = _Builder((3, 8, 8), seed=9)
    t = b.act("relu1", b.conv("conv1", INPUT, 5))
    t = b.avg_pool("pool1", t, 3, 2, 1)
    t = b.act("relu2", b.conv("conv2", t, 5))
    t = b.act("relu3", b.conv("conv3", t, 4))
    b.avg_pool("pool2", t)
    return b.graph()


def _conv_conv() -> Graph:
    """Convolutions without an activation between them: the second one's own input is an intermediate
    tensor."""
    b = _Builder((3, 8, 8), seed=10)
    t = b.act("relu1", b.conv("conv1b", b.conv("conv1a", INPUT, 4), 5))
    t = b.conv("conv2a", t, 4, stride=2)
    t = b.conv_norm("2b", t, 5, bias=True)
    t = b.act("relu2", t)
    b.act("relu3", b.conv("conv3", t, 4))
    return b.graph()


def _dead_field() -> Graph:
    """All PFVs of the first layer are zero on the right where toy_input is blank, also under the max pool."""
    b = _Builder((2, 8, 10), seed=11)
    made = b.conv("conv1", INPUT, 4)
    first = b.steps[-1]
    assert isinstance(first, Conv)
    b.steps[-1] = replace(first, bias=torch.full((4,), -0.3, dtype=torch.float64))
    t = b.act("relu1", made)
    t = b.max_pool("pool1", t)
    t = b.act("relu2", b.conv("conv2", t, 4))
    b.act("relu3", b.conv("conv3", t, 5, bias=False))
    return b.graph()


def toy_graphs() -> dict[str, Graph]:
    """Seeded toy networks by name; all ReLU. Use with_activation for the rest and with_head for
    classifiers."""
    return {
        "vgg_bias": _vgg(bias=True),
        "vgg_nobias": _vgg(bias=False),
        "residual": _residual(),
        "inception": _inception(),
        "geometry": _geometry(),
        "preactivation": _preactivation(),
        "conv_read_twice": _conv_read_twice(),
        "dense": _dense(),
        "non_square": _non_square(),
        "pooled_input": _pooled_input(),
        "average_pool": _average_pool(),
        "conv_conv": _conv_conv(),
        "dead_field": _dead_field(),
    }


# Those in which every layer hears from the one before it only, so that each holds the whole relevance.
SEQUENTIAL = (
    "vgg_bias",
    "vgg_nobias",
    "geometry",
    "non_square",
    "pooled_input",
    "average_pool",
    "conv_conv",
)


def toy_input(graph: Graph, seed: int = 0) -> Tensor:
    """One float64 image (C, H, W). Its right half is zero for the dead-field net (10 wide, 2 channels, 8
    high)."""
    image = torch.randn(
        graph.input_shape, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64
    )
    if graph.input_shape == (2, 8, 10):
        image[:, :, 5:] = 0
    return image


def toy_start(graph: Graph, seed: int = 0) -> Tensor:
    """Positive relevance at the positions of the last tensor, float64 (h, w)."""
    shape = forward(graph, toy_input(graph))[graph.output].shape[1:]
    return torch.rand(shape, generator=torch.Generator().manual_seed(2000 + seed), dtype=torch.float64) + 0.1


def with_activation(graph: Graph, kind: str, beta: float = 1.0) -> Graph:
    """The same net with another activation everywhere, names unchanged."""
    steps = tuple(
        replace(step, kind=kind, beta=beta) if isinstance(step, Activation) else step for step in graph.steps
    )
    return Graph(graph.input_shape, steps)


def with_head(graph: Graph, kind: Literal["gap", "mlp"], classes: int = 5, seed: int = 0) -> Graph:
    """The encoder followed by a classifier: global average pool + linear, or flatten + linear + relu +
    linear."""
    features = forward(graph, toy_input(graph))[graph.output]
    random = torch.Generator().manual_seed(3000 + seed)

    def linear(name: str, source: str, wide: int, out: int) -> Linear:
        weight = torch.randn(out, wide, generator=random, dtype=torch.float64) * (2 / wide) ** 0.5
        bias = 0.1 * torch.randn(out, generator=random, dtype=torch.float64)
        return Linear(name, source, weight, bias)

    if kind == "gap":
        extra: tuple[Step, ...] = (
            GlobalAvgPool("head_pool", graph.output),
            Flatten("head_flat", "head_pool"),
            linear("logits", "head_flat", len(features), classes),
        )
    else:
        extra = (
            Flatten("head_flat", graph.output),
            linear("head_fc", "head_flat", features.numel(), 7),
            Activation("head_relu", "head_fc"),
            linear("logits", "head_relu", 7, classes),
        )
    return Graph(graph.input_shape, graph.steps + extra)
