"""LRP's epsilon and gamma rules and excitation backprop, literally: one dense matrix from every neuron of every layer to
every neuron that it reaches, with biases as one more neuron. The networks are those of tests/reference.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import reference as ref
import torch
import torch.nn.functional as F
from torch import Tensor

BIAS = "bias"
Modify = Callable[[Tensor], Tensor]
Relevance = dict[str, Tensor]


def positive(weight: Tensor) -> Tensor:
    return weight.clamp(min=0)


def favoured(gamma: float) -> Modify:
    return lambda weight: weight + gamma * weight.clamp(min=0)


def as_it_is(weight: Tensor) -> Tensor:
    return weight


def matrices(graph: ref.Graph, x: Tensor, modify: Modify, exact_at_input: bool) -> dict[str, ref.Parts]:
    """target -> layer -> (neurons of the layer, neurons of the target): products of modified weights. The layer "bias" has
    one neuron, which holds 1.

    exact_at_input : what comes from the image passes the weights as they are, and biases of layers that see the image
        alone are left out (z^B).
    """
    values = ref.forward(graph, x)
    reached: dict[str, ref.Parts] = {ref.INPUT: {ref.INPUT: ref._basis(values[ref.INPUT])}}
    targets: dict[str, ref.Parts] = {}

    def through(
        parts: ref.Parts, weight: Tensor, bias: Tensor | None, apply: Callable[..., Tensor]
    ) -> ref.Parts:
        exact = [ref.INPUT] if exact_at_input else []
        out = {layer: apply(p, weight if layer in exact else modify(weight)) for layer, p in parts.items()}
        if bias is not None and not set(parts) <= set(exact):
            shape = next(iter(out.values())).shape[1:]
            added = modify(bias).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)[None]
            out[BIAS] = out.get(BIAS, 0) + added
        return out

    for step in graph.steps:
        operands = [reached[name] for name in ref.sources_of(step)]
        parts = operands[0]
        match step:
            case ref.Activation():
                targets[step.name] = parts
                out = {step.name: ref._basis(values[step.name])}
            case ref.Conv():
                out = through(parts, step.weight, step.bias, lambda p, w, s=step: ref._sum_of_taps(p, w, s))
            case ref.BatchNorm():
                maker = None if step.source == ref.INPUT else graph.step(step.source)
                if isinstance(maker, ref.Conv):
                    weight = maker.weight * step.scale[:, None, None, None]
                    bias = step.shift if maker.bias is None else step.shift + step.scale * maker.bias
                    out = through(
                        reached[maker.source], weight, bias, lambda p, w, s=maker: ref._sum_of_taps(p, w, s)
                    )
                else:
                    out = through(parts, step.scale, step.shift, lambda p, w: w[:, None, None] * p)
            case ref.Linear():
                out = through(parts, step.weight, step.bias, F.linear)
            case ref.MaxPool():
                out = ref._through_maxpool(parts, values[step.source], step)
            case ref.AvgPool():
                out = {k: F.avg_pool2d(p, step.kernel, step.stride, step.padding) for k, p in parts.items()}
            case ref.Add():
                out = ref._sum_parts(parts, operands[1])
            case ref.Concat():
                out = ref._concat_parts(operands, [values[name] for name in step.parts])
            case ref.GlobalAvgPool():
                out = {k: p.mean(dim=(2, 3), keepdim=True) for k, p in parts.items()}
            case ref.Flatten():
                out = {k: p.flatten(1) for k, p in parts.items()}
        reached[step.name] = out
    targets.setdefault(graph.output, reached[graph.output])
    return {t: {layer: part.flatten(1) for layer, part in parts.items()} for t, parts in targets.items()}


def _passed(
    graph: ref.Graph,
    x: Tensor,
    starts: dict[str, Tensor],
    shares: Callable[[str], dict[str, Tensor]],
    skip: str = "",
) -> Relevance:
    """Relevance of every layer, target by target backwards: R_i = sum_j (share_ij / whole_j) R_j; the whole is under the
    name "" where it is not the sum of the shares. ``starts`` is added to what layers receive."""
    tensors = ref.forward(graph, x)
    found = {layer: torch.zeros_like(tensors[layer]) for layer in graph.layers}
    for name, start in starts.items():
        found[name] = found.get(name, 0) + start
    for target in reversed(graph.targets):
        if target == skip:
            continue
        given = shares(target)
        whole = given.pop("") if "" in given else sum(share.sum(0) for share in given.values())
        for layer, share in given.items():
            if layer != BIAS:
                passed = share @ ref._divide(found[target].flatten(), whole)
                found[layer] = found[layer] + passed.reshape(found[layer].shape)
    return found


def _one(graph: ref.Graph, x: Tensor, target: int, value: float | None = None) -> Tensor:
    logits = ref.forward(graph, x)[graph.output]
    start = torch.zeros_like(logits)
    start[target] = logits[target] if value is None else value
    return start


def epsilon(graph: ref.Graph, x: Tensor, target: int, eps: float) -> Relevance:
    """R_i = sum_j x_i w_ij / (u_j + eps sign u_j) R_j, sign 0 = 1; u_j with its bias."""
    tensors, dense = ref.forward(graph, x), matrices(graph, x, as_it_is, False)

    def shares(name: str) -> dict[str, Tensor]:
        step = graph.step(name)
        u = tensors[step.source if isinstance(step, ref.Activation) else name].flatten()
        out = {
            layer: tensors[layer].flatten()[:, None] * m for layer, m in dense[name].items() if layer != BIAS
        }
        return {**out, "": u + eps * torch.where(u >= 0, 1.0, -1.0).double()}

    return _passed(graph, x, {graph.output: _one(graph, x, target)}, shares)


def _of_modified(
    graph: ref.Graph, x: Tensor, modify: Modify, low: Tensor, high: Tensor, with_bias: bool
) -> Callable[[str], dict[str, Tensor]]:
    """x_i w~_ij above, z^B where i is a pixel, and what biases have."""
    tensors, dense = ref.forward(graph, x), matrices(graph, x, modify, True)

    def shares(name: str) -> dict[str, Tensor]:
        out = {}
        for layer, m in dense[name].items():
            if layer == ref.INPUT:
                ends = (tensors[layer], low, high)
                here, bottom, top = (t.flatten()[:, None] for t in ends)
                out[layer] = here * m - bottom * m.clamp(min=0) - top * m.clamp(max=0)
            elif layer != BIAS:
                out[layer] = tensors[layer].flatten()[:, None] * m
            elif with_bias:
                out[layer] = m
        return out

    return shares


def gamma(graph: ref.Graph, x: Tensor, target: int, low: Tensor, high: Tensor, favour: float) -> Relevance:
    """R_i = sum_j x_i w~_ij / (sum_k x_k w~_kj + b~_j) R_j, w~ = w + gamma w^+ and b~ likewise; z^B at the pixels."""
    shares = _of_modified(graph, x, favoured(favour), low, high, True)
    return _passed(graph, x, {graph.output: _one(graph, x, target)}, shares)


def excitation(
    graph: ref.Graph, x: Tensor, target: int, low: Tensor, high: Tensor, contrastive: bool = False
) -> Relevance:
    """Marginal winning probabilities, from 1 at the class. Contrastive: minus those of the network whose last layer's
    weights have the other sign, from that layer down; negative numbers are kept here."""
    shares = _of_modified(graph, x, positive, low, high, False)
    one = _one(graph, x, target, 1.0)
    if not contrastive:
        return _passed(graph, x, {graph.output: one}, shares)
    last = graph.steps[-1]
    assert isinstance(last, ref.Linear)
    other = ref.Graph(graph.input_shape, (*graph.steps[:-1], replace(last, weight=-last.weight)))
    starts: dict[str, Tensor] = {}
    tensors = ref.forward(graph, x)
    for sign, network in ((1, graph), (-1, other)):
        for layer, share in _of_modified(network, x, positive, low, high, False)(graph.output).items():
            passed = share @ ref._divide(one, share.sum(0))
            starts[layer] = starts.get(layer, 0) + sign * passed.reshape(tensors[layer].shape)
    return _passed(graph, x, starts, shares, skip=graph.output)
