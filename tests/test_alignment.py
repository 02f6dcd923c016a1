"""A map of a layer is laid over the image only where its rows and columns are the image's, or there is one line."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import test_affine
import torch
import torch.nn.functional as F
from test_affine import PATTERNS, overridable
from torch import Tensor, nn

from srd_lab.engine import receptive_fields
from srd_lab.engine.alignment import CoordinateTrace
from srd_lab.engine.coordinates import Coordinates
from srd_lab.errors import Refused
from srd_lab.registry import make_explainer

Step = Callable[[Tensor], Tensor]
SIDE = 32
OF_A_LAYER = (
    *("gradcam", "gradcam_pp", "xgradcam", "layercam_low", "scorecam", "ablationcam", "fullgrad"),
    *("layercam_high", "srd_high", "excitation_backprop", "contrastive_excitation"),
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = drawn(2, 3, SIDE, SIDE)


class Net(nn.Module):
    """A step between a convolution of the image and the rest of the network, whose maps are 1/8 of the image."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second, self.third = (
            nn.Conv2d(4, 6, 3, stride=4, padding=1),
            nn.Conv2d(6, 6, 3, stride=2, padding=1),
        )
        self.head, self.step = nn.Linear(6, 3), step
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.third(F.relu(self.second(self.step(F.relu(self.first(x)))))))
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


@cache
def built(step: Step) -> Net:
    """One network for each step: what is tried once with every model is not tried again with every method."""
    return Net(step)


def explain(name: str, step: Step) -> Tensor:
    return make_explainer(name).explain(built(step), X, 1)


def windows(y: Tensor) -> Tensor:
    """(N, C, H, W) as (windows, C, 4, 4)."""
    n, c, h, w = y.shape
    return y.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 4, 4)


def whole(parts: Tensor, turned: bool = False) -> Tensor:
    """The windows of :func:`windows` as maps; in another order if ``turned``."""
    side = SIDE // 4
    y = parts.view(-1, side, side, *parts.shape[1:])
    return y.permute(0, 3, 2, 4, 1, 5) if turned else y.permute(0, 3, 1, 4, 2, 5)


def sampled(y: Tensor) -> Tensor:
    turn = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]], dtype=y.dtype).expand(len(y), 2, 3)
    return F.grid_sample(y, F.affine_grid(turn, list(y.shape), align_corners=False), align_corners=False)


def written_backwards(y: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    for i in range(SIDE):
        out[..., i] = y[..., SIDE - 1 - i]
    return out


def copied_into_a_view(y: Tensor) -> Tensor:
    out = y * 1
    out.view(len(y), -1, SIDE, SIDE).copy_(y.flip(2))
    return out


def seen_through_a_view(y: Tensor) -> Tensor:
    out = y * 1
    view = out.view(len(y), 4, -1)
    out.copy_(out.flip(3))
    return view.view(y.shape)


def written_through_a_view(y: Tensor) -> Tensor:
    out = y * 1
    out.view_as(y).mul_(0).add_(y.flip(3))
    return out


def seen_through_another_view(y: Tensor) -> Tensor:
    out = y * 1
    one, other = out[:, :], out[:, :]
    one[:] = y.flip(3)
    return other


def behind_the_back(y: Tensor) -> Tensor:
    out = y * 1
    out.data = out.data.flip(3)
    return out


def turned_as_complex(y: Tensor, moved: bool) -> Tensor:
    """Pairs of tokens' numbers turned by an angle, as rotary embeddings do."""
    tokens = torch.view_as_complex(y.flatten(2).mT.reshape(len(y), -1, 2, 2).contiguous()) * torch.tensor(1j)
    back = torch.view_as_real(tokens.flip(1) if moved else tokens).flatten(2)
    return back.mT.reshape(y.shape)


def cornered(y: Tensor) -> Tensor:
    """Four convolutions that take the pixel at a corner of their windows."""
    kernel = F.pad(torch.ones(4, 1, 1, 1, dtype=y.dtype), (0, 6, 0, 6))
    for _ in range(4):
        y = F.conv2d(y, kernel, padding=3, groups=4)
    return y


MOVED: dict[str, Step] = {
    "seen through a view": seen_through_a_view,
    "written through a view": written_through_a_view,
    "seen through another view": seen_through_another_view,
    "complex": lambda y: turned_as_complex(y, moved=True),
    "flip": lambda y: y.flip(3),
    "rot90": lambda y: y.rot90(2, (2, 3)),
    "roll": lambda y: y.roll(5, 2),
    "transpose": lambda y: y.transpose(2, 3),
    "mT": lambda y: y.mT,
    "permute": lambda y: y.permute(0, 1, 3, 2),
    "crop": lambda y: y[:, :, SIDE // 2 :, :],
    "middle": lambda y: y[:, :, SIDE // 4 : -SIDE // 4, SIDE // 4 : -SIDE // 4],
    "narrow": lambda y: y.narrow(3, 0, SIDE // 2),
    "pad": lambda y: F.pad(y, (SIDE // 2, 0)),
    "crop by pad": lambda y: F.pad(y, (0, -SIDE // 2)),
    "index": lambda y: y[..., torch.arange(SIDE - 1, -1, -1)],
    "index_select": lambda y: y.index_select(2, torch.arange(SIDE - 1, -1, -1)),
    "gather": lambda y: y.gather(3, torch.arange(SIDE - 1, -1, -1).expand_as(y)),
    "halves": lambda y: torch.cat(y.chunk(2, 3)[::-1], 3),
    "unbound": lambda y: torch.stack(y.unbind(3), 2),
    "rows": lambda y: torch.stack([y[:, :, i] for i in reversed(range(SIDE))], 2),
    "written": written_backwards,
    "copied": copied_into_a_view,
    "windows turned": lambda y: whole(windows(y), turned=True).reshape(y.shape),
    "reshaped": lambda y: y.reshape(len(y), 4, SIDE // 2, SIDE * 2),
    "tokens": lambda y: y.flatten(2).transpose(1, 2).unflatten(1, (SIDE, SIDE)).permute(0, 3, 2, 1),
    "sorted": lambda y: y.sort(3).values,
    "sampled": sampled,
    "matrix": lambda y: y @ torch.eye(SIDE, dtype=y.dtype).flip(0),
    "einsum": lambda y: torch.einsum("nchw,hk->nckw", y, torch.eye(SIDE, dtype=y.dtype).flip(0)),
    "sum": lambda y: y + y.flip(3),
    "product": lambda y: y * y.flip(2).sigmoid(),
    "branch": lambda y: torch.cat([y[:, :2], y[:, 2:].flip(3)], 1),
    "average": lambda y: (y + y.roll(16, 3) + y.roll(16, 2)) / 3,
    "corners of windows": cornered,
    "fourier": lambda y: torch.fft.fft2(y).real,
    "cumsum": lambda y: y.cumsum(3),
}

KEPT: dict[str, tuple[Step, Step]] = {
    "twice": (lambda y: y.flip(3).flip(3), lambda y: y * 1),
    "rolled back": (lambda y: F.relu(y.roll(3, 2)).roll(-3, 2), lambda y: F.relu(y)),
    "turned back": (lambda y: F.relu(y.mT).mT, lambda y: F.relu(y)),
    "windows": (lambda y: whole(F.relu(windows(y))).reshape(y.shape), lambda y: F.relu(y)),
    "tokens": (
        lambda y: F.relu(y.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(y.shape),
        lambda y: F.relu(y),
    ),
    "channels last": (lambda y: F.relu(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), lambda y: F.relu(y)),
    "class token": (
        lambda y: torch.cat([torch.zeros(len(y), 1, 4, dtype=y.dtype), y.flatten(2).mT], 1)[:, 1:].mT.reshape(
            y.shape
        ),
        lambda y: y * 1,
    ),
    "halves": (lambda y: torch.cat(y.chunk(2, 3), 3), lambda y: y * 1),
    "written": (lambda y: torch.stack([y[..., i] for i in range(SIDE)], 3), lambda y: y * 1),
    "padded and cut": (lambda y: F.pad(y, (2, 2, 2, 2))[..., 2:-2, 2:-2], lambda y: y * 1),
    "a pixel": (lambda y: F.pad(y, (0, 1))[..., 1:], lambda y: F.pad(y[..., 1:], (0, 1))),
    "complex": (
        lambda y: turned_as_complex(y, moved=False),
        lambda y: torch.stack([-y[:, 1], y[:, 0], -y[:, 3], y[:, 2]], 1),
    ),
    "in place through a view": (
        lambda y: (lambda z: (z.view(len(y), 4, -1).mul_(2).relu_(), z)[1])(y * 1),
        lambda y: F.relu(2 * y),
    ),
    "gate": (
        lambda y: y * y.mean((2, 3)).sigmoid()[:, :, None, None].expand_as(y),
        lambda y: y * F.adaptive_avg_pool2d(y, 1).sigmoid(),
    ),
}


@pytest.mark.filterwarnings("ignore:no map that all of the relevance passes")
@pytest.mark.parametrize("way", MOVED)
@pytest.mark.parametrize("name", OF_A_LAYER)
def test_maps_whose_rows_and_columns_were_moved_are_refused(name: str, way: str) -> None:
    with pytest.raises(Refused):
        explain(name, MOVED[way])


MIRROR = torch.eye(SIDE, dtype=torch.float64).flip(0)
AROUND = torch.eye(SIDE, dtype=torch.float64).roll(SIDE // 3, 0)


def mirrored_by_tokens(y: Tensor) -> Tensor:
    """Attention that looks at the pixel opposite."""
    tokens = y.flatten(2).mT
    looks = 20 * torch.eye(SIDE * SIDE, dtype=y.dtype).flip(0)
    return (tokens * 1e-3 + looks.softmax(1) @ tokens).mT.reshape(y.shape)


# the place is that of a summand with next to no weight; what the others do, a product with a full matrix, has none
OUTWEIGHED: dict[str, Step] = {
    "mirrored columns": lambda y: 1e-3 * y + y @ MIRROR,
    "mirrored rows": lambda y: 1e-3 * y + MIRROR @ y,
    "rolled": lambda y: 1e-3 * y + y @ AROUND,
    "transposed": lambda y: (
        1e-3 * y + torch.einsum("nchw,hi,wj->ncji", y, *[torch.eye(SIDE, dtype=y.dtype) + 1e-9] * 2)
    ),
    "attention": mirrored_by_tokens,
    "most channels": lambda y: torch.cat([y[:, :1], 1e-3 * y[:, 1:] + y[:, 1:] @ MIRROR], 1),
}


@pytest.mark.filterwarnings("ignore:no map that all of the relevance passes")
@pytest.mark.parametrize("way", OUTWEIGHED)
@pytest.mark.parametrize("name", OF_A_LAYER)
def test_a_place_without_weight_is_no_place(name: str, way: str) -> None:
    with pytest.raises(Refused, match="are not known to be those of the image"):
        explain(name, OUTWEIGHED[way])


@pytest.mark.filterwarnings("ignore:no map that all of the relevance passes")
@pytest.mark.parametrize("way", OUTWEIGHED)
def test_what_mixes_all_of_the_image_a_little_stays(way: str) -> None:
    for name in ("gradcam", "fullgrad", "srd_high"):
        assert explain(name, lambda y: y + 1e-3 * OUTWEIGHED[way](y)).any()


def test_cells_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, ask = [], receptive_fields._middle
    monkeypatch.setattr(receptive_fields, "_middle", lambda g: (asked.append(len(g)), ask(g))[1])
    net, images = Net(lambda y: y), drawn(5, 3, SIDE, SIDE)
    for some in (images, images[:3], images[:1]):
        make_explainer("layercam_high").explain(net, some, 1)
    assert asked == [2] * 9  # two of the images, nine cells


@pytest.mark.filterwarnings("ignore:no map that all of the relevance passes")
@pytest.mark.parametrize("way", KEPT)
@pytest.mark.parametrize("name", OF_A_LAYER)
def test_maps_whose_rows_and_columns_came_back_are_as_if_they_had_stayed(name: str, way: str) -> None:
    if way == "complex" and name.endswith(("excitation", "backprop")):
        pytest.skip("LRP has no rule for complex numbers")
    one, other = (explain(name, step) for step in KEPT[way])
    assert one.any()
    torch.testing.assert_close(one, other)


class Loop(nn.Module):
    """Its stem runs image by image, so that the number of its calls depends on the batch."""

    def __init__(self, flips: bool) -> None:
        super().__init__()
        self.net, self.third_relu, self.flips = Net(lambda y: y), nn.ReLU(), flips

    def forward(self, x: Tensor) -> Tensor:
        y = self.net.second(torch.cat([F.relu(self.net.first(v[None])) for v in x]))
        y = self.third_relu(y.flip(3) if self.flips else y)
        y = y.flip(3) if self.flips else y
        for _ in range(8):
            y = y * 1
        return self.net.head(F.relu(self.net.third(y)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("images", [1, 2, 3, 4])
def test_calls_whose_number_depends_on_the_batch_are_told_apart(images: int) -> None:
    x, explainer = drawn(images, 3, SIDE, SIDE), make_explainer("gradcam", level="third_relu")
    assert explainer.explain(Loop(flips=False).eval(), x, 1).any()
    with pytest.raises(Refused, match="rows and columns"):
        explainer.explain(Loop(flips=True).eval(), x, 1)


def test_what_a_model_does_with_one_image_says_nothing_of_another() -> None:
    net, explainer = Net(lambda y: y.flip(3) if y.mean() > 0.5 else y * 1), make_explainer("gradcam")
    for dark in (True, False, True):
        if dark:
            assert explainer.explain(net, X / 100, 1).shape == (2, 4, 4)
        else:
            with pytest.raises(Refused, match="rows and columns"):
                explainer.explain(net, 20 * X, 1)


def test_a_model_that_is_changed_is_followed_again() -> None:
    net, explainer = Net(lambda y: y * 1), make_explainer("gradcam")
    explainer.explain(net, X, 1)
    net.step = lambda y: y.flip(3)
    with pytest.raises(Refused, match="rows and columns"):
        explainer.explain(net, X, 1)


def test_data_that_are_exchanged_have_no_place() -> None:
    with pytest.raises(Refused):  # the slope is false as well
        explain("gradcam", behind_the_back)


# --- against what autograd says that an entry is made of -------------------------------------------


class Alone(nn.Module):
    """One step, and the tensors that it made."""

    def __init__(self, step: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.step, self.made = step, tuple[Any, ...]()

    def forward(self, x: Tensor) -> Tensor:
        out = self.step(x * 1)
        self.made = tuple(out) if isinstance(out, tuple | list) else (out,)
        return x.mean((2, 3))


def made_of(step: Callable[[Tensor], Any], x: Tensor) -> list[tuple[Tensor, Coordinates]]:
    """What a step makes of an image, with the coordinates that it is said to have, where it is said to have some."""
    trace = CoordinateTrace(alone := Alone(step))
    with torch.enable_grad():
        trace.run(x)
    return [(t, trace.coordinates[t]) for t in alone.made if isinstance(t, Tensor) and t in trace.coordinates]


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [(1, 0, 1), (1, 1, 1), (2, 0, 1), (2, 1, 1), (3, 1, 2)]
)
@pytest.mark.parametrize("kind", ["conv", "pool", "back"])
def test_windows_lie_in_the_middle_of_their_pixels(
    kind: str, kernel: int, stride: int, padding: int, dilation: int
) -> None:
    """Where they do not reach over the edge."""
    weight = torch.ones(1, 1, kernel, kernel, dtype=torch.float64)
    padding = min(padding, kernel // 2) if kind == "pool" else padding
    calls: dict[str, Step] = {
        "conv": lambda t: F.conv2d(t, weight, None, stride, padding, dilation),
        "pool": lambda t: F.avg_pool2d(t, kernel, stride, padding),
        "back": lambda t: F.conv_transpose2d(t, weight, None, stride, padding, dilation=dilation),
    }
    x = drawn(1, 1, 13, 11).requires_grad_()
    ((out, of),) = made_of(calls[kind], x)
    (unfolded, windows_of) = made_of(lambda t: F.unfold(t, kernel, dilation, padding, stride), x)[0]
    if kind == "conv":
        assert torch.equal(windows_of.rows, of.rows.flatten(2).expand_as(unfolded))
        assert torch.equal(windows_of.columns, of.columns.flatten(2).expand_as(unfolded))
    seen = 0
    for i in range(out.numel()):
        (g,) = torch.autograd.grad(out.flatten()[i], x, retain_graph=True)
        pixels = g[0, 0].nonzero().double()
        if (kind == "back" and len(pixels)) or len(pixels) == kernel * kernel:
            seen += 1
            place = torch.stack([of.rows.flatten()[i], of.columns.flatten()[i]])
            off = (place - (pixels.amin(0) + pixels.amax(0)) / 2).abs().amax()
            assert off <= (1 if kind == "back" else 0)
    assert seen


def test_a_padding_may_be_given_as_a_list() -> None:
    weight, x = torch.ones(1, 1, 3, 3, dtype=torch.float64), drawn(1, 1, 13, 11)
    (_, one), (_, other) = (
        made_of(lambda t, p=p: F.conv2d(t, weight, None, [2, 2], p), x)[0] for p in ([1, 1], (1, 1))
    )
    assert torch.equal(one.rows, other.rows)
    assert torch.equal(one.columns, other.columns)


# these mix what lies around, or two maps, and keep the place of what they scale
MIXES = ("softmax", "log_softmax", "softmin", "_norm", "normalize", "matmul", "mm", "spmm")
NO_GRADIENT = ("logical_and_", "logical_or_", "logical_xor_")  # autograd gives that of what they overwrote


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of functions that are deprecated or experimental
def test_no_function_of_torch_is_said_to_keep_what_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_affine, "CONSTANT", drawn(1, 4, 6, 6, seed=1) + 0.5)
    monkeypatch.setattr(test_affine, "INDEX", (6 * drawn(1, 4, 6, 6, seed=2)).long())
    x, some = (drawn(1, 4, 6, 6) + 0.1).requires_grad_(), torch.Generator().manual_seed(0)
    line, said, wrong = torch.arange(6.0, dtype=torch.float64), 0, []
    for name, function in overridable(ruled=True):
        for pattern, call in PATTERNS.items():
            try:
                call(function, x * 1)
                found = made_of(lambda t, call=call, f=function: call(f, t), x)  # type: ignore[misc]
            except Exception:  # no way to call this function
                continue
            for out, of in found:
                for i in torch.randperm(out.numel(), generator=some)[:3].tolist():
                    row, column = float(of.rows.flatten()[i]), float(of.columns.flatten()[i])
                    try:
                        (g,) = torch.autograd.grad(out.flatten()[i], x, retain_graph=True)
                    except RuntimeError:  # whole or complex numbers
                        continue
                    size = g.abs().sum((0, 1)).nan_to_num()
                    if row != row or column != column or not size.any():
                        continue
                    said += 1
                    middle = (size.sum(1) @ line / size.sum(), size.sum(0) @ line / size.sum())
                    if max(abs(middle[0] - row), abs(middle[1] - column)) > 1.01:
                        wrong.append(f"{name} {pattern}")
    wrong = sorted(
        {w for w in wrong if not any(known in w.partition(" ")[0] for known in (*MIXES, *NO_GRADIENT))}
    )
    assert said > 4_000
    assert not wrong, wrong
