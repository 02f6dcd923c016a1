"""A small vision transformer whose structure is known, in every way to write attention and to pool tokens."""

from __future__ import annotations

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WRITTEN = ("sdpa", "mha", "softmax", "einsum")  # and "apart": mha's three linear layers, one by one
HEADS = 2


class Attention(nn.Module):
    """Self-attention, written in one of the ways of ``WRITTEN``; all of the same weights."""

    def __init__(self, width: int, written: str) -> None:
        super().__init__()
        self.written, self.mha = written, nn.MultiheadAttention(width, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.written == "mha":
            y: Tensor = self.mha(x, x, x, need_weights=False)[0]
            return y
        weights, biases = self.mha.in_proj_weight, self.mha.in_proj_bias
        packed = [F.linear(x, weights, biases)]
        if self.written == "apart":
            packed = [F.linear(x, w, b) for w, b in zip(weights.chunk(3), biases.chunk(3), strict=True)]
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in torch.cat(packed, -1).chunk(3, -1))
        if self.written in ("sdpa", "apart"):
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.written == "softmax":
            y = F.dropout((q @ k.transpose(-2, -1) / sqrt(q.shape[-1])).softmax(-1), training=False) @ v
        else:
            attended = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) / sqrt(q.shape[-1]), dim=-1)
            y = torch.einsum("bhij,bhjd->bhid", attended, v)
        return self.mha.out_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, written: str, kind: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, written)
        self.fc1, self.act, self.fc2 = nn.Linear(width, 2 * width), kind(), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class SmallViT(nn.Module):
    """Patches of ``patch`` pixels, ``prefix`` tokens that are parameters in front of them, two blocks, and a head.

    written : how attention is spelled. pool : what the head reads: "class", "mean" of the patches, or "both" side by side.
    No weight is neutral, and no position is embedded, so that images of all sizes will do.
    """

    def __init__(
        self,
        written: str = "sdpa",
        prefix: int = 1,
        pool: str = "class",
        patch: int = 4,
        kind: type[nn.Module] = nn.GELU,
        classes: int = 4,
        depth: int = 2,
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        width = 8
        self.prefix, self.pool, self.stem = prefix, pool, nn.Conv2d(3, width, patch, patch)
        self.first = nn.Parameter(torch.empty(1, prefix, width))
        self.blocks = nn.Sequential(*(Block(width, written, kind) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width * (2 if pool == "both" else 1), classes)
        for name, p in self.named_parameters():
            if "norm" in name and name.endswith("weight"):
                nn.init.uniform_(p, 0.5, 1.5)
            else:
                nn.init.normal_(p, std=0.5 if p.dim() > 1 and name != "first" else 0.2)
        self.double().eval().requires_grad_(False)

    def tokens(self, x: Tensor) -> Tensor:
        patches = self.stem(x).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(len(x), -1, -1), patches], 1)

    def read(self, t: Tensor) -> Tensor:
        if self.pool == "class":
            return t[:, 0]
        mean = t[:, self.prefix :].mean(1)
        return mean if self.pool == "mean" else torch.cat([t[:, 0], mean], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(self.norm(self.blocks(self.tokens(x)))))
