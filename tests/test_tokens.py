"""Maps on the tokens of transformers: at which layer, at which place, without class and register tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_transformers import WRITTEN, SmallViT
from test_cam import CAMS, LITERAL
from torch import Tensor, nn

from srd_lab.engine.coordinates import Coordinates
from srd_lab.engine.token_grid import grid_of
from srd_lab.errors import Refused
from srd_lab.methods.cam import GradCAM, LayerCAM
from srd_lab.methods.fullgrad import FullGrad
from srd_lab.methods.srd import SRD

pytestmark = pytest.mark.filterwarnings("ignore:no map that all of the relevance passes")
POOLS = [("class", 1), ("class", 3), ("mean", 0), ("mean", 2), ("both", 1)]


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * float(b.abs().max()) + 1e-300)


class Halves:
    """A :class:`SmallViT` cut at the layer of its maps, written out: class and register tokens are kept from the last front.

    Where the head reads the class token alone, the cut is what the last attention reads, and else what the head reads.
    """

    def __init__(self, vit: SmallViT) -> None:
        self.vit, self.last = vit, vit.blocks[-1]
        self.kept: Tensor = torch.empty(0)
        self.residual: Tensor = torch.empty(0)

    def front(self, x: Tensor) -> Tensor:
        rows, columns = (side // 4 for side in x.shape[2:])
        t = self.vit.tokens(x)
        if self.vit.pool == "class":
            self.residual = self.vit.blocks[:-1](t)
            t = self.last.norm1(self.residual)
        else:
            t = self.vit.norm(self.vit.blocks(t))
        self.kept = t[:, : self.vit.prefix].detach()
        return t[:, self.vit.prefix :].transpose(1, 2).unflatten(2, (rows, columns))

    def back(self, a: Tensor) -> Tensor:
        t = torch.cat([self.kept, a.flatten(2).transpose(1, 2)], 1)
        if self.vit.pool == "class":
            t = self.residual.detach() + self.last.attention(t)
            t = self.vit.norm(t + self.last.fc2(self.last.act(self.last.fc1(self.last.norm2(t)))))
        return self.vit.head(self.vit.read(t))


@pytest.mark.parametrize(("pool", "prefix"), POOLS)
@pytest.mark.parametrize("name", CAMS)
def test_maps_are_those_of_the_last_patches_that_the_logits_are_made_of(
    name: str, pool: str, prefix: int
) -> None:
    vit, x = SmallViT(pool=pool, prefix=prefix), pixels(2, 3, 12, 16)
    vit.head.bias += 3  # a logit > 0, as Ablation-CAM divides by it
    for level in ("low", "high"):
        got = CAMS[name](level=level).explain(vit, x, 1)
        assert got.shape == (2, 3, 4)
        for map_, image in zip(got, x, strict=True):
            halves = Halves(vit)
            close(map_, LITERAL[name](halves.front, halves.back, image[None], 1))


@pytest.mark.parametrize("written", WRITTEN)
def test_one_attention_in_all_spellings_has_one_map(written: str) -> None:
    x = pixels(2, 3, 12, 16)
    methods = [GradCAM(), LayerCAM(level="high"), SRD(start="ones"), SRD(start="ones", level="blocks.0")]
    if written != "mha":  # the biases within are not seen
        methods.append(FullGrad())
    for method in methods:
        close(method.explain(SmallViT(written), x, 1), method.explain(SmallViT("sdpa"), x, 1))


class Sorted(nn.Module):
    """A small vision transformer whose tokens stand in another order; ``order`` takes (N, T, C) and gives it."""

    def __init__(self, order: Callable[[Tensor], Tensor], pool: str = "mean") -> None:
        super().__init__()
        self.vit, self.order = SmallViT(prefix=0, pool=pool), order

    def forward(self, x: Tensor) -> Tensor:
        t = self.vit.stem(x).flatten(2).transpose(1, 2)
        return self.vit.head(self.vit.norm(self.vit.blocks(self.order(t))).mean(1))


@pytest.mark.parametrize(
    "order",
    [
        lambda t: t.flip(1),
        lambda t: t.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2),
        lambda t: t[:, torch.randperm(12, generator=torch.Generator().manual_seed(1))],
        lambda t: torch.cat([t[:, 6:], torch.full_like(t[:, :2], 0.3), t[:, :6]], 1)[
            :, [*range(6), *range(8, 14)]
        ],
    ],
)
def test_tokens_are_laid_where_they_come_from_in_whatever_order(order: Callable[[Tensor], Tensor]) -> None:
    """Without positions, attention and means do not know the order."""
    x = pixels(2, 3, 12, 16)
    for method in (GradCAM(), LayerCAM(), FullGrad(), SRD(start="ones", level="low")):
        close(method.explain(Sorted(order), x, 1), method.explain(Sorted(lambda t: t), x, 1))


@pytest.mark.parametrize(
    "order",
    [
        lambda t: t[:, :-1],
        lambda t: torch.cat([t, t[:, :1]], 1),
        lambda t: torch.linalg.qr(torch.ones(12, 12, dtype=t.dtype).tril())[0] @ t,
        lambda t: t.sort(1).values,
    ],
)
def test_tokens_that_are_no_grid_are_refused(order: Callable[[Tensor], Tensor]) -> None:
    x = pixels(2, 3, 12, 16)
    for method in (GradCAM(), SRD(start="ones", level="low")):
        with pytest.raises(Refused, match=r"level 'low' holds tokens of which it is not known where"):
            method.explain(Sorted(order), x, 1)


@pytest.mark.parametrize("level", ["low", "blocks.1", "blocks.0.act"])
def test_relevance_of_tokens_is_laid_on_their_patches(level: str) -> None:
    vit, x = SmallViT(prefix=3, pool="both"), pixels(2, 3, 12, 16)
    got = SRD(start="ones", level=level).explain(vit, x, 1)
    found = SRD(start="ones").relevance(vit, x, 1)
    tokens = (
        torch.ones(2, 15).double()
        if level == "low"
        else found[{"blocks.1": "blocks.1.act"}.get(level, level)]
    )
    assert torch.equal(got, tokens[:, 3:].unflatten(1, (3, 4)))
    assert level == "low" or (tokens[:, :3] != 0).any()


def test_an_encoder_by_name_is_taken_as_it_is() -> None:
    vit, x = SmallViT(), pixels(2, 3, 12, 16)
    outputs: list[Tensor] = []
    vit.blocks[0].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    got = LayerCAM(encoder="blocks.0").explain(vit, x, 1)
    leaf = x.clone().requires_grad_()
    outputs.clear()
    logits = vit(leaf)
    (slope,) = torch.autograd.grad(logits[:, 1].sum(), outputs[-1])
    close(got, (slope.relu() * outputs[-1]).sum(2).relu()[:, 1:].unflatten(1, (3, 4)).detach())
    behind = GradCAM(encoder="norm").explain(vit, x, 1)  # where only the class token is read
    assert not behind.any()


def test_the_layer_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from srd_lab.engine import last_tokens

    searched, search = [], last_tokens._searched
    monkeypatch.setattr(last_tokens, "_searched", lambda *a: (searched.append(1), search(*a))[1])
    vit, x = SmallViT(), pixels(2, 3, 12, 16)
    for _ in range(3):
        GradCAM().explain(vit, x)
    assert searched == [1]


def test_fullgrad_sees_the_biases_within_one_call_of_attention() -> None:
    """Those of queries, keys, values and the projection, where the tokens lie."""
    x = pixels(2, 3, 20, 12)
    whole, apart = SmallViT("mha"), SmallViT("apart")
    close(FullGrad().terms(whole, x, 1), FullGrad().terms(apart, x, 1))
    close(FullGrad().explain(whole, x, 1), FullGrad().explain(apart, x, 1))
    before = FullGrad().explain(whole, x, 1)
    whole.blocks[0].attention.mha.in_proj_bias[8:].zero_()
    assert (FullGrad().explain(whole, x, 1) - before).abs().max() > 0.01


def test_fullgrad_refuses_tokens_whose_first_axis_is_not_the_images() -> None:
    class TokensFirst(SmallViT):
        def tokens(self, x: Tensor) -> Tensor:
            return super().tokens(x).transpose(0, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.tokens(x))[0])  # type: ignore[no-any-return]

    with pytest.raises(Refused, match=r"output of a layer with a bias .*expected the batch first"):
        FullGrad().explain(TokensFirst(), pixels(2, 3, 20, 12), 1)


def test_fullgrad_shows_the_biases_of_tokens_where_they_lie() -> None:
    """A transformer whose only bias is that of one linear layer on tokens."""
    vit, x = SmallViT(pool="mean", prefix=2), pixels(2, 3, 12, 16)
    for name, p in vit.named_parameters():
        if name.endswith("bias"):
            p.zero_()
    vit.blocks[0].fc2.bias += torch.arange(8.0)
    vit.blocks[0].act = vit.blocks[1].act = nn.Identity()
    biased: list[Tensor] = []
    vit.blocks[0].fc2.register_forward_hook(lambda module, inputs, output: biased.append(output))
    got = FullGrad().explain(vit, x, 1)
    leaf = x.clone().requires_grad_()
    biased.clear()
    score = vit(leaf)[:, 1].sum()
    of_input, of_bias = torch.autograd.grad(score, [leaf, biased[-1]])
    product = (of_bias * vit.blocks[0].fc2.bias)[:, 2:].transpose(1, 2).unflatten(2, (3, 4))

    def shown(p: Tensor) -> Tensor:
        low, high = p.abs().amin((1, 2, 3), keepdim=True), p.abs().amax((1, 2, 3), keepdim=True)
        large = nn.functional.interpolate((p.abs() - low) / (high - low), x.shape[2:], mode="bilinear")
        return large.sum(1)

    close(got, shown(of_input * x) + shown(product))


@pytest.mark.parametrize("axis", [1, 2])
def test_a_grid_is_one_place_per_cell(axis: int) -> None:
    def coordinates(rows: list[float], columns: list[float], **change: Any) -> Coordinates:
        made = [
            torch.tensor(t, dtype=torch.float64)[None, :, None].expand(2, -1, 5).clone()
            for t in (rows, columns)
        ]
        if change:
            made[0][change["at"]] = change["to"]
        return Coordinates(*(t.movedim(1, 3 - axis) for t in made), (8, 8))

    nan = float("nan")
    whole = ([nan, 2, 2, 6, 6], [nan, 2, 6, 2, 6])
    found = grid_of(coordinates(*whole), axis)
    assert found is not None
    assert found.cells.tolist() == [[1, 2], [3, 4]]
    assert found.lies(5).tolist() == [False, True, True, True, True]
    t = torch.arange(10.0).view(1, 5, 2)
    assert found.lay(t if axis == 2 else t.mT, axis).tolist() == [[[[2, 4], [6, 8]], [[3, 5], [7, 9]]]]
    assert grid_of(coordinates([2, 2, 6], [2, 6, 2]), axis) is None  # a cell is empty
    assert grid_of(coordinates([2, 2, 6, 6, 6], [2, 6, 2, 6, 6]), axis) is None  # one is taken twice
    assert (
        grid_of(coordinates(*whole, at=(1, 2, 0), to=6.0), axis) is None
    )  # that of another image lies elsewhere
    assert grid_of(coordinates([nan, 2], [nan, 2]), axis) is None
