"""Attention rolled out, against the formulas on matrices that the tests read off a transformer of known structure."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
import torch.nn.functional as F
from small_transformers import HEADS, WRITTEN, Attention, SmallViT
from torch import Tensor, nn

from srd_lab import catalogue
from srd_lab.errors import Refused
from srd_lab.methods.rollout import AttentionRollout, GradientRollout
from srd_lab.registry import make_explainer, refusals
from srd_lab.types import Explainer

METHODS: dict[str, Explainer] = {"attention": AttentionRollout(), "gradient": GradientRollout()}


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class ByHand(Attention):
    """An attention that keeps its matrix, for autograd to ask."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for w, b in zip(self.mha.in_proj_weight.chunk(3), self.mha.in_proj_bias.chunk(3), strict=True)
        )
        self.matrix = torch.exp(q @ k.mT / sqrt(q.shape[-1]))
        self.matrix = self.matrix / self.matrix.sum(-1, keepdim=True)
        return self.mha.out_proj((self.matrix @ v).transpose(1, 2).flatten(2))


def literal(vit: SmallViT, image: Tensor, target: int, kind: str) -> Tensor:
    """The map (h, w) of one image (1, C, H, W), token by token as the papers write it."""
    for block in vit.blocks:
        block.attention.__class__ = ByHand
    score = vit(image.clone().requires_grad_())[0, target]
    matrices = [block.attention.matrix for block in vit.blocks]
    slopes = torch.autograd.grad(score, matrices)
    tokens = matrices[0].shape[-1]
    rolled = torch.eye(tokens, dtype=torch.float64)
    for matrix, slope in zip(matrices, slopes, strict=True):  # from the image up
        layer = torch.zeros(tokens, tokens).double()
        for head in range(HEADS):
            a, g = matrix[0, head].detach(), slope[0, head]
            layer += (0.5 * a if kind == "attention" else (a * g).clamp_min(0)) / HEADS
        if kind == "attention":
            rolled = (layer + 0.5 * torch.eye(tokens)) @ rolled
        else:
            rolled = rolled + layer @ rolled
    read = {"class": [0], "mean": [*range(vit.prefix, tokens)], "both": [*range(tokens)]}[vit.pool]
    row = sum(rolled[i] for i in read) / len(read)
    return row[vit.prefix :].view(image.shape[2] // 4, image.shape[3] // 4)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize(("pool", "prefix"), [("class", 1), ("mean", 2), ("both", 1), ("class", 5)])
def test_maps_equal_their_formulas(kind: str, written: str, pool: str, prefix: int) -> None:
    vit, x = SmallViT(written, pool=pool, prefix=prefix, depth=3), pixels(2, 3, 12, 16)
    got, logits = METHODS[kind].explain_with_logits(vit, x, torch.tensor([2, 0]))
    torch.testing.assert_close(logits, vit(x))
    for map_, image, target in zip(got, x, (2, 0), strict=True):
        expected = literal(SmallViT(pool=pool, prefix=prefix, depth=3), image[None], target, kind)
        torch.testing.assert_close(map_, expected, rtol=1e-10, atol=1e-10 * float(expected.max()))


def test_attention_rollout_says_nothing_of_the_class_and_sums_to_what_patches_take() -> None:
    vit, x = SmallViT(pool="mean", prefix=0), pixels(2, 3, 12, 16)
    maps = [AttentionRollout().explain(vit, x, target) for target in (0, 1)]
    assert torch.equal(*maps)
    torch.testing.assert_close(maps[0].sum((1, 2)), torch.ones(2).double())  # no token beside patches
    assert not torch.equal(*(GradientRollout().explain(vit, x, target) for target in (0, 1)))


class Tall(nn.Module):
    """A network that makes ``function`` of its tokens (N, 12, 8), behind one attention unless ``alone``."""

    def __init__(self, function: str, alone: bool = False) -> None:
        super().__init__()
        self.vit, self.function, self.alone = SmallViT(prefix=0, pool="mean", depth=1), function, alone

    def forward(self, x: Tensor) -> Tensor:
        t = self.vit.tokens(x)
        t = t if self.alone else self.vit.blocks(t)
        return self.vit.head(getattr(self, self.function)(t).mean(1))

    def windows(self, t: Tensor) -> Tensor:
        folded = t.unflatten(1, (2, 6)).flatten(0, 1)
        return F.scaled_dot_product_attention(folded, folded, folded).unflatten(0, (-1, 2)).flatten(1, 2)

    def fewer(self, t: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(t[:, None], t[:, None, ::2], t[:, None, ::2])[:, 0]

    def one(self, t: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(t[:, None, :1], t[:, None], t[:, None])[:, 0]

    def talking(self, t: Tensor) -> Tensor:
        weights = (t @ t.mT)[:, None].softmax(-1)
        return (weights * 0.5 + weights.flip(1) * 0.5)[:, 0] @ t

    def of_channels(self, t: Tensor) -> Tensor:
        """As many channels as tokens, which attend to each other."""
        wide = torch.cat([t, t[..., :4]], 2).mT[:, None]
        return ((wide @ wide.mT).softmax(-1) @ wide)[:, 0].mT[..., :8]

    def of_channels_in_one_call(self, t: Tensor) -> Tensor:
        wide = torch.cat([t, t[..., :4]], 2).mT[:, None]
        return F.scaled_dot_product_attention(wide, wide, wide)[:, 0].mT[..., :8]

    def pruned(self, t: Tensor) -> Tensor:
        t = t[:, :-1]
        return F.scaled_dot_product_attention(t[:, None], t[:, None], t[:, None])[:, 0]


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(
    ("function", "alone", "message"),
    [
        (
            "windows",
            False,
            r"attention in Tall has weights of shape \(4, 6, 6\) for 2 images; expected \(N, heads, T, T\)",
        ),
        ("windows", True, r"attention in Tall has weights of shape \(4, 6, 6\) for 2 images"),
        ("fewer", False, r"weights of shape \(2, 1, 12, 6\) for 2 images"),
        ("one", False, r"weights of shape \(2, 1, 1, 12\) for 2 images"),
        ("pruned", False, r"weights of shape \(2, 1, 11, 11\) for 2 images"),
        ("pruned", True, r"it is not known where the 11 tokens that attention is over lie in the image"),
        (
            "of_channels",
            False,
            r"it is not known where the 12 tokens that attention is over lie in the image",
        ),
        ("of_channels_in_one_call", False, r"it is not known where the 12 tokens that attention is over lie"),
        ("talking", False, r"the softmax in Tall does not weight values by a product of matrices"),
    ],
)
def test_what_cannot_be_rolled_out_is_refused(kind: str, function: str, alone: bool, message: str) -> None:
    with pytest.raises(Refused, match=message):
        METHODS[kind].explain(Tall(function, alone), pixels(2, 3, 12, 16), 1)


class SideBySide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit, self.other = (
            SmallViT(prefix=0, pool="mean", depth=1),
            SmallViT(prefix=0, pool="mean", depth=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x) + self.other(x)


@pytest.mark.parametrize("kind", METHODS)
def test_attention_that_does_not_follow_attention_is_refused(kind: str) -> None:
    with pytest.raises(Refused, match=r"attention in other.* does not read what that in vit.* puts out"):
        METHODS[kind].explain(SideBySide(), pixels(2, 3, 12, 16), 1)


@pytest.mark.parametrize("kind", METHODS)
def test_networks_without_attention_are_refused(kind: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3), nn.Softmax(1))
    with pytest.raises(
        Refused, match=r"the network has no attention, softmax\(q k\^T\) v, .*use a method for any"
    ):
        METHODS[kind].explain(network.double().eval(), pixels(2, 3, 8, 8), 1)


def test_what_needs_attention_is_left_out_where_there_is_none() -> None:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ]
    network, needing = nn.Sequential(*layers).double().eval(), {"attention_rollout", "gradient_rollout"}
    assert set(catalogue.METHODS) - set(catalogue.for_any_network()) == needing
    asked = ("gradient", "attention_rollout", "gradcam", "gradient_rollout")
    refused = refusals(network, pixels(1, 3, 8, 8), {name: make_explainer(name) for name in asked})
    assert set(refused) == needing
    assert all(why.count("\n") == 0 and "has no attention" in why for why in refused.values())
