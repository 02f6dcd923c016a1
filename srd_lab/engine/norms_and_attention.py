"""Normalisations that depend on the input, and attention: affine once a statistic or the weights count as constants.

- A normalisation ``(x - mean(x)) * s(x) * w + b``: the scale s is constant, the centring is linear and stays, and the
  shift b belongs to the one vector at its position, as in a batch norm that follows no convolution.
- Attention ``softmax(q k^T) v``: the weights are constant, so that nothing passes through queries and keys.

Constant in the live pass alone: the values and every ordinary derivative are those of torch. Each function here takes what
torch's own of that name takes, after the trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from srd_lab.engine.channels import Channels
from srd_lab.engine.spellings import Function


class Trace(Protocol):
    """What a forward pass offers to the functions of this module."""

    channels: Channels

    def maps_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The maps among a call's operands."""
        ...

    def layer_reads(self, x: Tensor, axis: int) -> None:
        """A layer reads the map ``x``, whose channels lie along ``axis``."""
        ...

    def live_constant(self, t: Tensor) -> Tensor:
        """``t`` as a factor that the live pass takes for a constant."""
        ...

    def factors(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Two maps that attention is about to multiply: queries and keys, weights and values."""
        ...

    def attention(self, weights: Tensor) -> Tensor:
        """The weights (N, heads, L, S) of an attention, as they multiply the values."""
        ...

    def as_gate(self, t: Tensor, function: Function) -> Tensor:
        """``t``, which ``function`` made, for multiplying maps by it and nothing else."""
        ...

    def shifted(self, y: Tensor, x: Tensor, shift: Tensor, axis: int) -> Tensor:
        """``y + shift``, the shift shared along the vectors of ``x``."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A linear layer with its bias shared."""
        ...

    def linear_of_weights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A linear layer that makes queries or keys."""
        ...


class AsItIs:
    """Of a trace that leaves a network as it is: nothing is constant."""

    def live_constant(self, t: Tensor) -> Tensor:
        """``t``."""
        return t

    def factors(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Two maps that attention is about to multiply."""
        return one, other

    def attention(self, weights: Tensor) -> Tensor:
        """The weights of an attention."""
        return weights

    def as_gate(self, t: Tensor, function: Function) -> Tensor:
        """``t``."""
        return t

    def shifted(self, y: Tensor, x: Tensor, shift: Tensor, axis: int) -> Tensor:
        """The sum."""
        return y + shift


def layer_norm(
    trace: Trace,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """Layer norm (Ba et al. 2016) over the last axes."""
    y = _standardised(trace, input, [*range(-len(normalized_shape), 0)], eps)
    return _affine(trace, y, input, weight, bias, _axis(trace, input, normalized_shape))


def rms_norm(
    trace: Trace,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """RMS norm (Zhang & Sennrich 2019) over the last axes: no centring, no shift."""
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    square = (input * input).mean([*range(-len(normalized_shape), 0)], keepdim=True)
    y = input * trace.live_constant(torch.rsqrt(square + eps))
    return _affine(trace, y, input, weight, None, _axis(trace, input, normalized_shape))


def group_norm(
    trace: Trace,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """Group norm (Wu & He 2018) over the positions and channels of every group; input (N, C, ...)."""
    groups = input.unflatten(1, (num_groups, -1))
    y = _standardised(trace, groups, [*range(2, groups.dim())], eps).flatten(1, 2)
    return _affine(trace, y, input, _per_channel(weight, y), _per_channel(bias, y), 1)


def instance_norm(
    trace: Trace,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Instance norm (Ulyanov et al. 2016) over positions; input (N, C, ...)."""
    if use_input_stats or running_mean is None or running_var is None:
        y = _standardised(trace, input, [*range(2, input.dim())], eps)
    else:  # fixed statistics: a batch norm in all but name
        scale = torch.rsqrt(running_var + eps).view(1, -1, *[1] * (input.dim() - 2))
        y = trace.shifted(input * scale, input, -running_mean.view_as(scale) * scale, 1)
    return _affine(trace, y, input, _per_channel(weight, y), _per_channel(bias, y), 1)


def local_response_norm(
    trace: Trace, input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """Local response norm (Krizhevsky et al. 2012) over neighbouring channels; input (N, C, ...)."""
    square = F.pad((input * input).movedim(1, -1), (size // 2, (size - 1) // 2))
    mean = square.unfold(-1, size, 1).mean(-1).movedim(-1, 1)
    return trace.channels.put(input / trace.live_constant((k + alpha * mean) ** beta), 1)


def normalize(
    trace: Trace, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> Tensor:
    """Division by the p-norm along ``dim``."""
    y = input / trace.live_constant(input.norm(p, dim, keepdim=True).clamp_min(eps))
    return trace.channels.put(y, trace.channels.of(input))


def scaled_dot_product_attention(
    trace: Trace,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention (Vaswani et al. 2017) of query (..., L, E), key (..., S, E) and value (..., S, Ev): (..., L, Ev)."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    if is_causal:
        attn_mask = query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = _masking(~attn_mask, query)
    return trace.channels.put(_attended(trace, query, key, value, attn_mask, scale)[0], -1)


def multi_head_attention_forward(
    trace: Trace,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """Attention of several heads (Vaswani et al. 2017) on (L, N, E) tokens; the weights, if asked for, are a gate.

    None for keys and values that are given, added biases or zeros, and tokens without a batch.
    """
    unusual = (bias_k, bias_v, static_k, static_v)
    if query.dim() != 3 or add_zero_attn or any(t is not None for t in unusual):
        return None
    projections: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
    if not use_separate_proj_weight:
        projections = in_proj_weight.chunk(3)  # type: ignore[union-attr]
    biases: Any = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    inputs = [t.transpose(0, 1) for t in (query, key, value)]

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    q, k = (heads(trace.linear_of_weights(inputs[i], projections[i], biases[i])) for i in (0, 1))
    v = heads(trace.linear(inputs[2], projections[2], biases[2]))
    mask = None
    if attn_mask is not None:
        mask = _masking(attn_mask, q)
        mask = mask.unflatten(0, (-1, num_heads)) if mask.dim() == 3 else mask
    if key_padding_mask is not None:
        padded = _masking(key_padding_mask, q)[:, None, None]
        mask = padded if mask is None else mask + padded
    attended, weights = _attended(trace, q, k, v, mask)
    attended = attended.transpose(1, 2).flatten(2)
    out = trace.channels.put(trace.linear(attended, out_proj_weight, out_proj_bias).transpose(0, 1), -1)
    if not need_weights:
        return out, None
    weights = weights.mean(1) if average_attn_weights else weights
    return out, trace.as_gate(weights, F.multi_head_attention_forward)


AFFINE_FORMS: dict[Function, Function] = {
    **dict.fromkeys((F.layer_norm, torch.layer_norm), layer_norm),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), rms_norm),
    **dict.fromkeys((F.group_norm, torch.group_norm), group_norm),
    F.instance_norm: instance_norm,
    F.local_response_norm: local_response_norm,
    F.normalize: normalize,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.multi_head_attention_forward: multi_head_attention_forward,
}


def affine_form(
    trace: Trace, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any | None:
    """What a normalisation or attention call on maps returns, made by operations that are affine in the live pass.

    None for every other call, and for options that there is no rule for.
    """
    if function not in AFFINE_FORMS or not (maps := trace.maps_in(args, kwargs)):
        return None
    x = max(maps, key=Tensor.dim)
    trace.layer_reads(x, trace.channels.of(x))
    return AFFINE_FORMS[function](trace, *args, **kwargs)


def _standardised(trace: Trace, x: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * trace.live_constant(torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps))


def _affine(
    trace: Trace, y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int
) -> Tensor:
    y = y if weight is None else y * weight
    y = y if bias is None else trace.shifted(y, x, bias, axis)
    return trace.channels.put(y, axis)


def _axis(trace: Trace, x: Tensor, normalised: Sequence[int]) -> int:
    """Channels are what a norm over one axis runs along; over several, they stay where they were."""
    return x.dim() - 1 if len(normalised) == 1 else trace.channels.of(x)


def _per_channel(parameter: Tensor | None, like: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.view(1, -1, *[1] * (like.dim() - 2))


def _masking(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of what is left out (bool), or of what is added, as what is added."""
    return (
        torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
        if mask.dtype == torch.bool
        else mask
    )


def _attended(
    trace: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """What attention puts out, and its weights."""
    query, key = trace.factors(query, key)
    scores = query @ key.transpose(-2, -1) * (1 / sqrt(query.shape[-1]) if scale is None else scale)
    weights = torch.softmax(scores if mask is None else scores + mask, -1)
    by, value = trace.factors(trace.attention(weights), value)
    return by @ value, weights
