"""APOP: recordings replay bit for bit, masks and replays are the literal ones, patterns survive a file, runs resume."""

from __future__ import annotations

import csv
import io
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from torch import Tensor, nn

import apop
from apop import ActivationPattern, binarize, experiment, record, replay
from apop.experiment import Experiment, Hits, in_top, metric_name, replay_input, wilson
from srd_lab.cli.apop import apop as command
from srd_lab.data import batch, load_data
from srd_lab.data.draw import draw_images
from srd_lab.errors import BadData, BadInput, BadValue, BadWeights, Refused, SrdLabError, StoreTrouble
from srd_lab.models import load_model
from srd_lab.normalise import split_normalisation
from srd_lab.runs.work import joined

# --- networks whose calls are hard to follow --------------------------------------------------------------


class Residual(nn.Module):
    """One in-place ReLU for three calls, a residual addition in place, batch norm, overlapping pools."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.head = nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.conv1(x))))
        out = self.relu(self.conv2(x))
        out += x
        return self.head(self.relu(out).mean((2, 3)))


class Functional(nn.Module):
    """A ReLU in each of the ways to call one, and an alias that must see the change in place."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 5, 5, 3, padding=1) for i in range(8))
        self.head = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        relus: list[Callable[[Tensor], Tensor]] = [
            *(F.relu, torch.relu, Tensor.relu, F.relu_, Tensor.relu_, torch.relu_),
            *(lambda u: u.clamp(min=0), lambda u: u.clamp_min_(0)),
        ]
        for conv, relu in zip(self.convs, relus, strict=True):
            before = conv(x)
            alias = before.view_as(before)
            x = relu(before) + 0.1 * alias
        return self.head(x.mean((2, 3)))


class Pools(nn.Module):
    """Every kind of max pool that can be replayed: with ceil mode, with its indices used, adaptive."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(3))
        self.adaptive = nn.AdaptiveMaxPool2d(2)
        self.head = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.convs[0](x)), 3, 2, ceil_mode=True)
        x = F.relu(self.convs[1](x))
        small, indices = F.max_pool2d(x, 2, return_indices=True)
        x = self.convs[2](F.max_unpool2d(small, indices, 2, output_size=x.shape[-2:]))
        return self.head(self.adaptive(torch.max_pool2d(F.relu(x), 2)).flatten(1))


class StartsInPlace(nn.Module):
    """The first operation overwrites the model's own input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(F.relu_(x))).amax((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "functional": Functional,
    "pools": Pools,
    "starts_in_place": StartsInPlace,
}


def make(name: str) -> nn.Module:
    torch.manual_seed(3)
    net = NETS[name]().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.uniform_(-0.2, 0.2)
    return net


def images(n: int = 3, side: int = 17, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vgg() -> nn.Module:
    return load_model("vgg16", device="cpu")


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return batch(load_data("scenes"), range(6))[0]


# --- a literal APOP, call by call, for plain sequential networks ------------------------------------------


def sequential() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        *(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ),
        *(nn.Conv2d(5, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(24, 9), nn.ReLU(), nn.Linear(9, 7)),
    ).double()


def literal_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """2 x 2 max pool by loops: output, and the winner's place (row * W + column)."""
    n, c, height, width = x.shape
    out, place = x.new_zeros(n, c, height // 2, width // 2), torch.zeros(n, c, height // 2, width // 2).long()
    for i, j, row, column in np.ndindex(*out.shape):
        corners = [(2 * row + a, 2 * column + b) for a in (0, 1) for b in (0, 1)]
        best = max(corners, key=lambda at: x[i, j, at[0], at[1]].item())
        out[i, j, row, column] = x[i, j, best[0], best[1]]
        place[i, j, row, column] = best[0] * width + best[1]
    return out, place


def literal_record(net: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Algorithm 1, first half: ``sign(relu(x))`` of every ReLU, the winners of every pool."""
    kept = []
    for layer in net:
        if isinstance(layer, nn.ReLU):
            x = F.relu(x)
            kept.append(torch.sign(x))
        elif isinstance(layer, nn.MaxPool2d):
            x, place = literal_pool(x)
            kept.append(place)
        else:
            x = layer(x)
    return kept


def literal_replay(net: nn.Sequential, x: Tensor, kept: list[Tensor], relu: bool) -> Tensor:
    """Algorithm 1, second half."""
    kept = list(kept)
    for layer in net:
        if isinstance(layer, nn.ReLU):
            x = x * kept.pop(0)
            x = F.relu(x) if relu else x
        elif isinstance(layer, nn.MaxPool2d):
            place, flat = kept.pop(0), x.flatten(2)
            x = x.new_zeros(place.shape)
            for i, j, row, column in np.ndindex(*place.shape):
                x[i, j, row, column] = flat[i, j, place[i, j, row, column]]
        else:
            x = layer(x)
    return x


def literal_binarize(net: nn.Sequential, x: Tensor, which: int) -> Tensor:
    relus = [layer for layer in net if isinstance(layer, nn.ReLU)]
    for layer in net:
        x = layer(x)
        if layer is relus[which]:
            x = torch.where(x > 0, 1.0, 0.0).to(x)
    return x


def test_masks_and_winners_are_the_literal_ones() -> None:
    net, x = sequential(), images(2, 8).double()
    logits, pattern = record(net, x)
    assert torch.equal(logits, net(x))
    kept = literal_record(net, x)
    assert len(pattern.entries) == len(kept) == 6
    assert [entry.name for entry in pattern.entries] == ["1", "3", "4", "6", "7", "10"]
    for entry, expected in zip(pattern.entries, kept, strict=True):
        assert entry.values.dtype == (torch.bool if entry.kind == "relu" else torch.int64)
        assert torch.equal(entry.values.to(expected), expected)
    assert list(pattern.masks) == ["1", "3", "6", "10"]
    assert list(pattern.winners) == ["4", "7"]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("kind", ["zeros", "ones", "normal"])
def test_replay_is_the_literal_apop(kind: str, relu: bool) -> None:
    net, x = sequential(), images(2, 8).double()
    _, pattern = record(net, x)
    other = replay_input(kind, x, [0, 1], 7)
    expected = literal_replay(net, other, literal_record(net, x), relu)
    torch.testing.assert_close(replay(net, other, pattern, relu), expected, rtol=1e-12, atol=1e-14)


def test_relu_after_the_mask_matters_on_other_inputs() -> None:
    net, x = sequential(), images(2, 8).double()
    _, pattern = record(net, x)
    assert not torch.allclose(replay(net, 0 * x, pattern), replay(net, 0 * x, pattern, relu=True))


@pytest.mark.parametrize("which", range(4))
def test_binarize_is_the_literal_one(which: int) -> None:
    net, x = sequential(), images(2, 8).double()
    expected = literal_binarize(net, x, which)
    name = list(record(net, x)[1].masks)[which]
    for layer in (which, name):
        torch.testing.assert_close(binarize(net, x, layer), expected, rtol=1e-12, atol=1e-14)


def test_binarize_one_call_of_a_shared_module_in_place() -> None:
    net, x = make("residual"), images()
    assert isinstance(net, Residual)
    with torch.no_grad():
        first = net.pool(F.relu(net.norm(net.conv1(x))))
        second = (F.relu(net.conv2(first)) > 0).float()
        expected = net.head(F.relu(second + first).mean((2, 3)))
    torch.testing.assert_close(binarize(net, x, "relu#2"), expected)


# --- replaying what was recorded --------------------------------------------------------------------------


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_replay_on_the_same_input_gives_the_same_bits(name: str, relu: bool) -> None:
    net, x = make(name), images()
    with torch.no_grad():
        plain = net(x.clone())
    logits, pattern = record(net, x)
    assert torch.equal(logits, plain)
    assert torch.equal(replay(net, x, pattern, relu), logits)
    assert not torch.equal(replay(net, torch.ones_like(x), pattern, relu), logits)


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "resnet50"])
def test_bundled_networks_replay_bit_for_bit(name: str, pixels: Tensor) -> None:
    model = load_model(name, device="cpu")
    normalise, network = split_normalisation(model)
    logits, pattern = record(model, pixels)
    assert torch.equal(logits, model(pixels))
    assert torch.equal(replay(model, pixels, pattern), logits)
    assert torch.equal(replay(network, normalise(pixels), pattern), logits)
    expected = {"vgg16": (15, 5), "resnet18": (17, 1), "resnet50": (49, 1)}[name]
    assert (len(pattern.masks), len(pattern.winners)) == expected


def test_pools_are_named_and_all_seen() -> None:
    _, pattern = record(make("pools"), images())
    assert list(pattern.winners) == ["Pools", "Pools#2", "Pools#3", "adaptive"]
    assert list(pattern.masks) == ["relu", "relu#2", "relu#3"]


def test_a_pattern_of_a_batch_holds_those_of_its_images() -> None:
    net, x = make("residual"), images()
    _, pattern = record(net, x)
    some = pattern.select([2, 0])
    for i, entry in zip((2, 0), (record(net, x[i : i + 1])[1] for i in (2, 0)), strict=True):
        mine = some.select([0 if i == 2 else 1])
        assert all(torch.equal(a.values, b.values) for a, b in zip(mine.entries, entry.entries, strict=True))
    torch.testing.assert_close(replay(net, 0 * x[:2], some), replay(net, 0 * x, pattern)[[2, 0]])
    with pytest.raises(BadValue, match=r"images 0\.\.2, got \[3\]"):
        pattern.select([3])


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "pools"])
def test_a_saved_pattern_comes_back(name: str, tmp_path: Path) -> None:
    net, x = make(name), images()
    logits, pattern = record(net, x)
    pattern.save(tmp_path / "a pattern")
    back = ActivationPattern.load(tmp_path / "a pattern")
    assert [path.name for path in tmp_path.iterdir()] == ["a pattern"]
    for one, two in zip(pattern.entries, back.entries, strict=True):
        assert (one.name, one.kind, one.shape) == (two.name, two.kind, two.shape)
        assert one.values.dtype == two.values.dtype
        assert torch.equal(one.values, two.values)
    assert torch.equal(replay(net, x, back), logits)


def test_masks_take_a_bit_and_winners_the_smallest_type(vgg: nn.Module, pixels: Tensor) -> None:
    _, pattern = record(vgg, pixels)
    arrays = pattern.to_arrays()
    bits = sum(mask.numel() for mask in pattern.masks.values())
    packed = [arrays[str(i)] for i, e in enumerate(pattern.entries) if e.kind == "relu"]
    assert bits / 8 <= sum(array.nbytes for array in packed) < bits / 8 + len(packed)
    types = [arrays[str(i)].dtype for i, e in enumerate(pattern.entries) if e.kind == "max_pool"]
    assert types == [np.uint16, np.uint16, np.uint8, np.uint8, np.uint8]  # of 64 x 64, 32 x 32, 16 x 16 ...
    assert pattern.packed_bytes == sum(array.nbytes for key, array in arrays.items() if key != "about")


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _npz(arrays: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def test_files_that_are_no_patterns(tmp_path: Path) -> None:
    _, pattern = record(make("residual"), images())
    pattern.save(tmp_path / "good.npz")
    good = pattern.to_arrays()
    content = (tmp_path / "good.npz").read_bytes()
    about = json.loads(str(good["about"]))
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    bad = {
        "cut": content[: len(content) // 2],
        "empty": b"",
        "text": b"not an archive",
        "array": array.getvalue(),
        "foreign": _npz({"weight": np.zeros(3)}),
        "list": _npz(good | {"about": np.array("[1]")}),
        "newer": _npz(good | {"about": np.array(json.dumps(about | {"version": 99}))}),
        "missing": _npz({key: value for key, value in good.items() if key != "2"}),
        "short mask": _npz(good | {"0": good["0"][:-1]}),
        "far winner": _npz(good | {"1": np.full_like(good["1"], 17).astype(np.uint16) * 17}),
        "pickle": _npz({"about": np.array([{}], dtype=object)}),
    }
    for name, wrong in bad.items():
        path = _write(tmp_path / name, wrong)
        with pytest.raises(BadData, match="not an activation pattern, or is damaged"):
            ActivationPattern.load(path)
    with pytest.raises(BadData, match="version 99"):
        ActivationPattern.load(tmp_path / "newer")
    with pytest.raises(BadData, match="there is no pattern file"):
        ActivationPattern.load(tmp_path / "nowhere")
    with pytest.raises(StoreTrouble, match="cannot write the pattern"):
        pattern.save(tmp_path / "nowhere" / "x.npz")


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    _, pattern = record(make("residual"), images())
    pattern.save(tmp_path / "p.npz")
    content = bytearray((tmp_path / "p.npz").read_bytes())
    with zipfile.ZipFile(tmp_path / "p.npz") as archive:
        info = archive.getinfo("0.npy")
    content[info.header_offset + 40 + info.compress_size // 2] ^= 0xFF
    with pytest.raises(BadData, match="damaged"):
        ActivationPattern.load(_write(tmp_path / "q.npz", bytes(content)))


# --- refusals ---------------------------------------------------------------------------------------------


def test_another_batch_or_image_size_is_refused() -> None:
    net, x = make("residual"), images()
    _, pattern = record(net, x)
    for other in (images(2), images(3, 19)):
        with pytest.raises(
            SrdLabError, match=r"ReLU call 'relu' with input .* 'relu' with input \(3, 6, 17, 17\)"
        ):
            replay(net, other, pattern)


def test_another_model_is_refused() -> None:
    x = images()
    _, pattern = record(make("residual"), x)
    with pytest.raises(BadInput, match=r"ReLU call 'relu' with input \(3, 5, 17, 17\) does not fit"):
        replay(make("functional"), x, pattern)
    longer = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
    shorter = longer[:2]
    with pytest.raises(BadInput, match="ends after 1 calls, but the model goes on with ReLU call '3'"):
        replay(longer, x, record(shorter, x)[1])
    with pytest.raises(
        SrdLabError, match="made 1 of the 2 calls recorded; the first one missing is ReLU call '3'"
    ):
        replay(shorter, x, record(longer, x)[1])


def test_another_pool_is_refused() -> None:
    x = images()
    head = (nn.Conv2d(3, 4, 1), nn.ReLU())
    pooled = [nn.Sequential(*head, nn.MaxPool2d(size)) for size in (2, 3)]
    with pytest.raises(
        SrdLabError, match=r"max pool '2' has an output \(3, 4, 5, 5\).*recorded \(3, 4, 8, 8\)"
    ):
        replay(pooled[1], x, record(pooled[0], x)[1])
    with pytest.raises(BadInput, match=r"ReLU call '2' .* max pool call '2'"):
        replay(nn.Sequential(*head, nn.ReLU()), x, record(pooled[0], x)[1])


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.LeakyReLU(), nn.ReLU6(), nn.Tanh()])
def test_other_activations_are_refused_by_name_and_kind(activation: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), activation)
    kind = {"SiLU": "silu", "LeakyReLU": "leaky_relu", "ReLU6": "relu6|hardtanh", "Tanh": "tanh"}
    with pytest.raises(
        SrdLabError,
        match=f"ReLU networks, but activation '2' is of kind '({kind[type(activation).__name__]})'",
    ):
        record(net, images())


def test_other_refusals() -> None:
    net, x = make("residual"), images()
    with pytest.raises(
        SrdLabError, match=r"no activation call 'relu#9'; choose 0\.\.2 or one of relu, relu#2, relu#3"
    ):
        binarize(net, x, "relu#9")
    with pytest.raises(BadValue, match="no activation call 3"):
        binarize(net, x, 3)
    with pytest.raises(BadInput, match="NaN"):
        record(net, x * torch.nan)
    with pytest.raises(Refused, match="no activation call was seen"):
        record(nn.Conv2d(3, 4, 1), x)
    flat = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(2), nn.MaxPool1d(2))
    with pytest.raises(Refused, match=r"max_pool1d.* in 3 is a max pool whose winners"):
        record(flat, x)


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        raise ValueError("broken")


def _state(net: nn.Module) -> tuple[Any, ...]:
    tensors = [tensor.clone() for tensor in (*net.parameters(), *net.buffers())]
    flags = [(m.training, getattr(m, "inplace", None), len(m._forward_hooks)) for m in net.modules()]
    globals_ = (
        len(nn.modules.module._global_forward_hooks),
        len(nn.modules.module._global_forward_pre_hooks),
    )
    grads = [(p.requires_grad, p.grad) for p in net.parameters()]
    return tensors, flags, globals_, grads, torch.is_grad_enabled()


def _same(one: tuple[Any, ...], two: tuple[Any, ...]) -> bool:
    return one[1:] == two[1:] and all(torch.equal(a, b) for a, b in zip(one[0], two[0], strict=True))


@pytest.mark.parametrize("name", NETS)
def test_model_and_input_stay_as_they_were(name: str) -> None:
    net, x = make(name), images()
    before, x_before = _state(net), x.clone()
    logits, pattern = record(net, x)
    outputs = [logits, replay(net, x, pattern, relu=True), binarize(net, x, 0)]
    assert _same(_state(net), before)
    assert torch.equal(x, x_before)
    assert not any(output.requires_grad for output in outputs)


def test_nothing_is_left_after_an_exception() -> None:
    net, x = Breaks().eval(), images()
    before = _state(net)
    _, pattern = record(net.body, x)
    for work in (
        lambda: record(net, x),
        lambda: replay(net, x, pattern),
        lambda: binarize(net, x, 0),
    ):
        with pytest.raises(ValueError, match="broken"):
            work()
        assert _same(_state(net), before)
        assert torch.relu(torch.tensor(-1.0)) == 0


def test_public_names() -> None:
    assert set(apop.__all__) == {"ActivationPattern", "binarize", "record", "replay"}
    assert apop.record is record
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = apop.nothing


# --- the experiment ---------------------------------------------------------------------------------------


def test_hits_do_not_depend_on_the_batch_size(vgg: nn.Module) -> None:
    how, data = Experiment(seed=4), load_data("scenes")
    indices = draw_images(data, 12, 4)
    whole = how.run(vgg, [data[i] for i in indices], indices)
    groups = [indices[i : i + 5] for i in range(0, 12, 5)]
    tables = [how.run(vgg, [data[j] for j in group], group).to_arrays() for group in groups]
    parts = Hits.from_arrays(joined(tables), whole.layers)
    assert list(whole.right) == list(parts.right)
    assert whole.rows() == parts.rows()
    assert whole.layers == parts.layers


def test_hits_are_those_of_the_public_functions(vgg: nn.Module) -> None:
    how, data, indices = Experiment(("ones",), seed=4), load_data("scenes"), [3, 90, 1000, *range(200, 212)]
    seen: list[int] = []
    hits = how.run(vgg, [data[i] for i in indices], indices, on_pass=seen.append)
    pixels, labels = batch(data, indices)
    normalise, network = split_normalisation(vgg)
    x = normalise(pixels)
    _, pattern = record(network, x)
    right = replay(network, torch.ones_like(x), pattern).argmax(1) == labels
    assert hits.right["top1/ones/apop"].tolist() == right.tolist()
    assert hits.layers == tuple(pattern.masks)
    for layer in hits.layers:
        right = binarize(network, x, layer).argmax(1) == labels
        assert hits.right[f"binarized/{layer}"].tolist() == right.tolist()
    assert len({interval.accuracy for interval in hits.curve()}) > 3
    assert seen == [15] * how.passes(len(hits.layers)) == [15] * (1 + 2 + 15)
    expected = {f"top{k}/{what}" for k in (1, 5) for what in ("original", "ones/apop", "ones/apop_relu")}
    assert {key for key in hits.right if not key.startswith("binarized")} == expected
    assert len(hits.curve()) == len(hits.curve(5)) == 15


def test_normal_inputs_belong_to_the_image() -> None:
    x = images(2)
    one = replay_input("normal", x, [5, 9], 0)
    assert torch.equal(replay_input("normal", x[:1], [9], 0)[0], one[1])
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(replay_input("normal", x, [5, 9], 1), one)
    assert abs(float(one.mean())) < 0.1
    assert float(one.std()) == pytest.approx(1, abs=0.1)


def test_images_are_a_random_subset_of_the_seed() -> None:
    data = load_data("scenes")
    few, many = draw_images(data, 10, 0), draw_images(data, 20, 0)
    assert few == sorted(set(few)) == draw_images(data, 10, 0)
    assert set(few) < set(many)
    assert few != draw_images(data, 10, 1)
    assert draw_images(data, len(data), 0) == list(range(len(data)))


def test_in_top_agrees_with_topk_and_settles_ties() -> None:
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 10
    for top in (1, 5):
        expected = (logits.topk(top).indices == labels[:, None]).any(1)
        assert torch.equal(in_top(logits, labels, top), expected)
    assert in_top(torch.zeros(3, 4), torch.tensor([0, 1, 3]), 1).tolist() == [True, False, False]
    assert in_top(torch.full((1, 4), torch.nan), torch.tensor([0]), 1).tolist() == [False]
    with pytest.raises(BadWeights, match=r"class 4, but the model knows 0\.\.3"):
        in_top(torch.zeros(1, 4), torch.tensor([4]), 1)


def test_wilson_interval() -> None:
    from scipy.stats import binomtest

    for right in (0, 3, 17, 20):
        mine = wilson(np.arange(20) < right)
        theirs = binomtest(right, 20).proportion_ci(method="wilson")
        assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
        assert (mine.accuracy, mine.n) == (right / 20, 20)


def test_hits_survive_arrays_and_names_fit_mlflow() -> None:
    right = {"top1/original": np.array([True, False])}
    hits = Hits(np.arange(2), np.array(["a", "b"]), np.array([1, 2]), ("relu", "relu#2"), right)
    back = Hits.from_arrays(hits.to_arrays(), hits.layers)
    assert back.rows() == hits.rows()
    assert back.layers == hits.layers
    assert metric_name("layer1.0.relu#2") == "layer1.0.relu.2"
    assert metric_name("a+b/c") == "a_b_c"
    with pytest.raises(BadValue, match="no input 'noise'"):
        Experiment(("noise",))


# --- the command ------------------------------------------------------------------------------------------

TINY = ("--images", "7", "--batch-size", "3", "--device", "cpu", "--inputs", "zeros,normal")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def latest(store: str) -> tuple[Any, Any]:
    """The newest apop run and its child."""
    from mlflow import MlflowClient

    client = MlflowClient(store)
    ids = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(ids, "tags.`srd_lab.command` = 'apop'", order_by=["attributes.start_time DESC"])
    parent = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    (child,) = client.search_runs(ids, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return parent, child


def artifact(store: str, run: Any, path: str) -> Path:
    from mlflow import MlflowClient

    return Path(MlflowClient(store).download_artifacts(run.info.run_id, path))


def table(store: str, run: Any, path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(artifact(store, run, path).read_text())))


@pytest.fixture(scope="module")
def finished(store: str) -> tuple[Any, Any]:
    result = call(*TINY, "--tracking-uri", store, "--save-patterns")
    assert result.exit_code == 0, result.output
    return latest(store)


def test_a_run_holds_settings_numbers_tables_and_figures(store: str, finished: tuple[Any, Any]) -> None:
    parent, child = finished
    wanted = {"models": "vgg16", "images": "7", "inputs": "zeros,normal", "binarize": "True", "device": "cpu"}
    assert wanted.items() <= parent.data.params.items()
    assert {"torch", "hardware"} <= parent.data.params.keys()
    metrics = child.data.metrics
    rows = table(store, child, "images.csv")
    assert len(rows) == 7
    columns = {"top1": "top1/original", "zeros_apop_top1": "top1/zeros/apop"}
    columns |= {"top5": "top5/original", "normal_apop_relu_top5": "top5/normal/apop_relu"}
    columns |= {name: name for name in metrics if name.startswith("binarized/")}
    assert len(columns) == 4 + 15
    for name, column in columns.items():
        assert metrics[name] == pytest.approx(np.mean([int(row[column]) for row in rows]))
    assert parent.data.metrics["zeros_apop_top1"] == metrics["zeros_apop_top1"]
    assert metrics["over_layers/binarized_top1"] == metrics["binarized/classifier.4"]
    for figure in ("apop.png", "binarisation.png"):
        assert artifact(store, child, figure).read_bytes()[1:4] == b"PNG"
    summary = table(store, child, "summary.csv")
    assert {row["condition"] for row in summary} == set(rows[0]) - {"index", "name", "label"}
    assert "Top-1 APOP & relu" in artifact(store, parent, "summary.txt").read_text()


def test_stored_patterns_replay(store: str, finished: tuple[Any, Any], vgg: nn.Module) -> None:
    _, child = finished
    rows = table(store, child, "images.csv")
    pattern = ActivationPattern.load(artifact(store, child, "patterns/00003-00005.npz"))
    pixels, labels = batch(load_data("scenes"), [int(row["index"]) for row in rows[3:6]])
    assert [int(row["label"]) for row in rows[3:6]] == labels.tolist()
    assert torch.equal(replay(vgg, pixels, pattern), vgg(pixels))


def test_resume_ends_with_the_numbers_of_an_uninterrupted_run(
    store: str, finished: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, batches = Experiment.run, []

    def interrupted(*args: Any, **kwargs: Any) -> Hits:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(args)
        return whole(*args, **kwargs)

    monkeypatch.setattr(experiment.Experiment, "run", interrupted)
    result = call(*TINY, "--tracking-uri", store)
    parent, child = latest(store)
    assert result.exit_code == 1
    assert f"srd-lab apop --resume {parent.info.run_id}" in result.output
    assert parent.info.status == child.info.status == "KILLED"

    batches[:] = batches[:1]  # room for one more
    result = call("--resume", parent.info.run_id, "--tracking-uri", store, "--device", "cpu")
    assert result.exit_code == 0, result.output
    again, child = latest(store)
    assert again.info.run_id == parent.info.run_id
    assert again.info.status == "FINISHED"
    tables = [artifact(store, run, "images.csv").read_text() for run in (child, finished[1])]
    assert tables[0] == tables[1]
    timeless = [{k: v for k, v in run.data.metrics.items() if k != "seconds"} for run in (child, finished[1])]
    assert timeless[0] == timeless[1]
    refused = call("--resume", parent.info.run_id, "--images", "9", "--tracking-uri", store)
    assert refused.exit_code == 1
    assert "images = 7, not 9" in refused.output


def test_output_without_tracking(tmp_path: Path) -> None:
    out = tmp_path / "out"
    models = ("--model", "resnet18", "--model", "vgg16")
    result = call(*TINY, *models, "--no-binarize", "--no-track", "--out", str(out))
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    (header,) = (line for line in lines if line.startswith("Model"))
    assert header.split("  ")[0] == "Model"
    assert all(
        f"{top} {what}" in header for top in ("Top-1", "Top-5") for what in ("Ori.", "APOP", "APOP & relu")
    )
    assert [line.split()[0] for line in lines if "zeros" in line] == ["resnet18", "vgg16"]
    assert sum("normal" in line for line in lines) == 2
    assert "Guessing: 0.100 top-1, 0.500 top-5." in lines
    assert "Activation call" not in result.output
    assert not list(out.rglob("binarisation.png"))
    assert len(list(out.rglob("apop.png"))) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--inputs", "zeros,noise"), 2, "'noise' is not one of zeros, ones, normal"),
        (("--inputs", ""), 2, "--inputs"),
        (("--images", "0"), 2, "--images"),
        (("--weights", "nowhere.npz"), 2, "nowhere.npz"),
        (("--model", "alexnet", "--no-track"), 1, "vgg16"),
        (("--data", "imagenet:nowhere", "--no-track"), 1, "nowhere is not a folder"),
        (("--device", "cuda:99", "--no-track"), 1, "--device"),
        (("--resume", "x", "--no-track"), 1, "there is no x/run.json"),
        (
            ("--model", "vgg16", "--model", "resnet18", "--weights", __file__, "--no-track"),
            1,
            "give NAME=",
        ),
    ],
)
def test_wrong_input_gets_one_clear_line(arguments: tuple[str, ...], code: int, message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == code
    assert message in result.output
    assert "Traceback" not in result.output


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_where_memory_runs_out_the_hits_are_the_same(
    store: str, finished: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network takes two images at once; patterns are stored as they were taken."""
    whole, sizes = experiment.replay, list[int]()

    def narrow(network: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(x))
        if len(x) > 2 and len(sizes) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(network, x, *rest)

    monkeypatch.setattr(experiment, "replay", narrow)
    terminal = Terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        arguments = [*TINY, "--batch-size", "5", "--save-patterns", "--no-track", "--out", str(tmp_path)]
        command.main(arguments, standalone_mode=False)
    assert sizes[:3] == [5, 5, 5]
    assert max(sizes[3:]) == 2
    assert "100%" in terminal.getvalue()
    expected = artifact(store, finished[1], "images.csv").read_text()
    assert (tmp_path / "vgg16" / "images.csv").read_text() == expected
    stored = {
        folder: sorted(file.name for file in (tmp_path / "vgg16" / folder).iterdir())
        for folder in ("patterns", "batches")
    }
    assert stored == {
        "patterns": ["00000-00001.npz", "00002-00003.npz", "00004-00004.npz", "00005-00006.npz"],
        "batches": ["00000-00004.npz", "00005-00006.npz"],
    }
