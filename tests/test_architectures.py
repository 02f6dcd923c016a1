"""Beyond VGG and ResNet: gates, normalisations that depend on the input, attention, tokens and constants, against a
literal oracle on toy blocks and by conservation on torchvision's classifiers.

By default conservation is tried on torchvision's networks that are neither compared with `tests/graph_oracle.py` nor large,
and on small ones of the large families; `-m peers` tries one of every family as published, `scripts/architectures.py` any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from typing import Any

import pytest
import reference as ref
import torch
import torch.nn.functional as F
import torchvision
from click.testing import CliRunner
from script_files import script_module
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)

from srd_lab.engine import rules
from srd_lab.engine.channels import Channels
from srd_lab.engine.record import Record, Records
from srd_lab.engine.spellings import tensors_in
from srd_lab.engine.srd_trace import SRDTrace
from srd_lab.errors import BadInput, BadValue, Refused, SrdLabError
from srd_lab.methods.averaged import IntegratedGradients
from srd_lab.methods.gradient import Gradient, GuidedBackprop
from srd_lab.methods.lrp import LRPZPlus
from srd_lab.methods.srd import SRD

WHOLE = SRD(encoder="", start="ones")


architectures = script_module("architectures")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    assert torch.isfinite(a).all()
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def drawn(model: nn.Module, seed: int = 1) -> nn.Module:
    """Every parameter random, none neutral; float64, frozen, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.double().parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data *= 1 / sqrt(parameter[0].numel() if parameter.dim() > 1 else 4)
    return model.eval().requires_grad_(False)


# --- torchvision's classifiers --------------------------------------------------------------------------------

NAMES = (
    *(
        "alexnet",
        "resnet18",
        "densenet121",
        "inception_v3",
        "mobilenet_v3_small",
        "mnasnet1_0",
        "regnet_y_400mf",
    ),
    "shufflenet_v2_x1_0",
)
# from the others, which differ from one that is tried in depth or width alone
PEERS = (
    *("vgg11", "vgg11_bn", "resnet50", "resnext50_32x4d", "squeezenet1_0", "squeezenet1_1", "googlenet"),
    *("mobilenet_v2", "efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf"),
    *("convnext_tiny", "vit_b_16", "swin_v2_t"),
)
LEAKING = {"vit_b_16": "constants", "swin_v2_t": "dead fields"}
# how the relevance of an activation call is laid out
TOKENS = {"vit_b_16": (17,), "swin_v2_t": (2, 2), "convnext_tiny": (2, 2)}


def check_conservation(model: nn.Module, x: Tensor, cause: str | None = None) -> dict[str, Tensor]:
    """Whatever does not arrive has gone where ``cause`` says; returns the relevance of every layer."""
    method = SRD(start="ones")
    map_, logits = method.explain_with_logits(model, x)
    close(logits, model(x), 1e-10)
    leaks, conserved = method.leaks(model, x), method.conserved(model, x)
    close(conserved + torch.stack([*leaks.values()]).sum(0), torch.ones_like(conserved))
    for name, share in leaks.items():
        if name == cause:
            assert (share.abs() > 1e-4).all()
        else:
            close(share, torch.zeros_like(share))
    relevance = method.relevance(model, x)
    assert torch.equal(relevance["input"], map_)
    assert all(layer.shape[0] == len(x) for layer in relevance.values())
    return relevance


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.peers) for name in PEERS)])
def test_torchvision_classifiers_conserve_relevance(name: str) -> None:
    size = architectures.SIZES.get(name, 64)
    model = architectures.random_network(name, size)
    relevance = check_conservation(model, noise(1, 3, size, size), LEAKING.get(name))
    total = relevance["input"].sum()
    cuts: list[str] = []
    if name.startswith(("vgg", "alexnet")):  # in a chain every layer holds it all
        cuts = list(relevance)
    elif name.startswith("resn"):  # and so does the output of every residual block
        last = "#2" if name == "resnet18" else "#3"
        cuts = [call for call in relevance if call.endswith(last)]
        assert len(cuts) >= 8
    for call in cuts:
        close(relevance[call].sum(), total)
    if name in TOKENS:
        assert list(relevance.values())[-1].shape == (1, *TOKENS[name])


def test_a_small_maxvit_conserves_relevance() -> None:
    """Windows and grids of tokens in six dimensions, attention by einsum."""
    model = torchvision.models.MaxVit((32, 32), 8, 2, [8, 16], [1, 2], 8, 0.0, num_classes=5)
    check_conservation(drawn(model), noise(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("block", "merging"),
    [(SwinTransformerBlock, PatchMerging), (SwinTransformerBlockV2, PatchMergingV2)],
    ids=["swin", "swin v2"],
)
def test_a_swin_without_padded_windows_conserves_relevance(
    block: type[nn.Module], merging: type[nn.Module]
) -> None:
    """What leaks at 64 pixels are the biases of padded tokens, which are zero."""
    model = torchvision.models.SwinTransformer(
        [4, 4], 12, [2, 2], [2, 4], [2, 2], num_classes=5, block=block, downsample_layer=merging
    )
    check_conservation(drawn(model), noise(2, 3, 32, 32))
    check_conservation(model, noise(2, 3, 24, 24), "dead fields")


def small_vit(size: int = 32, patch: int = 8, layers: int = 2) -> nn.Module:
    return drawn(torchvision.models.VisionTransformer(size, patch, layers, 4, 32, 64, num_classes=5))


def test_a_small_vit_keeps_all_but_what_its_constants_take() -> None:
    relevance = check_conservation(small_vit(), noise(2, 3, 32, 32), "constants")
    assert list(relevance.values())[-1].shape == (2, 17)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "small_vit"])
def test_single_precision_follows(name: str) -> None:
    side = 32 if name == "small_vit" else 64
    model = small_vit() if name == "small_vit" else architectures.random_network(name, side)
    x = noise(2, 3, side, side)
    for start in ("ones", "contrastive"):
        double = SRD(start=start).explain(model.double(), x)
        single = SRD(start=start).explain(model.float(), x.float())
        assert single.dtype == torch.float32
        assert (single - double).abs().max() < 1e-3 * double.abs().max()


def test_googlenet_normalises_its_own_input() -> None:
    options = {"init_weights": False, "aux_logits": False, "transform_input": True, "num_classes": 5}
    model = drawn(torchvision.models.googlenet(weights=None, **options))
    x = noise(1, 3, 64, 64)
    fed = model._transform_input(x)
    expected = check_conservation(model, x)["input"]
    model.transform_input = False
    close(SRD(start="ones").explain(model, fed), expected)


# --- the literal oracle ------------------------------------------------------------------------------------------

# As in tests/reference.py: contributions are carried forwards, source layer -> (its positions, *positions, channels).
Parts = dict[str, Tensor]


def own(value: Tensor) -> Tensor:
    """A layer's contributions to itself, (P, *positions, D) of a value (*positions, D)."""
    positions = value[..., 0].numel()
    return torch.stack(
        [value * F.one_hot(torch.tensor(i), positions).view(*value.shape[:-1], 1) for i in range(positions)]
    )


def fraction(part: Tensor, x: Tensor) -> Tensor:
    """<c, x_i> / ||x_i||^2, with 0 / 0 := 0."""
    square = (x * x).sum(-1, keepdim=True)
    return torch.where(
        square == 0, 0.0, (part * x).sum(-1, keepdim=True) / torch.where(square == 0, 1.0, square)
    )


def shift(parts: Parts, x: Tensor, constant: Tensor) -> Parts:
    """x + constant, which belongs to the vector at its position."""
    return {layer: part + constant * fraction(part, x) for layer, part in parts.items()}


def linear(parts: Parts, x: Tensor, weight: Tensor, bias: Tensor) -> Parts:
    return {layer: part @ weight.T + bias * fraction(part, x) for layer, part in parts.items()}


def layer_norm(parts: Parts, x: Tensor, norm: nn.LayerNorm) -> Parts:
    """Centred, and scaled by what x's own variance says."""
    scale = norm.weight / (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    return {
        layer: (part - part.mean(-1, keepdim=True)) * scale + norm.bias * fraction(part, x)
        for layer, part in parts.items()
    }


def group_norm(parts: Parts, x: Tensor, norm: nn.GroupNorm) -> Parts:
    """Over positions and the channels of a group at once."""
    out: dict[str, list[Tensor]] = {layer: [] for layer in parts}
    for channels in torch.arange(x.shape[-1]).chunk(norm.num_groups):
        scale = norm.weight[channels] / (x[..., channels].var(correction=0) + norm.eps).sqrt()
        for layer, part in parts.items():
            mean = part[..., channels].mean([*range(1, part.dim())], keepdim=True)
            out[layer].append((part[..., channels] - mean) * scale)
    return {layer: torch.cat(some, -1) + norm.bias * fraction(parts[layer], x) for layer, some in out.items()}


def attention(parts: Parts, x: Tensor, layer: nn.MultiheadAttention) -> Parts:
    """Tokens (S, D): the values are mixed, by weights that x makes."""
    q, k, v = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    weight, bias = layer.in_proj_weight.chunk(3)[2], layer.in_proj_bias.chunk(3)[2]
    values = linear(parts, x, weight, bias)
    mixed: dict[str, list[Tensor]] = {name: [] for name in parts}
    whole = []
    for head in torch.arange(x.shape[-1]).chunk(layer.num_heads):
        weights = torch.softmax(q[:, head] @ k[:, head].T / sqrt(len(head)), -1)
        whole.append(weights @ v[:, head])
        for name, part in values.items():
            mixed[name].append(weights @ part[..., head])
    gathered = {name: torch.cat(some, -1) for name, some in mixed.items()}
    return linear(gathered, torch.cat(whole, -1), layer.out_proj.weight, layer.out_proj.bias)


def convolution(parts: Parts, x: Tensor, layer: nn.Conv2d) -> Parts:
    """Maps (H, W, C), by the definition in tests/reference.py."""
    step = ref.Conv(
        "conv", "x", layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    first = {name: part.movedim(-1, 1) for name, part in parts.items()}
    out = ref._through_conv(first, x.movedim(-1, 0), step, step.weight, step.bias)
    return {name: part.movedim(1, -1) for name, part in out.items()}


def added(left: Parts, right: Parts) -> Parts:
    return {name: sum(side[name] for side in (left, right) if name in side) for name in {**left, **right}}


class Walk:
    """Values and contributions side by side; ``at`` names a layer whose vectors hold relevance."""

    def __init__(self, image: Tensor) -> None:
        self.value = image.movedim(0, -1)
        self.parts: Parts = {"input": own(self.value)}
        self.targets: list[tuple[str, Parts, Tensor]] = []

    def step(self, module: Callable[[Tensor], Tensor], rule: Callable[[Parts, Tensor, Any], Parts]) -> None:
        before = self.value
        with torch.no_grad():
            self.value = module(before)
        self.parts = rule(self.parts, before, module)

    def linear(self, layer: nn.Linear) -> None:
        self.step(layer, lambda parts, x, _: linear(parts, x, layer.weight, layer.bias))

    def convolution(self, layer: nn.Conv2d) -> None:
        self.step(
            lambda t: layer(t.movedim(-1, 0)[None])[0].movedim(0, -1),
            lambda p, x, _: convolution(p, x, layer),
        )

    def linear_map(self, function: Callable[[Tensor], Tensor]) -> None:
        """One that moves positions about, or scales."""
        self.step(
            function, lambda parts, x, _: {k: torch.stack([function(c) for c in p]) for k, p in parts.items()}
        )

    def shift(self, constant: Tensor) -> None:
        self.step(lambda t: t + constant, lambda parts, x, _: shift(parts, x, constant))

    def activation(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        self.targets.append((name, self.parts, self.value))
        self.value = function(self.value)
        self.parts = {name: own(self.value)}

    def relevance(self, start: Tensor) -> dict[str, Tensor]:
        """Eq. 6 and 8: ratio by ratio, from the last vectors to the pixels."""
        found: dict[str, Tensor] = {}
        for name, parts, u in [("", self.parts, self.value), *reversed(self.targets)]:
            received = found[name].view(u.shape[:-1]) if name else start
            found[name] = received
            for layer, part in parts.items():
                ratio = fraction(part, u)[..., 0]  # mu[i, j]
                found[layer] = found.get(layer, 0) + (ratio * received).flatten(1).sum(1)
        del found[""]
        return found


class Block(nn.Module):
    """A transformer's, with everything in it."""

    def __init__(self, width: int, kind: type[nn.Module]) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.activation = kind()

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.fc2(self.activation(self.fc1(self.ln2(x))))

    def walk(self, w: Walk, name: str) -> None:
        x, kept = w.value, w.parts
        w.step(self.ln1, layer_norm)
        w.step(
            lambda t: self.attention(t[None], t[None], t[None])[0][0],
            lambda p, y, _: attention(p, y, self.attention),
        )
        w.value, w.parts = w.value + x, added(w.parts, kept)
        x, kept = w.value, w.parts
        w.step(self.ln2, layer_norm)
        w.linear(self.fc1)
        w.activation(name, self.activation)
        w.linear(self.fc2)
        w.value, w.parts = w.value + x, added(w.parts, kept)


class Tokens(nn.Module):
    """A small vision transformer; ``pick`` chooses what the head reads."""

    def __init__(
        self, kind: type[nn.Module] = nn.GELU, pick: Callable[[Tensor], Tensor] = lambda t: t[:, 0]
    ) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 6, 2, 2), nn.ReLU(inplace=True)
        self.token = nn.Parameter(torch.empty(1, 1, 6))
        self.position = nn.Parameter(torch.empty(1, 5, 6))
        self.blocks = nn.Sequential(Block(6, kind), Block(6, kind))
        self.ln, self.head = nn.LayerNorm(6), nn.Linear(6, 4)
        self.pick = pick
        drawn(self)

    def tokens(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x)).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.ln(self.blocks(x + self.position))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pick(self.tokens(x)))

    def walk(self, image: Tensor) -> Walk:
        w = Walk(image)
        w.convolution(self.stem)
        w.activation("relu", torch.relu)
        # the class token comes from no pixel
        w.value = torch.cat([self.token[0], w.value.flatten(0, 1)])
        w.parts = {k: F.pad(p.flatten(1, 2), (0, 0, 1, 0)) for k, p in w.parts.items()}
        w.shift(self.position[0])
        for i, block in enumerate(self.blocks):
            block.walk(w, f"blocks.{i}.activation")
        w.step(self.ln, layer_norm)
        return w


class Last(nn.Module):
    """ConvNeXt's way: a depthwise convolution, then channels last, a layer scale, and back; a group norm in front."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem, self.relu, self.norm = nn.Conv2d(3, 6, 2, 2), nn.ReLU(), nn.GroupNorm(2, 6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.ln, self.fc1, self.fc2 = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.scale = nn.Parameter(torch.empty(6, 1, 1))
        self.gelu, self.head = nn.GELU(), nn.Linear(6, classes)
        drawn(self)

    def features(self, x: Tensor) -> Tensor:
        x = self.norm(self.relu(self.stem(x)))
        y = self.ln(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.fc2(self.gelu(self.fc1(y))).permute(0, 3, 1, 2)
        return x + self.scale * y

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))

    def walk(self, image: Tensor) -> Walk:
        w = Walk(image)
        w.convolution(self.stem)
        w.activation("relu", torch.relu)
        w.step(
            lambda t: self.norm(t.movedim(-1, 0)[None])[0].movedim(0, -1),
            lambda p, x, _: group_norm(p, x, self.norm),
        )
        x, kept = w.value, w.parts
        w.convolution(self.depthwise)
        w.step(self.ln, layer_norm)
        w.linear(self.fc1)
        w.activation("gelu", F.gelu)
        w.linear(self.fc2)
        w.linear_map(lambda t: t * self.scale[:, 0, 0])
        w.value, w.parts = w.value + x, added(w.parts, kept)
        return w


@pytest.mark.parametrize(
    "model", [Tokens(), Tokens(nn.ReLU), Last()], ids=["tokens", "relu_tokens", "channels_last"]
)
def test_held_statistics_equal_the_definition(model: Tokens | Last) -> None:
    x = noise(2, 3, 4, 4)
    walks = [model.walk(image) for image in x]
    start = noise(2, *walks[0].value.shape[:-1], seed=2)
    got = SRD().relevance(model, x, start=start)
    for image, (walk, begin) in enumerate(zip(walks, start, strict=True)):
        expected = walk.relevance(begin)
        expected["input"] = expected["input"].view(4, 4)
        assert set(got) == set(expected)
        for layer, relevance in expected.items():
            close(got[layer][image], relevance)
    assert all(layer.abs().max() > 1e-3 for layer in got.values())


# --- held statistics: values and derivatives -----------------------------------------------------------------------


class Calls(nn.Module):
    """A convolution and an activation, then any function of the map."""

    def __init__(self, function: Callable[[Tensor], Any], channels: int = 4) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, channels, 3, padding=1), nn.ReLU()
        self.function = function
        drawn(self)

    def forward(self, x: Tensor) -> Any:
        return self.function(self.relu(self.conv(x)))


def parameters(*shape: int) -> tuple[Tensor, Tensor]:
    return 1 + noise(*shape, seed=3) / 4, noise(*shape, seed=4) / 4


def tokens_of(t: Tensor) -> Tensor:
    return t.flatten(2).transpose(1, 2)


def heads_of(t: Tensor) -> Tensor:
    """(N, S, D) tokens as (N, 2, S, D / 2)."""
    return tokens_of(t).unflatten(-1, (2, -1)).transpose(1, 2)


def attend(**given: Any) -> Callable[[Tensor], Tensor]:
    layer = drawn(nn.MultiheadAttention(4, 2, **{"batch_first": True, **given.pop("layer", {})}))
    rows = {"key_padding_mask": 1, **given.pop("rows", {})}  # of a mask, for each image

    def run(t: Tensor) -> Tensor:
        t = tokens_of(t)
        options = {k: v[: rows.get(k, 0) * len(t) or None] for k, v in given.items() if isinstance(v, Tensor)}
        options |= {k: v for k, v in given.items() if not isinstance(v, Tensor)}
        if layer.batch_first:
            return layer(t, t, t, **options)[0]
        t = t.transpose(0, 1)
        return layer(t, t, t, **options)[0].transpose(0, 1)

    return run


ACROSS = drawn(nn.MultiheadAttention(4, 2, kdim=4, vdim=4, batch_first=True))
WITHIN = drawn(nn.MultiheadAttention(4, 2, batch_first=True))


def cross_attention(t: Tensor) -> Tensor:
    """From fewer queries, to other widths, and with the averaged weights put to use."""
    t = tokens_of(t)
    out, weights = ACROSS(t[:, :3], t, 2 * t)
    return out + (weights @ t)


def sdpa(**options: Any) -> Callable[[Tensor], Tensor]:
    return lambda t: F.scaled_dot_product_attention(heads_of(t), heads_of(2 - t), heads_of(t * 3), **options)


def fixed_instance_norm() -> nn.Module:
    norm = drawn(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
    norm.running_mean.copy_(noise(4, seed=19))
    norm.running_var.copy_(0.5 + noise(4, seed=20).abs())
    return norm


def by_hand(t: Tensor) -> Tensor:
    """Causal attention as many a network writes it."""
    q, k, v = F.linear(tokens_of(t), noise(12, 4, seed=17), noise(12, seed=18)).chunk(3, -1)
    scores = (q @ k.transpose(1, 2) / 2).masked_fill(CAUSAL, -torch.inf)
    return scores.softmax(-1) @ v


CAUSAL = torch.ones(16, 16, dtype=torch.bool).triu(1)
PADDING = torch.zeros(2, 16, dtype=torch.bool).index_fill(1, torch.tensor([3, 9]), True)
HELD: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda t: F.layer_norm(t.permute(0, 2, 3, 1), (4,), *parameters(4)),
    "layer_norm of all": lambda t: F.layer_norm(t, (4, 4, 4), *parameters(4, 4, 4)),
    "layer_norm of rows": lambda t: F.layer_norm(t, (4, 4)),
    "torch.layer_norm": lambda t: torch.layer_norm(t.permute(0, 2, 3, 1), [4], *parameters(4)),
    "rms_norm": lambda t: F.rms_norm(t.permute(0, 2, 3, 1), (4,), parameters(4)[0]),
    "torch.rms_norm": lambda t: torch.rms_norm(t.permute(0, 2, 3, 1), (4,), parameters(4)[0], 0.1),
    "group_norm": lambda t: F.group_norm(t, 2, *parameters(4), eps=1e-3),
    "torch.group_norm": lambda t: torch.group_norm(t, 4, *parameters(4)),
    "instance_norm": lambda t: F.instance_norm(t, weight=parameters(4)[0], bias=parameters(4)[1]),
    "instance_norm, fixed": fixed_instance_norm(),
    "local_response_norm": lambda t: F.local_response_norm(t, 3, alpha=0.5, beta=0.6, k=2.0),
    "local_response_norm, even": lambda t: F.local_response_norm(t, 2, alpha=0.5),
    "normalize": lambda t: F.normalize(t - 0.1, dim=1),
    "normalize, p=1": lambda t: F.normalize(t - 0.1, 1.0, -1),
    "attention": attend(need_weights=False),
    "attention, no bias": attend(layer={"bias": False}),
    "attention, batch second": attend(layer={"batch_first": False}, need_weights=False),
    "attention, masked": attend(attn_mask=CAUSAL, key_padding_mask=PADDING),
    "attention, causal": attend(attn_mask=CAUSAL, is_causal=True, need_weights=False),
    "attention, mask per head": attend(
        attn_mask=noise(4, 16, 16, seed=5), rows={"attn_mask": 2}, need_weights=False
    ),
    "attention, weights per head": attend(average_attn_weights=False),
    "attention, across": cross_attention,
    "attention, by hand": by_hand,
    "sdpa": sdpa(),
    "sdpa, causal": sdpa(is_causal=True),
    "sdpa, scaled": sdpa(scale=0.3),
    "sdpa, bool mask": sdpa(attn_mask=~CAUSAL),
    "sdpa, float mask": sdpa(attn_mask=noise(16, 16, seed=6)),
    "sdpa, grouped": lambda t: F.scaled_dot_product_attention(
        t.flatten(2)[..., None],
        t[:, :2].flatten(2)[..., None],
        t[:, 2:].flatten(2)[..., None],
        enable_gqa=True,
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_held_functions_are_torchs_own_in_every_derivative(name: str) -> None:
    model, x, weight = Calls(HELD[name]), noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=7)
    found = []

    def plain(leaf: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention cannot be differentiated twice
            return model(leaf)

    for run in (plain, lambda leaf: SRDTrace(model, rules.srd_vector, "", with_bias=True).trace(leaf)[0]):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        (slope,) = torch.autograd.grad(out.sin().sum(), leaf, create_graph=True)
        (curvature,) = torch.autograd.grad((slope * weight).sum(), leaf)
        found.append((out, slope, curvature))
    for ours, theirs in zip(found[1], found[0], strict=True):
        close(ours, theirs, 1e-11)


@pytest.mark.parametrize("name", HELD)
def test_held_functions_conserve(name: str) -> None:
    model, x = Calls(lambda t: HELD[name](t + 0.1)), noise(2, 3, 4, 4)
    conserved = WHOLE.conserved(model, x)
    close(conserved, torch.ones_like(conserved))
    for share in WHOLE.leaks(model, x).values():
        close(share, torch.zeros_like(share))


def along(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float]:
    """Autograd's directional derivative of <w, function(x)>, and the relative error of the best central difference."""
    v, leaf = noise(*x.shape, seed=8), x.clone().requires_grad_()
    map_ = function(leaf)
    w = noise(*map_.shape, seed=9) / map_.detach().abs().mean()
    (slope,) = torch.autograd.grad((w * map_).sum(), leaf)
    derivative = float((slope * v).sum())
    steps = [10 ** (-k / 2) for k in range(5, 13)]
    values = [(float((w * function(x + h * v)).sum()), float((w * function(x - h * v)).sum())) for h in steps]
    errors = [
        abs((a - b) / (2 * h) - derivative) / abs(derivative) for h, (a, b) in zip(steps, values, strict=True)
    ]
    return derivative, min(errors)


@pytest.mark.parametrize("start", ["ones", "contrastive"])
@pytest.mark.parametrize("model", [Tokens(), Last()], ids=["tokens", "channels_last"])
def test_maps_through_held_statistics_are_differentiable(model: nn.Module, start: str) -> None:
    """The whole map, statistics included: they are held in the live pass alone."""
    x, target = noise(2, 3, 4, 4) + 1, torch.tensor([2, 1])
    derivative, error = along(lambda a: SRD(start=start).explain(model, a, target), x)
    assert abs(derivative) > 1e-6
    assert error < 1e-6


def test_a_batch_of_tokens_equals_its_images() -> None:
    model, x = Tokens(), noise(3, 3, 4, 4)
    together = SRD().relevance(model, x, torch.tensor([0, 3, 2]))
    leaks = SRD().leaks(model, x, torch.tensor([0, 3, 2]))
    for i, target in enumerate((0, 3, 2)):
        alone = SRD().relevance(model, x[i : i + 1], target)
        for a, b in zip(together.values(), alone.values(), strict=True):
            close(a[i], b[0], 1e-12)
        for cause, share in SRD().leaks(model, x[i : i + 1], target).items():
            close(share[0], leaks[cause][i], 1e-12)
    assert leaks["constants"].std() > 1e-3


@pytest.mark.parametrize(
    "method", [Gradient(), IntegratedGradients(steps=2), GuidedBackprop(), SRD()], ids=repr
)
def test_every_method_can_be_attacked_through_attention(method: Any) -> None:
    """torch's fused attention cannot be differentiated twice, and would stop the attack."""
    model, leaf = Tokens(pick=lambda t: F.scaled_dot_product_attention(t, t, t).mean(1)), noise(1, 3, 4, 4)
    method = replace(method, encoder="ln") if isinstance(method, SRD) else method
    derivative, error = along(lambda a: method.explain(model, a, 1), leaf)
    assert abs(derivative) > 1e-6
    assert error < 1e-6


# --- refusals ------------------------------------------------------------------------------------------------------

NEITHER = r"is neither affine nor an activation, and there is no rule for it; choose another network"
NO_GATE = r"is used for more than multiplying a map by it, and there is no rule for it"
REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "var": (lambda t: torch.var(t, 1, keepdim=True), rf"torch\.var in Calls {NEITHER}"),
    "x / x": (lambda t: t / t.mean(1, keepdim=True), rf"Tensor\.div in Calls {NEITHER}"),
    "1 / x": (lambda t: 1 / (t + 1), rf"__r(true)?div__ in Calls {NEITHER}"),
    "c / x": (lambda t: torch.ones(4, 4).double() / (t + 1), rf"Tensor\.div in Calls {NEITHER}"),
    "c / x by name": (
        lambda t: torch.div(input=torch.ones(4, 4).double(), other=t + 1),
        rf"torch\.div in Calls {NEITHER}",
    ),
    "detached": (lambda t: t + torch.tanh(t).detach(), r"add in Calls takes a detached part of the image"),
    "gate / x": (
        lambda t: torch.sigmoid(t) / (t + 1),
        r"Tensor\.div in Calls is an activation by another name",
    ),
    "gate / y": (
        lambda t: torch.sigmoid(t) / (t.mean(1, keepdim=True) + 1),
        rf"Tensor\.div in Calls {NEITHER}",
    ),
    "x * x by name": (
        lambda t: torch.mul(input=t, other=t.mean(1, keepdim=True)),
        rf"torch\.mul in Calls {NEITHER}",
    ),
    "x @ x": (lambda t: t @ t.transpose(2, 3), rf"matmul in Calls {NEITHER}"),
    "in place": (lambda t: t.mul(2).abs_(), rf"abs_ in Calls {NEITHER}"),
    "in place, result dropped": (lambda t: (y := t - 1, y.exp_())[0], rf"exp_ in Calls {NEITHER}"),
    "power in place": (lambda t: t.clone().__ipow__(2), rf"__ipow__ in Calls {NEITHER}"),
    "bias_kv": (attend(layer={"add_bias_kv": True}), rf"multi_head_attention_forward in Calls {NEITHER}"),
    "zero_attn": (attend(layer={"add_zero_attn": True}), rf"multi_head_attention_forward in Calls {NEITHER}"),
    "x + gate": (lambda t: t + torch.sigmoid(t), rf"torch\.sigmoid in Calls {NO_GATE}"),
    "gate alone": (torch.sigmoid, rf"torch\.sigmoid in Calls {NO_GATE}"),
    "gate overwritten": (lambda t: F.softmax(t, 1).mul_(t), rf"softmax in Calls {NO_GATE}"),
    "gate in place": (lambda t: (y := t - 1, F.hardsigmoid(y, True))[0], rf"hardsigmoid in Calls {NO_GATE}"),
    "attention weights": (
        lambda t: WITHIN(*[tokens_of(t)] * 3)[1],
        rf"multi_head_attention_forward in Calls {NO_GATE}",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused_by_name(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(Refused, match=message):
        WHOLE.explain(Calls(function), noise(1, 3, 4, 4))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        lambda t: t * torch.sigmoid(t.abs().sqrt().var(1, keepdim=True)),
        lambda t: torch.softmax(t.flatten(2) @ t.flatten(2).transpose(1, 2) * 2, -1) @ t.flatten(2),
        lambda t: t * torch.sigmoid(torch.tanh(F.linear(t.mean((2, 3)), noise(4, 4))))[..., None, None],
        lambda t: t * (1 - torch.sigmoid(t).square().clamp(max=0.4)),
        lambda t: (y := t * 1, y.mul_(F.hardsigmoid(t)))[0],
        lambda t: torch.mul(input=t, other=torch.sigmoid(t)),
        lambda t: t + 0 * t.exp(),
    ],
    ids=["statistics", "softmax", "squeezed", "made of gates", "in place", "by name", "no signal"],
)
def test_what_relevance_does_not_pass_may_be_anything(function: Any, trainable: bool) -> None:
    """What feeds a gate alone; with weights that ask for gradients and without."""
    model, x = Calls(function).requires_grad_(trainable), noise(2, 3, 4, 4)
    conserved = WHOLE.conserved(model, x)
    close(conserved, torch.ones_like(conserved))


def test_maps_times_maps_are_told_from_maps_times_weights() -> None:
    """Also where weights ask for gradients, and where they were computed from others."""

    class Scaled(Calls):
        def __init__(self, twice: bool) -> None:
            super().__init__(nn.Identity())
            self.scale, self.twice = nn.Parameter(torch.full((4, 1, 1), 0.5).double()), twice

        def forward(self, x: Tensor) -> Tensor:
            t = super().forward(x) * self.scale / self.scale.exp().sum()
            return t * t if self.twice else t

    x = noise(1, 3, 4, 4)
    for trainable in (False, True):
        close(WHOLE.conserved(Scaled(False).requires_grad_(trainable), x), torch.ones(1).double())
        with pytest.raises(Refused, match=rf"Tensor\.mul in Scaled {NEITHER}"):
            WHOLE.explain(Scaled(True).requires_grad_(trainable), x)


def test_a_refusal_leaves_the_rule_off() -> None:
    """The error flies out of autograd itself; afterwards ordinary gradients are ordinary."""
    model, leaf = Calls(torch.abs), noise(1, 3, 4, 4).requires_grad_()
    trace = SRDTrace(model, rules.srd_vector, "", with_bias=True)
    out, _ = trace.trace(leaf)
    with pytest.raises(Refused, match=r"torch\.abs in Calls"), trace.live():
        torch.autograd.grad(out.sum(), leaf, retain_graph=True)
    (slope,) = torch.autograd.grad(out.sum(), leaf)
    (expected,) = torch.autograd.grad(model(leaf).sum(), leaf)
    close(slope, expected)


def test_active_dropout_in_attention_is_refused() -> None:
    x = noise(1, 3, 4, 4)
    layer = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
    for function in (lambda t: layer(*[tokens_of(t)] * 3)[0], sdpa(dropout_p=0.3)):
        model = Calls(function)
        model.layer = layer.double().train()
        for method in (SRD(start="ones"), Gradient()):
            with pytest.raises(
                SrdLabError, match=r"dropout is active in (Calls|layer); call model\.eval\(\)"
            ):
                method.explain(model, x, 0)
    model.layer.eval()
    model.function = lambda t: layer(*[tokens_of(t)] * 3)[0].mean(1)
    assert SRD(start="ones").explain(model, x).shape == (1, 4, 4)


def test_lrp_refuses_what_srd_holds_and_keeps_gates() -> None:
    x = noise(1, 3, 4, 4).abs()
    for function, name in (
        (lambda t: F.layer_norm(t.movedim(1, -1), (4,)), "layer_norm"),
        (lambda t: F.group_norm(t, 2), "group_norm"),
        (lambda t: F.rms_norm(t, (4,)), "rms_norm"),
        (attend(need_weights=False), "multi_head_attention_forward"),
        (attend(), "multi_head_attention_forward"),
        (sdpa(), "scaled_dot_product_attention"),
        (lambda t: F.conv2d(t, noise(4, 4, 1, 1, seed=10)) + torch.sigmoid(t), "sigmoid"),
    ):
        model = Calls(lambda t, f=function: f(t).flatten(1).unflatten(1, (2, -1)).sum(2))
        with pytest.raises(Refused, match=rf"{name} in \w+ (is neither affine|is used for more)"):
            LRPZPlus(high=5).explain(model, x, 0)
        behind = Calls(lambda t, f=function: f(F.conv2d(t, noise(4, 4, 1, 1, seed=10))).flatten(1))
        with pytest.raises(Refused, match=rf"{name} in \w+ (is neither affine|is used for more)"):
            LRPZPlus(high=5).explain(behind, x, 0)


def test_lrp_takes_a_gate_for_the_factor_that_it_is() -> None:
    """The same map as with its values written down, though the gate is made of signed maps."""

    class Net(Calls):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.squeeze, self.next, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)
            self.written: Tensor | None = None
            drawn(self).last.weight.abs_()  # every channel has a part in every class

        def forward(self, x: Tensor) -> Tensor:
            t = super().forward(x)
            gate = torch.sigmoid(self.squeeze(t.mean((2, 3), keepdim=True)))
            gate = gate if self.written is None else self.written
            self.seen = gate.detach()
            return torch.relu(self.last(self.next(t) * gate)).sum((2, 3))

    model, x = Net(), noise(2, 3, 4, 4).abs()
    found = LRPZPlus(high=5).explain(model, x, 1)
    model.written = model.seen
    close(found, LRPZPlus(high=5).explain(model, x, 1))
    assert found.abs().max() > 0


def test_lrp_conserves_on_gated_networks() -> None:
    model = architectures.random_network("regnet_y_400mf", 64)  # squeeze and excitation with ReLU
    map_, logits = LRPZPlus().explain_with_logits(model, noise(1, 3, 64, 64).clamp(0, 1))
    assert float(map_.sum()) == pytest.approx(float(logits.max()), rel=1e-3)


# --- constants ------------------------------------------------------------------------------------------------------

ADDED = noise(4, 1, 1, seed=11)
SPELLED: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "x + c": (lambda t: t + ADDED, 1),
    "c + x": (lambda t: ADDED + t, 1),
    "x - c": (lambda t: t - -ADDED, 1),
    "c - x": (lambda t: ADDED - t, -1),
    "x += c": (lambda t: t.add_(ADDED), 1),
    "x -= c": (lambda t: t.sub_(-ADDED), 1),
    "x += c, result dropped": (lambda t: (y := t * 1, y.add_(ADDED))[0], 1),
    "alpha": (lambda t: torch.add(t, ADDED, alpha=1), 1),
    "by name": (lambda t: torch.sub(input=t, other=-ADDED), 1),
    "whole": (lambda t: torch.subtract(t, -ADDED.expand_as(t)), 1),
    "rsub": (lambda t: torch.rsub(t, ADDED), -1),
    "channels last": (lambda t: (t.permute(0, 2, 3, 1) + ADDED[:, 0, 0]).permute(0, 3, 1, 2), 1),
    "tokens": (lambda t: (tokens_of(t) + ADDED.flatten()).transpose(1, 2).unflatten(2, (4, 4)), 1),
    "a parameter": (lambda t: t + nn.Parameter(ADDED), 1),
    "made of a parameter": (lambda t: t + nn.Parameter(ADDED / 2) * 2, 1),
}


@pytest.mark.parametrize("name", SPELLED)
def test_an_added_constant_is_shared_as_the_shift_of_a_batch_norm(name: str) -> None:
    function, sign = SPELLED[name]
    norm = nn.BatchNorm2d(4).double().eval().requires_grad_(False)
    norm.running_var.fill_(1 - norm.eps)
    norm.weight.fill_(sign)
    norm.bias.copy_(ADDED.flatten())
    x = noise(2, 3, 4, 4)

    def tail(t: Tensor) -> Tensor:
        return torch.tanh(F.conv2d(t, noise(5, 4, 3, 3, seed=12), padding=1))

    found, expected = (
        WHOLE.relevance(Calls(lambda t, f=f: tail(f(F.avg_pool2d(t, 3, 1, 1)))), x) for f in (function, norm)
    )
    for a, b in zip(found.values(), expected.values(), strict=True):
        close(a, b)
    close(found["input"].sum((1, 2)), torch.full((2,), 16.0).double())
    plain = WHOLE.relevance(Calls(lambda t: tail(sign * F.avg_pool2d(t, 3, 1, 1))), x)
    assert (plain["input"] - found["input"]).abs().max() > 1e-3


def test_a_constant_per_position_belongs_to_the_vector_there() -> None:
    """A position embedding, written out: x_i takes <c_i, G_i> along itself."""
    embedding, x = noise(1, 4, 4, 4, seed=13), noise(2, 3, 4, 4)
    model = Calls(lambda t: torch.tanh(t + embedding))
    got = WHOLE.relevance(model, x)
    v = torch.relu(model.conv(x))
    u = v + embedding
    g = u / (u * u).sum(1, keepdim=True)
    v_square = (v * v).sum(1, keepdim=True)
    assert (v_square > 0).all()
    close(got["relu"], (v * g).sum(1) + (embedding * g).sum(1))
    with_norm = (v * (g + v * (embedding * g).sum(1, keepdim=True) / v_square)).sum(1)
    close(got["relu"], with_norm)


def test_a_constant_ahead_of_the_first_layer_is_shared_where_it_is_no_normalisation() -> None:
    """Patches as vectors, a position embedding, and only then a linear layer."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.fc = nn.Parameter(torch.empty(4, 12)), nn.Linear(12, 5)
            drawn(self)

        def forward(self, x: Tensor) -> Tensor:
            patches = F.unfold(x, 2, stride=2).transpose(1, 2)
            return torch.relu(self.fc(patches + self.position))

    for share in WHOLE.leaks(Patches(), noise(2, 3, 4, 4)).values():
        close(share, torch.zeros_like(share))


def test_leaks_are_told_by_cause() -> None:
    x = noise(3, 3, 4, 4)
    x[1, :, :3, :3] = 0  # a blank corner: the biases of the convolution on it have nobody
    dead = Calls(lambda t: F.conv2d(t, noise(4, 4, 3, 3, seed=14), noise(4, seed=15)))
    token = Calls(lambda t: torch.cat([t, ADDED.expand_as(t)[:, :, :1]], 2))
    padded = Calls(lambda t: F.pad(t, (1, 0, 0, 0), value=2.0))
    chosen = Calls(lambda t: torch.where(torch.arange(4) > 1, t, 0.3))
    for model, cause in (
        (dead, "dead fields"),
        (token, "constants"),
        (padded, "constants"),
        (chosen, "constants"),
    ):
        for trainable in (False, True):
            model.requires_grad_(trainable)
            leaks, conserved = WHOLE.leaks(model, x), WHOLE.conserved(model, x)
            assert list(leaks) == ["dead fields", "constants", "other"]
            close(conserved + sum(leaks.values()), torch.ones(3).double())
            found = [c for c, share in leaks.items() if share.abs().max() > 1e-9]
            assert found == [cause] if cause == "dead fields" else cause in found
            assert leaks["other"].abs().max() < 1e-12
    assert (WHOLE.leaks(dead, x)["dead fields"] == 0).tolist() == [True, False, True]
    # vectors that are zero themselves: where the pass starts, and ahead of an activation that is not zero there
    blank = Calls(lambda t: t)
    blank.conv.bias = None
    tail = Calls(lambda t: F.conv2d(F.softplus(F.conv2d(t, noise(4, 4, 1, 1))), noise(4, 4, 1, 1, seed=1)))
    tail.conv.bias = None
    for model in (blank, tail):
        leaks = WHOLE.leaks(model, x)
        assert (leaks["dead fields"].abs() > 1e-3).tolist() == [False, True, False]
        assert leaks["other"].abs().max() < 1e-12
    close(WHOLE.leaks(blank, x)["dead fields"][1], torch.tensor(4 / 16, dtype=torch.float64))
    absorbed = WHOLE.leaks(token, x[:1])["constants"]
    close(
        absorbed, torch.tensor([4 / 20], dtype=torch.float64)
    )  # a row of 4 in 20 positions, none of which came from x


def _start_of(model: Tokens, x: Tensor) -> Tensor:
    """The contrastive start, written out."""
    tokens = model.tokens(x).requires_grad_()
    y = model.head(model.pick(tokens))
    (slope,) = torch.autograd.grad((y.max(1).values - y.mean(1)).sum(), tokens)
    return torch.relu((slope.mean(1, keepdim=True) * tokens).sum(-1)).detach()


def test_leaks_take_starts_and_targets_as_the_map_does() -> None:
    model, x = Tokens(), noise(2, 3, 4, 4)
    start = noise(2, 5, seed=16)
    leaks = SRD().leaks(model, x, start=start)
    close(SRD().conserved(model, x, start=start) + sum(leaks.values()), torch.ones(2).double())
    for target in (None, 2, torch.tensor(2), torch.tensor([1, 3])):
        shares = torch.stack([*SRD().leaks(model, x, target).values()]).sum(0)
        close(SRD().conserved(model, x, target) + shares, torch.ones(2).double())
    padded = Tokens(pick=lambda t: F.pad(t[:, 0, 1:], (1, 0), value=2.0))  # behind the encoder nothing leaks
    for cause, share in SRD().leaks(padded, x).items():
        close(share, SRD(encoder="ln").leaks(padded, x)[cause])
        close(share, SRD().leaks(padded, x, start=_start_of(padded, x))[cause])
    nothing = SRD().leaks(model, x, start=torch.zeros(2, 5))
    assert all((share == 0).all() for share in nothing.values())
    with pytest.raises(BadInput, match=r"start must hold the relevance at the encoder output"):
        SRD().leaks(model, x, start=start[:, :3])
    with pytest.raises(BadInput, match=r"one target per image"):
        SRD().leaks(model, x, torch.tensor([1, 2, 3]))
    scalar = SRD(unit="scalar").leaks(model, x)
    assert scalar["other"].abs().max() > 1e-3  # biases take no share, by design


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pick",
    [
        lambda t: t[:, 0],
        lambda t: t.mean(1),
        lambda t: t[:, :1].flatten(1),
        lambda t: t.mean(dim=1, keepdim=True).squeeze(1),
        lambda t: t.select(1, 2),
        lambda t: t.amax(1),
    ],
)
def test_the_encoder_of_a_transformer_ends_in_its_last_tokens(pick: Any) -> None:
    model, x = Tokens(pick=pick), noise(2, 3, 4, 4)
    found = SRD().relevance(model, x)
    named = SRD(encoder="ln").relevance(model, x)
    assert list(found) == ["input", "relu", "blocks.0.activation", "blocks.1.activation"]
    assert [tuple(r.shape) for r in found.values()] == [(2, 4, 4), (2, 2, 2), (2, 5), (2, 5)]
    assert all(torch.equal(a, b) for a, b in zip(found.values(), named.values(), strict=True))
    start = _start_of(model, x)
    assert start.max() > 0
    given = SRD().relevance(model, x, start=start)
    for a, b in zip(found.values(), given.values(), strict=True):
        close(a, b)
    ones = SRD().relevance(model, x, start="ones")
    for a, b in zip(ones.values(), SRD().relevance(model, x, start=torch.ones(2, 5)).values(), strict=True):
        assert torch.equal(a, b)


def test_relevance_of_tokens_is_that_of_patches_and_of_the_class_token() -> None:
    model, x = Tokens(), noise(2, 3, 4, 4)
    relevance = SRD().relevance(model, x)
    for level in ("blocks.1.activation", "blocks.0.activation"):
        patches = relevance[level][:, 1:].unflatten(1, (2, 2))
        assert torch.equal(SRD(level=level).explain(model, x), patches)
    with pytest.raises(
        Refused, match=r"level 'low' holds no relevance that a patch has of its own: the logits read none"
    ):
        SRD(level="low").explain(model, x)
    mean = Tokens(pick=lambda t: t.mean(1))
    close(SRD(level="low").explain(mean, x), _start_of(mean, x)[:, 1:].unflatten(1, (2, 2)))
    assert SRD(level="relu").explain(model, x).shape == (2, 2, 2)
    with pytest.raises(BadInput, match=r"shape \(2, 5\), got \(2, 2, 2\)"):
        SRD().relevance(model, x, start=torch.ones(2, 2, 2))
    fields = SRD().erf(model, x, "blocks.1.activation", [(0,), (4,)])
    assert fields.shape == (2, 2, 4, 4)
    mu = SRD().sharing_ratio(model, x, "blocks.0.activation", "blocks.1.activation")
    assert mu.shape == (2, 5, 5)
    last = SRD().sharing_ratio(model, x, "input", "blocks.1.activation")
    close(last[:, [0, 4]], fields)
    with pytest.raises(
        SrdLabError, match=r"position \(0, 1\) is outside the map of blocks.1.activation, \(5,\)"
    ):
        SRD().erf(model, x, "blocks.1.activation", [(0, 1)])


def test_channels_last_maps_lie_as_images_do() -> None:
    model, x = Last(), noise(2, 3, 8, 4)
    relevance = SRD(start="ones").relevance(model, x)
    assert relevance["gelu"].shape == (2, 4, 2)
    shown = torch.zeros(2, 3, 8, 4).double()
    shown[:, :, 6:, 2:] = 5 + noise(2, 3, 2, 2)  # only the last patch is lit
    model.norm, model.depthwise = nn.Identity(), nn.Identity()
    model.stem.bias.zero_()
    for layer in ("ln", "fc1", "fc2"):
        getattr(model, layer).bias.zero_()
    lit = SRD(start="ones").relevance(model, shown)["gelu"]
    assert (lit[:, 3, 1] != 0).all()
    lit[:, 3, 1] = 0
    assert lit.abs().max() == 0


def test_activations_on_constants_hold_no_relevance() -> None:
    """Swin V2 makes its position bias by a small network on a table."""
    table, x = noise(1, 4, 4, 4, seed=21), noise(2, 3, 4, 4)
    model = Calls(lambda t: torch.tanh(t + F.gelu(table)))
    assert list(WHOLE.relevance(model, x)) == ["input", "relu", "tanh"]
    with pytest.raises(BadValue, match=r"no activation call is named 'gelu'.*; the calls are: relu, tanh"):
        SRD(encoder="", start="ones", level="gelu").explain(model, x)


def test_an_encoder_that_puts_the_batch_second_is_refused() -> None:
    model = Calls(lambda t: tokens_of(t).transpose(0, 1))
    with pytest.raises(Refused, match=r"shape \(16, 2, 4\) for 2 images; expected one row per image"):
        WHOLE.explain(model, noise(2, 3, 4, 4))


FOLLOWED: list[tuple[Callable[[Tensor], Any], tuple[int, ...], int, int | None]] = [
    # what is done to a tensor, its shape, its channel axis before and after: None where it has no one axis any more
    (lambda t: t.permute(0, 2, 3, 1), (2, 3, 4, 5), 1, 3),
    (lambda t: torch.permute(t, (0, 3, 1, 2)), (2, 3, 4, 5), 3, 1),
    (lambda t: t.transpose(1, -1), (2, 3, 4, 5), 1, 3),
    (lambda t: torch.swapaxes(t, 1, 2), (2, 3, 3), 1, 2),
    (lambda t: t.movedim(1, 2), (2, 3, 3, 3), 1, 2),
    (lambda t: t.mT, (2, 4, 4), 1, 2),
    (lambda t: t.flatten(2), (2, 4, 4, 4), 1, 1),
    (lambda t: t.flatten(1, 2), (2, 4, 4, 4), 3, 2),
    (lambda t: t.reshape(2, 4, -1), (2, 4, 4, 4), 1, 1),
    (lambda t: t.permute(0, 2, 3, 1).reshape(2, 16, 4), (2, 4, 4, 4), 1, 2),
    (lambda t: t.reshape(2, 4, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 4, 4, 4), (2, 4, 4, 4), 1, 3),
    (lambda t: t.view(2, 2, 2, 3), (2, 4, 3), 2, 3),
    (lambda t: t.unflatten(1, (2, 2)), (2, 4, 3), 2, 3),
    (lambda t: t.unsqueeze(1), (2, 4, 3), 1, 2),
    (lambda t: t.squeeze(2), (2, 4, 1, 3), 1, 1),
    (lambda t: t[:, 0], (2, 4, 3), 2, 1),
    (lambda t: t[:, :, 0], (2, 4, 3, 3), 1, 1),
    (lambda t: t[:, None], (2, 4, 3), 1, 2),
    (lambda t: t[..., ::2, 1:, :], (2, 4, 3, 3), 3, 3),
    (lambda t: t.select(1, 0), (2, 4, 3, 3), 3, 2),
    (lambda t: t.chunk(3, -1)[1], (2, 3, 3, 6), 3, 3),
    (lambda t: t.unbind(1)[0], (2, 3, 3, 6), 3, 2),
    (lambda t: torch.cat([t, t], 1), (2, 4, 3), 1, 1),
    (lambda t: t + 1, (2, 4, 4), 1, 1),
    (lambda t: t.mul_(2), (2, 4, 4), 1, 1),
    (lambda t: F.pad(t, (0, 0, 1, 1)), (2, 4, 4, 3), 3, 3),
    (lambda t: t.roll(1, 1), (2, 4, 4, 3), 3, 3),
    (lambda t: t.mean(1, keepdim=True), (2, 4, 4, 3), 3, 3),
    (lambda t: t.expand(5, -1, -1, -1), (1, 4, 4, 4), 3, 3),
    (lambda t: t.contiguous(), (2, 4, 4), 1, 1),
    (lambda t: t.transpose(2, 3).reshape(2, 4, 12), (2, 4, 4, 3), 1, 1),  # copied
    (lambda t: t.unflatten(-1, (2, 4)), (2, 5, 8), 2, None),  # along both
    (lambda t: t.unflatten(-1, (2, 4)).mean(2), (2, 5, 8), 2, 2),
    (lambda t: t.unflatten(-1, (2, 4)).transpose(1, 2).mean(1), (2, 5, 8), 2, 2),
    (lambda t: t.mean((1, 2)), (2, 4, 4, 3), 3, 1),
    (lambda t: t.amax((1, 2), keepdim=True), (2, 4, 4, 3), 3, 3),
    (lambda t: t.max(2)[0], (2, 4, 4, 3), 1, 1),
    (lambda t: torch.rot90(t, 1, (1, 2)), (2, 4, 5, 3), 1, 2),
    (lambda t: torch.rot90(t, 2, (1, 2)), (2, 4, 5, 3), 1, 1),
    (lambda t: t.repeat(2, 1, 1, 1), (4, 5, 3), 1, 2),
    (lambda t: t[:, :, [0, 1], [1, 0]], (2, 4, 3, 3), 1, 1),
    (lambda t: t[:, [[0, 1], [1, 2]]], (2, 4, 3), 1, None),
    (lambda t: torch.ones(6, 3) @ t, (2, 5, 3, 4), 1, 1),
    (lambda t: torch.ones(6, 3) @ t, (2, 3, 4), 1, 1),
    (lambda t: t @ torch.ones(4), (2, 5, 3, 4), 1, 1),
    (lambda t: torch.matmul(t, torch.ones(2, 5, 4, 6)), (2, 5, 3, 4), 1, 1),
    (lambda t: F.fold(F.unfold(t, 2), (4, 4), 2), (2, 3, 4, 4), 1, 1),
    (lambda t: torch.tensordot(t, torch.ones(3, 6), ([1], [0])), (2, 3, 4, 4), 1, 3),
    (lambda t: t @ torch.ones(4, 6), (2, 5, 3, 4), 1, 3),
    (lambda t: t.transpose(1, 2).reshape(2, 3, 8), (2, 2, 3, 4), 3, None),  # heads gathered
    (lambda t: F.unfold(t, 2, stride=2), (2, 3, 4, 4), 1, 1),
    (lambda t: t.reshape(-1, 2, 2, 2), (2, 4, 8), 1, None),  # merged with the images, of which
    (lambda t: t.reshape(-1, 2, 2, 2), (1, 4, 8), 1, None),  # there is one
    (lambda t: t.view(2, 2, 3, 4, 4).transpose(1, 2).reshape(2, 6, 4, 4), (2, 6, 4, 4), 1, 1),  # shuffled
    (lambda t: t.squeeze(0), (1, 4, 3, 3), 1, 0),
]


@pytest.mark.parametrize("i", range(len(FOLLOWED)))
def test_the_channel_axis_is_followed(i: int) -> None:
    function, shape, before, after = FOLLOWED[i]

    class Follows(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            known = [u for u in tensors_in(args) if records[u] != Record()]
            out = func(*args, **(kwargs or {}))
            if known:
                channels.follow(func, args, kwargs or {}, known[0], channels.of(known[0]), out)
            return out

    records, t = Records(), torch.zeros(shape)
    channels = Channels(records)
    channels.put(t, before)
    with Follows():
        out = function(t)
    assert (None if records[out].adrift else channels.of(out)) == after


def test_where_channels_lie_when_nothing_is_known() -> None:
    assert [Channels(Records()).of(torch.zeros([2] * dims)) for dims in (1, 2, 3, 4, 5, 6)] == [
        0,
        1,
        2,
        1,
        4,
        5,
    ]


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_script_prints_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    made = architectures.random_network
    monkeypatch.setattr(
        architectures,
        "random_network",
        lambda name, side, seed: small_vit(64, 32, 12) if name == "vit_b_32" else made(name, side, seed=seed),
    )
    run = CliRunner().invoke(
        architectures.main, ["--model", "squeezenet1_1", "--model", "vit_b_32", "--images", "1", "--markdown"]
    )
    assert run.exit_code == 0, run.output
    lines = run.output.splitlines()
    squeeze, vit = (line.split() for line in lines[2:4])
    assert squeeze[:7] == ["squeezenet1_1", "64", "26", "1.0000", "0", "0", "0"]
    assert vit[:3] == ["vit_b_32", "64", "12"]
    assert 0.5 < float(vit[3]) < 1
    assert float(vit[3]) + float(vit[5]) == pytest.approx(1, abs=2e-4)
    assert lines[5].startswith("| architecture | px | activations | conserved | dead fields |")
    assert lines[7].startswith("| squeezenet1_1 | 64 | 26 | 1.0000 | 0 | 0 | 0 | ")
    refused = architectures.reach("mine", Calls(torch.abs), noise(1, 3, 4, 4), WHOLE)
    assert architectures.rows([refused])[0][:2] == ["mine", "4"]
    assert architectures.rows([refused])[0][2].startswith("refuses: torch.abs in Calls is neither affine")
