"""Networks that fold patches, windows or views into the batch: the map of an image is its own, or there is one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import OPTIONS
from torch import Tensor, nn

from srd_lab.catalogue import for_any_network
from srd_lab.errors import Refused, SrdLabError
from srd_lab.methods.cam import GradCAM
from srd_lab.methods.fullgrad import FullGrad
from srd_lab.methods.lrp import ExcitationBackprop
from srd_lab.methods.srd import SRD
from srd_lab.registry import make_explainer

SIDE, WIDTH, CLASSES = 16, 6, 4
RUN = [name for name in for_any_network() if name not in ("random", "sobel")]


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights in which nothing is neutral."""
    chance = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = (torch.rand(parameter.shape, generator=chance) - 0.4) / parameter.shape[-1] ** 0.5
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)):
        norm.weight.data = 0.5 + torch.rand(norm.weight.shape, generator=chance)
    return model.double().eval()


def attended(x: Tensor, qkv: nn.Module) -> Tensor:
    """Attention with two heads within (rows, tokens, channels)."""
    rows, tokens, width = x.shape
    q, k, v = qkv(x).reshape(rows, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(rows, tokens, width)


class Nested(nn.Module):
    """Tokens of pixels inside tokens of patches: the pixels of all patches of all images lie along the batch."""

    def __init__(self, folded_first: bool) -> None:
        super().__init__()
        self.folded_first = folded_first
        self.proj = nn.Conv2d(3, WIDTH, 3, padding=1, stride=2)
        self.place = nn.Parameter(torch.zeros(1, WIDTH, 4, 4))
        self.qkv, self.narrow = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.outer_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(8)
        self.patch, self.first = nn.Linear(16 * WIDTH, 8), nn.Parameter(torch.zeros(1, 1, 8))
        self.outer, self.wide, self.back = nn.Linear(8, 24), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, CLASSES)

    def pixels(self, x: Tensor) -> Tensor:
        """(images * patches, WIDTH, 4, 4)."""
        if self.folded_first:
            return self.proj(F.unfold(x, 8, stride=8).transpose(1, 2).reshape(-1, 3, 8, 8))  # type: ignore[no-any-return]
        return F.unfold(self.proj(x), 4, stride=4).transpose(1, 2).reshape(-1, WIDTH, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        inner = (self.pixels(x) + self.place).flatten(2).transpose(1, 2)
        inner = inner + attended(self.norm(inner), self.qkv)
        inner = inner + F.gelu(self.narrow(inner))
        patches = self.patch(inner.reshape(len(x), 4, -1))
        y = torch.cat([self.first.expand(len(x), -1, -1), patches], 1)
        y = y + attended(self.outer_norm(y), self.outer)
        y = y + self.back(F.gelu(self.wide(y)))
        return self.head(y[:, 0])  # type: ignore[no-any-return]


class Windows(nn.Module):
    """Attention within windows, shifted, in maps with their channels last."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.qkv, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.LayerNorm(WIDTH)
        self.wide, self.back = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.head, self.act = nn.Linear(WIDTH, CLASSES), act

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.proj(x)).permute(0, 2, 3, 1)
        shifted = self.norm(y).roll((-2, -2), (1, 2))
        windows = shifted.view(len(x), 2, 4, 2, 4, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, WIDTH)
        moved = attended(windows, self.qkv).view(len(x), 2, 2, 4, 4, WIDTH).permute(0, 1, 3, 2, 4, 5)
        y = y + moved.reshape(y.shape).roll((2, 2), (1, 2))
        y = y + self.back(self.act(self.wide(y)))
        return self.head(y.mean((1, 2)))  # type: ignore[no-any-return]


class InWindows(nn.Module):
    """Convolutions within windows: those of all images lie along the batch, or, one by one, nothing is folded."""

    def __init__(self, folded: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, WIDTH, 3, padding=1, stride=2), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm, self.c = nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.d, self.head, self.folded = nn.Conv2d(WIDTH, 8, 3, padding=1), nn.Linear(8, CLASSES), folded

    def inside(self, windows: Tensor) -> Tensor:
        return F.relu(self.c(F.relu(self.norm(windows))))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.relu(self.a(x)))
        windows = y.view(len(x), WIDTH, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).contiguous()
        if self.folded:
            windows = self.inside(windows.view(-1, WIDTH, 4, 4)).view_as(windows)
        else:
            rows = [[self.inside(windows[:, i, j]) for j in range(2)] for i in range(2)]
            windows = torch.stack([torch.stack(row, 1) for row in rows], 1)
        y = windows.permute(0, 3, 1, 4, 2, 5).reshape(y.shape)
        return self.head(F.relu(self.d(y)).mean((2, 3)))  # type: ignore[no-any-return]


class Flat(nn.Module):
    """Tokens made of a map right behind a norm, whose gradient then comes with its channels last."""

    def __init__(self, norm: Callable[[Flat, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, WIDTH, 3, padding=1, stride=2), nn.BatchNorm2d(WIDTH)
        self.place, self.head = nn.Parameter(torch.zeros(1, 64, WIDTH)), nn.Linear(WIDTH, CLASSES)
        self.way = norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.way(self, F.relu(self.a(x))).reshape(len(x), WIDTH, -1).transpose(1, 2)
        return self.head((y * self.place).mean(1))  # type: ignore[no-any-return]


class Views(nn.Module):
    """Averages the logits of views of the image, which are put into one batch by ``fold`` and taken apart by ``part``."""

    def __init__(self, fold: Callable[[Tensor], Tensor], part: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, WIDTH, 3, padding=1, stride=2), nn.Conv2d(WIDTH, 8, 3, padding=1)
        self.head, self.fold, self.part = nn.Linear(8, CLASSES), fold, part

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.b(F.relu(self.a(self.fold(x)))))
        return self.part(self.head(y.mean((2, 3))), len(x)).mean(1)


class Scanned(nn.Module):
    """Tokens with the images along the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, 8, 8, stride=8), nn.LayerNorm(8)
        self.mix, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.proj(x)).flatten(2).permute(2, 0, 1)
        y = y + self.mix(self.norm(y), y, y, need_weights=False)[0]
        return self.head(F.relu(y).mean(0))  # type: ignore[no-any-return]


VIEWS = ("flipped copies", "crops beside each other")
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "pixels in patches": lambda: Nested(False),
    "pixels of patches": lambda: Nested(True),
    "windows": lambda: Windows(F.relu),
    "windows with gelu": lambda: Windows(F.gelu),
    "convolutions in windows": InWindows,
    "flipped copies": lambda: Views(
        lambda x: torch.cat([x, x.flip(-1)]), lambda y, n: torch.stack(y.split(n), 1)
    ),
    "crops beside each other": lambda: Views(
        lambda x: torch.stack([x, x.flip(-1)], 1).flatten(0, 1), lambda y, n: y.unflatten(0, (n, -1))
    ),
    "patches one by one": lambda: Views(
        lambda x: x.unfold(2, 8, 8).unfold(3, 8, 8).movedim(1, 3).reshape(-1, 3, 8, 8),
        lambda y, n: y.reshape(n, 4, CLASSES),
    ),
    "images second": Scanned,
    "a flattened batch norm": lambda: Flat(lambda s, y: s.norm(y)),
    "a flattened instance norm": lambda: Flat(lambda s, y: F.instance_norm(y)),
}


def images(n: int) -> Tensor:
    return torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tried(
    name: str, model: nn.Module, x: Tensor, options: dict[str, Any] | None = None
) -> tuple[Tensor | None, str]:
    """The map, or why there is none; at a method's own level unless ``options`` say otherwise."""
    own = {"start": "ones"} if name.startswith("srd") else OPTIONS.get(name, {})
    if options is None:
        options = {key: value for key, value in own.items() if key != "level"}
    try:
        return make_explainer(name, **options).explain(model, x, 1), ""
    except SrdLabError as error:
        return None, str(error)


@pytest.mark.filterwarnings("ignore:no map that all of the relevance passes has 1/8")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", RUN)
def test_the_map_of_an_image_is_its_own_or_there_is_one_line(name: str, network: str) -> None:
    model, x = drawn(NETWORKS[network]()), images(4)
    for n in (2, 4):  # as many images as patches, too
        found, refusal = tried(name, model, x[:n])
        if found is None:
            assert refusal.count("\n") == 0
            continue
        assert found.shape[0] == n
        assert found.flatten(1).any(1).all()
        for i in range(n):
            alone, refusal = tried(name, model, x[i : i + 1])
            assert alone is not None, refusal
            torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in RUN if name != "fullgrad"])
def test_folding_changes_no_map(name: str) -> None:
    """FullGrad has no places for what is folded, and "high" has other layers to choose from."""
    options = OPTIONS.get(name, {})
    found, refusal = tried(name, drawn(InWindows()), images(2), options)
    assert found is not None, refusal
    torch.testing.assert_close(found, tried(name, drawn(InWindows(folded=False)), images(2), options)[0])


@pytest.mark.parametrize(
    "network", [name for name in NETWORKS if isinstance(NETWORKS[name](), Nested | Windows)]
)
def test_relevance_is_conserved_but_for_constants(network: str) -> None:
    lost = SRD(start="ones").leaks(drawn(NETWORKS[network]()), images(3))
    assert lost["other"].abs().max() < 1e-12
    assert lost["dead fields"].abs().max() == 0
    assert (lost["constants"].abs().max() > 1e-3) == ("patches" in network)  # the class token


def test_logits_of_patches_are_tokens_whose_maps_are_known() -> None:
    model, x = drawn(NETWORKS["patches one by one"]()), images(2)
    y = F.relu(model.b(F.relu(model.a(model.fold(x))))).mean((2, 3))
    of_patches = model.head(y).reshape(2, 2, 2, CLASSES)[..., 1].detach()
    assert (of_patches > 0).all()
    torch.testing.assert_close(tried("gradcam", model, x)[0], of_patches / 4)  # the slope of a mean of four
    torch.testing.assert_close(
        tried("ablationcam", model, x)[0], of_patches
    )  # without this channel nothing is left


@pytest.mark.parametrize(
    ("name", "network"),
    [
        *((name, network) for name in ("srd", "gradcam", "ablationcam") for network in VIEWS),
        ("srd", "patches one by one"),
    ],
)
def test_an_encoder_that_sees_views_is_refused_and_the_logits_of_views_are_none(
    name: str, network: str
) -> None:
    found, refusal = tried(name, drawn(NETWORKS[network]()), images(2))
    assert found is None
    assert "the encoder puts out shape" in refusal
    assert "for 2 images; expected the batch first, without patches or windows folded into it" in refusal


def test_tokens_with_the_batch_second_are_told_from_as_many_images() -> None:
    with pytest.raises(Refused, match=r"shape \(4, 4, 8\) for 4 images; expected the batch first"):
        SRD().explain(drawn(Scanned()), images(4))


FOLDED = r"puts out shape \(8, 6, 4, 4\) for 2 images; expected the batch first"
READS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "srd": lambda model, x: SRD(level="relu#3").explain(model, x),
    "erf": lambda model, x: SRD().erf(model, x, "relu#3", [(0, 0)]),
    "sharing_ratio": lambda model, x: SRD().sharing_ratio(model, x, "input", "relu#3"),
    "the source of sharing_ratio": lambda model, x: SRD().sharing_ratio(model, x, "relu#3", "relu#4"),
    "gradcam": lambda model, x: GradCAM(level="relu#3").explain(model, x),
    "excitation_backprop": lambda model, x: ExcitationBackprop(level="relu#3").explain(model, x),
}


@pytest.mark.parametrize("read", READS)
def test_a_layer_in_windows_is_refused_as_a_place_for_maps(read: str) -> None:
    expected = FOLDED.replace(", 6", "") if read == "excitation_backprop" else FOLDED
    with pytest.raises(Refused, match=expected):
        READS[read](drawn(InWindows()), images(2))


def test_terms_of_fullgrad_are_sums_within_an_image() -> None:
    model, x = drawn(InWindows()), images(3)
    terms = FullGrad().terms(model, x, torch.tensor([1, 2, 0]))
    assert terms.shape[0] == 3
    torch.testing.assert_close(terms.sum(1), model(x)[[0, 1, 2], [1, 2, 0]].detach())


class Partitioned(nn.Module):
    """Windows along an axis of their own, (N, windows, positions, C): as many windows as positions, so that it looks like an
    image (as in MaxViT). The residual sum, where there is one, is of maps whose rows and columns are what they seem."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside = inside
        self.proj, self.narrow = nn.Conv2d(3, WIDTH, 1), nn.Linear(WIDTH, WIDTH)
        self.last, self.head = nn.Conv2d(WIDTH, WIDTH, 1), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.proj(x)).permute(0, 2, 3, 1)  # (N, 16, 16, C)
        windows = y.reshape(-1, 4, 4, 4, 4, WIDTH).transpose(2, 3).reshape(-1, 16, 16, WIDTH)
        if self.inside:
            windows = torch.relu(self.narrow(windows))
        back = windows.reshape(-1, 4, 4, 4, 4, WIDTH).transpose(2, 3).reshape(-1, 16, 16, WIDTH)
        y = y + back
        if not self.inside:
            y = torch.relu(self.narrow(y))
        return self.head(torch.relu(self.last(y.permute(0, 3, 1, 2))).mean((2, 3)))


def test_fullgrad_refuses_biases_on_windows_that_look_like_an_image() -> None:
    x = torch.rand(2, 3, SIDE, SIDE, dtype=torch.float64)
    with pytest.raises(
        Refused,
        match=r"rows and columns of the output of a layer with a bias are not known to be those of the image",
    ):
        FullGrad().explain(drawn(Partitioned(inside=True)), x)
    beside = drawn(Partitioned(inside=False))
    torch.testing.assert_close(FullGrad().explain(beside, x), FullGrad().explain(Doubled(beside), x))


class Doubled(nn.Module):
    """The same function as :class:`Partitioned` without its windows."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.of.proj(x))
        y = torch.relu(self.of.narrow((y + y).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.of.head(torch.relu(self.of.last(y)).mean((2, 3)))
