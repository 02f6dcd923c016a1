"""AttnLRP against its rules, written out in relevance instead of signals, and against the authors' library."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_transformers import HEADS, WRITTEN, Block, SmallViT
from test_methods import Mixed, directional
from torch import Tensor, nn

from srd_lab.errors import BadValue
from srd_lab.methods.lrp import AttnLRP, LRPEpsilon

EXACT = AttnLRP(epsilon=1e-14)
Backward = Callable[[Tensor], tuple[Tensor, ...]]  # relevance of an output to that of each input


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5


class ByRelevance:
    """The steps of a transformer on one image, (T, C), with the rules of the paper beside them."""

    @staticmethod
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Backward]:
        z = x @ weight.T if bias is None else x @ weight.T + bias
        return z, lambda r: (x * ((r / z) @ weight),)

    @staticmethod
    def product(a: Tensor, b: Tensor) -> tuple[Tensor, Backward]:
        """Proposition 3.3: R_ij = sum_k a_ij b_jk R_ik / (2 o_ik)."""
        o = a @ b
        return o, lambda r: (
            torch.einsum("...ij,...jk,...ik->...ij", a, b, r / (2 * o)),
            torch.einsum("...ij,...jk,...ik->...jk", a, b, r / (2 * o)),
        )

    @staticmethod
    def softmax(x: Tensor) -> tuple[Tensor, Backward]:
        """Proposition 3.1."""
        s = x.softmax(-1)
        return s, lambda r: (x * (r - s * r.sum(-1, keepdim=True)),)

    @staticmethod
    def norm(x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Backward]:
        """The deviation is a constant; centring and shift go by the epsilon rule."""
        n = x.shape[-1]
        scale = norm.weight / (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        centring = torch.eye(n, dtype=x.dtype) - 1 / n
        y = (x @ centring.T) * scale + norm.bias

        def back(r: Tensor) -> tuple[Tensor, ...]:
            return (x * (((r / y) * scale) @ centring),)

        return y, back

    @staticmethod
    def add(a: Tensor, b: Tensor) -> tuple[Tensor, Backward]:
        return a + b, lambda r: (a * r / (a + b), b * r / (a + b))


def through(block: Block, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A block on tokens (T, C): its output, and relevance of that to relevance of x."""
    by, attention = ByRelevance, block.attention.mha

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (HEADS, -1)).transpose(0, 1)

    y, of_norm1 = by.norm(x, block.norm1)
    made = [
        by.linear(y, w, b)
        for w, b in zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    ]
    q, k, v = (heads(t) for t, _ in made)
    dots, of_dots = by.product(q, k.mT)
    weights, of_softmax = by.softmax(dots / sqrt(q.shape[-1]))
    mixed, of_mixed = by.product(weights, v)
    out, of_out = by.linear(
        mixed.transpose(0, 1).flatten(1), attention.out_proj.weight, attention.out_proj.bias
    )
    x1, of_first = by.add(x, out)
    z, of_norm2 = by.norm(x1, block.norm2)
    u, of_fc1 = by.linear(z, block.fc1.weight, block.fc1.bias)
    w, of_fc2 = by.linear(block.act(u), block.fc2.weight, block.fc2.bias)
    x2, of_second = by.add(x1, w)

    def back(r: Tensor) -> Tensor:
        residual, r = of_second(r)
        (r,) = of_fc2(r)  # and the activation passes all of it on
        r = residual + of_norm2(of_fc1(r)[0])[0]
        residual, r = of_first(r)
        r_weights, r_v = of_mixed(heads(of_out(r)[0]))
        r_q, r_k = of_dots(of_softmax(r_weights)[0])
        parts = (r_q, r_k.mT, r_v)
        r = sum(
            of_linear(part.transpose(0, 1).flatten(1))[0]
            for (_, of_linear), part in zip(made, parts, strict=True)
        )
        return residual + of_norm1(r)[0]

    return x2, back


def literal(vit: SmallViT, image: Tensor, target: int) -> Tensor:
    """Relevance (H, W) of the pixels of one image (C, H, W)."""
    by, backs = ByRelevance, []
    cut = F.unfold(image[None], 4, stride=4)[0].T
    patches, of_stem = by.linear(cut, vit.stem.weight.flatten(1), vit.stem.bias)
    t = torch.cat([vit.first[0], patches])
    for block in vit.blocks:
        t, back = through(block, t)
        backs.append(back)
    t, of_norm = by.norm(t, vit.norm)
    share = torch.zeros(1, len(t)).double()
    share[0, : 1 if vit.pool == "class" else None] = 1
    if vit.pool == "mean":
        share[0, : vit.prefix] = 0
    read = share / share.sum() @ t
    logit, of_head = by.linear(read, vit.head.weight[target][None], vit.head.bias[target][None])
    (r,) = of_head(logit)
    r = of_norm(t * (share / share.sum()).T * (r / read))[0]
    for back in reversed(backs):
        r = back(r)
    (r,) = of_stem(r[vit.prefix :])
    return F.fold(r.T[None], image.shape[1:], 4, stride=4)[0].sum(0)


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize(("pool", "prefix"), [("class", 1), ("mean", 2)])
@pytest.mark.parametrize("kind", [nn.GELU, nn.SiLU])
def test_maps_equal_the_rules_of_the_paper(
    written: str, pool: str, prefix: int, kind: type[nn.Module]
) -> None:
    vit, x = SmallViT(written, pool=pool, prefix=prefix, kind=kind), pixels(2, 3, 12, 16)
    got, logits = EXACT.explain_with_logits(vit, x, torch.tensor([2, 0]))
    torch.testing.assert_close(logits, vit(x))
    for map_, image, target in zip(got, x, (2, 0), strict=True):
        expected = literal(vit, image, target)
        torch.testing.assert_close(map_, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))


class Products(nn.Module):
    """Attention without softmax and a gated layer, no biases: all relevance arrives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stem, self.norm = nn.Conv2d(3, 6, 4, 4, bias=False), nn.LayerNorm(6, bias=False)
        self.qkv, self.gate, self.up = (nn.Linear(6, n, bias=False) for n in (18, 9, 9))
        self.head = nn.Linear(9, 3, bias=False)
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        t = self.norm(self.stem(x).flatten(2).mT)
        q, k, v = self.qkv(t).chunk(3, -1)
        t = t + torch.matmul(q @ k.mT, v) / 10
        return self.head((F.silu(self.gate(t)) * self.up(t)).mean(1))


def test_products_of_maps_pass_on_all_relevance() -> None:
    """As in EVA-02 and Llama: epsilon has no rule for them."""
    maps, logits = EXACT.explain_with_logits(Products(), pixels(2, 3, 12, 16), 1)
    torch.testing.assert_close(maps.sum((1, 2)), logits[:, 1], rtol=1e-8, atol=0)


def test_it_is_lrp_epsilon_where_no_maps_are_multiplied() -> None:
    x = pixels(2, 3, 10, 8)
    assert torch.equal(AttnLRP().explain(Mixed(), x, 1), LRPEpsilon().explain(Mixed(), x, 1))
    vit = SmallViT()
    ours, theirs = (
        AttnLRP().explain(vit, pixels(1, 3, 8, 8), 1),
        LRPEpsilon().explain(vit, pixels(1, 3, 8, 8), 1),
    )
    assert (ours - theirs).abs().max() > 0.01 * theirs.abs().max()


def test_the_map_can_be_differentiated() -> None:
    derivative, error = directional(
        lambda a: AttnLRP(epsilon=1e-2).explain(SmallViT(), a, 1), pixels(1, 3, 8, 8)
    )
    assert abs(derivative) > 1e-6
    assert error < 1e-6


def test_epsilon_is_positive() -> None:
    with pytest.raises(BadValue, match=r"LRP needs epsilon > 0, got 0"):
        AttnLRP(epsilon=0)


@pytest.mark.peers
@pytest.mark.parametrize("pool", ["class", "mean"])
def test_maps_equal_lxts(pool: str) -> None:
    """The transformer again, of LXT's functions with its rules."""
    lf: Any = pytest.importorskip("lxt.explicit.functional", reason="needs lxt: pip install lxt")
    rules: Any = pytest.importorskip("lxt.explicit.rules")
    vit, x = SmallViT(pool=pool, prefix=1), pixels(1, 3, 12, 16)

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def linear(t: Tensor, layer: nn.Linear) -> Tensor:
        out: Tensor = lf.linear_epsilon(t, layer.weight, layer.bias, 1e-12)
        return out

    def norm(t: Tensor, layer: nn.LayerNorm) -> Tensor:
        out: Tensor = lf.layer_norm(t, layer.weight, layer.bias, layer.eps)
        return out

    leaf = F.unfold(x, 4, stride=4).mT.clone().requires_grad_()
    patches = lf.linear_epsilon(leaf, vit.stem.weight.flatten(1), vit.stem.bias, 1e-12)
    t = torch.cat([vit.first, patches], 1)
    for block in vit.blocks:
        y, mha = norm(t, block.norm1), block.attention.mha
        scale = torch.cat([torch.full((8,), 1 / sqrt(8 // HEADS)), torch.ones(16)]).double()  # of queries
        packed = lf.linear_epsilon(y, mha.in_proj_weight * scale[:, None], mha.in_proj_bias * scale, 1e-12)
        q, k, v = (heads(part) for part in packed.chunk(3, -1))
        weights = lf.softmax(lf.matmul(q, k.mT, False, 1e-12), -1)
        mixed = lf.matmul(weights, v, False, 1e-12).transpose(1, 2).flatten(2)
        t = lf.add2(t, linear(mixed, mha.out_proj), False, 1e-12)
        u = linear(norm(t, block.norm2), block.fc1)
        t = lf.add2(t, linear(rules.IdentityRule(block.act)(u), block.fc2), False, 1e-12)
    t = norm(t, vit.norm)
    read = t[:, 0] if pool == "class" else lf.mean(t[:, 1:], 1, False, 1e-12)
    logits = linear(read, vit.head)
    signal = torch.zeros_like(logits)
    signal[0, 2] = logits[0, 2].detach()  # LXT's signals are relevance
    (relevance,) = torch.autograd.grad(logits, leaf, signal)
    expected = F.fold(relevance.mT, x.shape[2:], 4, stride=4).sum(1)
    got = EXACT.explain(vit, x, 2)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4 * float(got.abs().max()))
