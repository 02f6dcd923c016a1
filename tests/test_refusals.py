"""What would give a wrong map without a word: chance, the batch, compiled code, pixels of 0..255. Right, or one line."""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import OPTIONS
from torch import Tensor, nn

import srd_lab
from srd_lab.catalogue import METHODS, for_any_network
from srd_lab.engine.surrogate import SmoothModel
from srd_lab.errors import BadInput, Refused, SrdLabError
from srd_lab.methods.averaged import SmoothGrad
from srd_lab.methods.smoothed import BetaSmoothed, Smoothed
from srd_lab.methods.srd import SRD
from srd_lab.models import Classifier
from srd_lab.registry import make_explainer

RUN = [name for name in for_any_network() if name != "random"]  # what runs the model
FOLLOWED = [
    "gradient",
    "gradcam",
    "scorecam",
    "fullgrad",
    "srd",
    "lrp_zplus",
]  # a method of every kind that asks for it


class Net(nn.Module):
    """Two convolutions, a linear layer, and a way to call them."""

    def __init__(self, way: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c, self.d, self.fc = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Linear(6, 4),
        )
        self.way = way
        self.double().eval().requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.d(F.relu(self.c(x))))

    def head(self, y: Tensor) -> Tensor:
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def plain(s: Net, x: Tensor) -> Tensor:
    return s.head(s.features(x))


def explain(name: str, model: nn.Module, x: Tensor) -> Tensor:
    return make_explainer(name, **OPTIONS.get(name, {})).explain(model, x, 1)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def kept(y: Tensor) -> Tensor:
    """Stochastic depth: the branch of some images is left out."""
    return y * torch.empty(len(y), 1, 1, 1, dtype=y.dtype).bernoulli_(0.5)


OWN = torch.Generator()

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "stochastic depth": lambda y: y + kept(y),
    "drop block": lambda y: y * (torch.rand(len(y), 1, 8, 8, dtype=y.dtype) > 0.1),
    "rrelu": lambda y: F.rrelu(y, training=True),
    "gumbel_softmax": lambda y: y * F.gumbel_softmax(y, dim=1),
    "randn_like": lambda y: y + 0.1 * torch.randn_like(y),
    "randperm": lambda y: y[:, torch.randperm(6)],
    "normal_": lambda y: y + torch.zeros_like(y).normal_(),
    "a random pool": lambda y: F.fractional_max_pool2d(y, 2, 4),
    "a gamma distribution": lambda y: y * torch._standard_gamma(torch.ones(1, dtype=y.dtype)),
    "dropout by its operator": lambda y: torch.native_dropout(y, 0.5, True)[0],
    "alpha dropout in place": lambda y: torch.feature_alpha_dropout(y, 0.5, True),
    "random": lambda y: y * (1 if random.random() > 0.01 else 3),
    "numpy": lambda y: y * (1 if np.random.rand() > 0.01 else 3),  # noqa: NPY002
    "a generator that goes on": lambda y: y * (1 if torch.rand(1, generator=OWN) > 0.01 else 3),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("name", FOLLOWED)
def test_chance_is_refused(name: str, draw: str, x: Tensor) -> None:
    model = Net(lambda s, x: s.head(DRAWS[draw](s.features(x))))
    with pytest.raises(
        SrdLabError, match=r"draws at random, so that the model has no one map for an image; call model"
    ):
        explain(name, model, x)


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_kept_from_run_to_run_is_refused(name: str, x: Tensor) -> None:
    runs, chance = [0], np.random.default_rng(0)

    def counted(s: Net, x: Tensor) -> Tensor:
        runs[0] += 1
        return s.head(s.features(x) * (1 + 0.01 * runs[0]))

    for way in (counted, lambda s, x: s.head(s.features(x) * chance.uniform(1, 2))):
        with pytest.raises(Refused, match="puts out other logits when it is run again"):
            explain(name, Net(way), x)


@pytest.mark.parametrize("name", RUN)
def test_a_generator_that_is_seeded_in_every_run_is_no_chance(name: str, x: Tensor) -> None:
    """A fixed random projection, say."""

    def projected(s: Net, x: Tensor) -> Tensor:
        weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
        return s.head(F.linear(s.features(x).movedim(1, -1), weight).movedim(-1, 1).relu())

    assert explain(name, Net(projected), x).shape[0] == 2


@pytest.mark.parametrize("name", ["gradient", "fullgrad", "gradcam", "integrated_gradients"])
def test_rrelu_in_evaluation_draws_nothing(name: str, x: Tensor) -> None:
    rrelu, leaky = (
        Net(lambda s, x, f=f: s.head(f(s.features(x) - 0.1)))  # type: ignore[misc]
        for f in (F.rrelu, lambda y: F.leaky_relu(y, (1 / 8 + 1 / 3) / 2))
    )
    torch.testing.assert_close(explain(name, rrelu, x), explain(name, leaky, x))


BATCHES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "copies for an average": lambda s, x: plain(s, torch.cat([x, x.flip(-1)])),
    "a mean over the batch": lambda s, x: plain(s, x).mean(0, keepdim=True),
    "one image left out": lambda s, x: plain(s, x[1:]),
}


@pytest.mark.parametrize("way", BATCHES)
@pytest.mark.parametrize("name", RUN)
def test_an_output_with_other_rows_than_images_is_refused(name: str, way: str, x: Tensor) -> None:
    with pytest.raises(Refused, match=r"for 2 images; expected one row per image"):
        explain(name, Net(BATCHES[way]), x)


def whole(model: Net) -> None:
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]


def part(model: Net) -> None:
    model.features = torch.compile(model.features, backend="eager")  # type: ignore[method-assign]


@pytest.mark.parametrize("compiled", [whole, part])
@pytest.mark.parametrize("name", RUN)
def test_compiled_functions_run_as_they_were_written(
    name: str, compiled: Callable[[Net], Any], x: Tensor
) -> None:
    model = Net(plain)
    compiled(model)
    torch.testing.assert_close(explain(name, model, x), explain(name, Net(plain), x))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", RUN)
def test_statistics_of_weights_are_constants(name: str, trainable: bool, x: Tensor) -> None:
    """Weights that are standardised by batch_norm(training=True), as NFNet's are."""

    def standardised(s: Net, x: Tensor) -> Tensor:
        weight = F.batch_norm(s.d.weight.reshape(1, 6, -1), None, None, training=True).reshape_as(s.d.weight)
        return s.head(F.relu(F.conv2d(F.relu(s.c(x)), weight, s.d.bias, padding=1)))

    model, same = Net(standardised).requires_grad_(trainable), Net(plain)
    flat = same.d.weight.flatten(1)
    flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    same.d.weight.data = flat.view_as(same.d.weight)
    torch.testing.assert_close(explain(name, model, x).detach(), explain(name, same, x))


BY_NAME_OR_ITSELF: dict[str, Callable[..., Tensor]] = {
    "srd_lab.explain": srd_lab.explain,
    "SRD": SRD().explain,
    "SmoothGrad": SmoothGrad(samples=2).explain,
    "smoothed": Smoothed(SRD(), draws=2).explain,
    "beta_smoothed": BetaSmoothed(SRD()).explain,
}


@pytest.mark.parametrize("asked", BY_NAME_OR_ITSELF)
def test_pixels_of_another_range_are_refused_where_the_model_normalises(asked: str, x: Tensor) -> None:
    explain = BY_NAME_OR_ITSELF[asked]
    model = Classifier(Net(plain), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)).double().eval()
    for fed in (model, SmoothModel(model, 30.0)):
        with pytest.raises(BadInput, match=r"expects pixels in \[0, 1\], got \[.*, 25\d.*\]; divide by 255"):
            explain(fed, x * 255, 1)
        for normalised in (2 * x - 1, 4 * (x - 0.5), model.normalise(x)):
            with pytest.raises(BadInput, match=r"pass model\.network, if they are normalised already"):
                explain(fed, normalised, 1)
    with pytest.raises(BadInput, match=r"got \[0\.\d*, 1\.4\]; pass .*, or clip noise with x\.clamp\(0, 1\)"):
        explain(model, torch.where(x == x.max(), 1.4, x), 1)
    assert explain(model, x + 0.1 * (2 * torch.rand_like(x) - 1), 1).shape == (2, 8, 8)


def test_a_bare_network_is_fed_with_what_it_was_trained_on(x: Tensor) -> None:
    model = Classifier(Net(plain), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)).double().eval()
    normalised = model.normalise(x)
    torch.testing.assert_close(
        srd_lab.explain(model.network, normalised, 1), srd_lab.explain(model, x, 1), check_stride=False
    )
    assert srd_lab.explain(model.network, 255 * x, 1).shape == (2, 8, 8)


@pytest.mark.parametrize("name", RUN)
def test_noise_and_paths_inside_of_a_method_may_leave_the_range_of_pixels(name: str, x: Tensor) -> None:
    model = Classifier(Net(plain), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)).double().eval()
    Smoothed(make_explainer(name, **OPTIONS.get(name, {})), sigma=0.5, draws=2).explain(model, x, 1)
    found, logits = make_explainer(name, **OPTIONS.get(name, {})).explain_with_logits(model, x + 0.5, 1)
    assert found.isfinite().all()
    assert logits.shape == (2, 4)


class OneLogit(nn.Module):
    """A network for two classes: one logit, as (N, 1) or (N,), or the two that stand for it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.c, self.d = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.fc, self.kind = nn.Linear(6, 1), kind
        if kind == "two":
            weight, bias = self.fc.weight.detach(), self.fc.bias.detach()
            self.fc = nn.Linear(6, 2)
            self.fc.weight.data, self.fc.bias.data = torch.cat([-weight, weight]), torch.cat([-bias, bias])
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(F.relu(self.d(F.relu(self.c(x)))).mean((2, 3)))
        return y[:, 0] if self.kind == "flat" else y


@pytest.mark.parametrize("kind", ["one", "flat"])
@pytest.mark.parametrize("name", RUN)
def test_one_logit_is_that_of_class_1_and_its_negative_that_of_class_0(
    name: str, kind: str, x: Tensor
) -> None:
    explainer = make_explainer(name, **OPTIONS.get(name, {}))
    for target in (0, 1, None):
        expected, two = explainer.explain_with_logits(OneLogit("two"), x, target)
        found, logits = explainer.explain_with_logits(OneLogit(kind), x, target)
        torch.testing.assert_close(logits, two)
        torch.testing.assert_close(found, expected)


def test_the_contrast_of_one_logit_is_no_longer_zero(x: Tensor) -> None:
    found = [make_explainer("srd").explain(OneLogit("one"), x, target) for target in (0, 1)]
    assert any(map_.any() for map_ in found)
    assert not torch.equal(*found)


def test_one_logit_behind_no_linear_layer_is_refused_by_rules_that_modify_weights(x: Tensor) -> None:
    model = Net(lambda s, x: s.features(x).mean((1, 2, 3)))
    assert make_explainer("srd").explain(model, x, 1).any()
    with pytest.raises(Refused, match=r"a network with one logit must end in a linear layer"):
        make_explainer("lrp_zplus").explain(model, x, 1)


class Output(dict[str, Any]):
    """What some libraries put out: a mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Named(NamedTuple):
    aux: Tensor
    logits: Tensor


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "a tuple": lambda y: (y, y.sum()),
    "a list": lambda y: [y, None],
    "under logits": lambda y: {"loss": y.sum(), "logits": y},
    "one tensor in a mapping": lambda y: {"out": y, "name": "it"},
    "an object": lambda y: Output(loss=None, logits=y),
    "a named tuple": lambda y: Named(y.sum(), y),
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", RUN)
def test_logits_are_found_in_structured_outputs(name: str, output: str, x: Tensor) -> None:
    model = Net(lambda s, x: OUTPUTS[output](plain(s, x)))
    torch.testing.assert_close(explain(name, model, x), explain(name, Net(plain), x), rtol=0, atol=0)


@pytest.mark.parametrize("name", RUN)
def test_what_holds_no_logits_is_named_and_the_advice_works(name: str, x: Tensor) -> None:
    model = Net(lambda s, x: dict.fromkeys(("mask", "score"), plain(s, x)))
    with pytest.raises(
        SrdLabError,
        match=r"must be logits \(N, K\), got a dict of 'mask', 'score'; pass a module whose forward\(\) returns them alone",
    ):
        explain(name, model, x)
    wrapped = Net(lambda s, x: (model(x)["score"], "first in a tuple"))
    torch.testing.assert_close(explain(name, wrapped, x), explain(name, Net(plain), x))


WRONG_TARGETS = {
    "a class by name": "cat",
    "names": ["cat", "dog"],
    "ragged": [[1], [2, 3]],
    "none inside": [1, None],
    "too large to be a class": 2**70,
}


@pytest.mark.parametrize("target", WRONG_TARGETS)
def test_targets_that_are_no_classes_are_one_line(target: str, x: Tensor) -> None:
    with pytest.raises(
        SrdLabError, match=r"\Atargets must be class indices, one per image or one for all, got [^\n]*\Z"
    ):
        make_explainer("gradient").explain(Net(plain), x, WRONG_TARGETS[target])  # type: ignore[arg-type]


def test_an_array_of_pixels_gets_the_right_advice(x: Tensor) -> None:
    with pytest.raises(BadInput, match=r"got ndarray; give torch\.from_numpy\(x\)"):
        srd_lab.explain(Net(plain), x.numpy(), 1)  # type: ignore[arg-type]
    srd_lab.explain(Net(plain), torch.from_numpy(x.numpy()), 1)
    with pytest.raises(BadInput, match=r"got list; give a torch\.Tensor"):
        srd_lab.explain(Net(plain), [[1.0]], 1)  # type: ignore[arg-type]


def zeroed(y: Tensor) -> Tensor:
    y = y.clone()
    y[y < 0] = 0
    return y


@torch.no_grad()
def positive(y: Tensor) -> Tensor:
    return y > 0


def tried(
    name: str, model: nn.Module, x: Tensor, target: int | None = 1, options: dict[str, Any] | None = None
) -> tuple[Tensor | None, str]:
    """The map, or why there is none; options : None = those of small maps."""
    options = OPTIONS.get(name, {}) if options is None else options
    try:
        return make_explainer(name, **options).explain(model, x, target), ""
    except SrdLabError as error:
        return None, str(error)


RELUS_BY_HAND: dict[str, Callable[[Tensor], Tensor]] = {
    "maximum": lambda y: torch.maximum(y, torch.zeros_like(y)),
    "fmax": lambda y: torch.fmax(y, torch.zeros_like(y)),
    "minus minimum": lambda y: y - torch.minimum(y, torch.zeros_like(y)),
    "where": lambda y: torch.where(y > 0, y, torch.zeros_like(y)),
    "times a mask": lambda y: y * (y > 0),
    "times a float mask": lambda y: y * (y > 0).to(y),
    "times a heaviside": lambda y: y * torch.heaviside(y.detach(), torch.zeros_like(y)),
    "masked_fill": lambda y: y.masked_fill(y < 0, 0.0),
    "indexed by a mask": zeroed,
    "half of abs": lambda y: (y + y.abs()) / 2,
    "abs, in place": lambda y: (y + y.clone().abs_()) / 2,
    "clamp at a tensor": lambda y: y.clamp(min=torch.zeros_like(y)),
    "clamp_min at a tensor": lambda y: torch.clamp_min(y, torch.zeros((), dtype=y.dtype)),
    "times half of one plus sign": lambda y: y * (1 + torch.sign(y)) / 2,
    "times a detached mask": lambda y: y * (y.detach() > 0).to(y.dtype),
    "times a mask of data": lambda y: y * (y.data > 0),
    "times a mask without gradients": lambda y: y * positive(y),
    "half of y and its root of squares": lambda y: (y + torch.sqrt(y * y)) / 2,
    "half of y and a power": lambda y: (y + (y**2) ** 0.5) / 2,
    "half of y and its norm": lambda y: (y + y[..., None].norm(dim=-1)) / 2,
    "half of y and hypot": lambda y: (y + torch.hypot(y, y.new_zeros(()))) / 2,
    "half of y and copysign": lambda y: (y + torch.copysign(y, y.new_ones(()))) / 2,
    "soft, and as good as hard": lambda y: torch.logaddexp(1e6 * y, y.new_zeros(())) / 1e6,
    "the larger of two": lambda y: torch.stack([y, torch.zeros_like(y)]).amax(0),
    "the larger of a pair": lambda y: torch.cat([y[..., None], torch.zeros_like(y)[..., None]], -1).amax(-1),
    "the larger, sorted": lambda y: torch.stack([y, torch.zeros_like(y)]).sort(0)[0][1],
    "the larger so far": lambda y: torch.stack([torch.zeros_like(y), y]).cummax(0)[0][1],
    "the median": lambda y: torch.stack([y, torch.zeros_like(y), torch.full_like(y, 1e9)]).median(0)[0],
    "pooled": lambda y: F.max_pool3d(F.pad(y[:, :, None], (0, 0, 0, 0, 0, 1)), (2, 1, 1))[:, :, 0],
    "pooled in two dimensions": lambda y: F.max_pool2d(
        F.pad(y.flatten(2)[:, :, :, None], (0, 1)), (1, 2)
    ).view_as(y),
    "an operator": lambda y: torch.ops.aten.relu(y),
    "an overload": lambda y: torch.ops.aten.relu.default(y),
    "below functional": lambda y: torch._C._nn.leaky_relu(y, 0.0),
    "minus a detached minimum": lambda y: y - (y.detach() * 1.0).clamp(max=torch.zeros_like(y)),
}


@pytest.mark.parametrize("relu", RELUS_BY_HAND)
@pytest.mark.parametrize(
    "name",
    ["guided_backprop", "deconvnet", "srd", "lrp_epsilon", "lrp_zplus", "lrp_gamma", "excitation_backprop"],
)
def test_a_relu_by_hand_is_an_activation_or_refused(name: str, relu: str, x: Tensor) -> None:
    model = Net(lambda s, x: s.head(RELUS_BY_HAND[relu](s.d(F.relu(s.c(x))))))
    found, refusal = tried(name, model, x)
    if found is None:
        assert any(
            said in refusal for said in ("no rule for it", "cannot follow", "activations that are >= 0")
        )
        return
    torch.testing.assert_close(found, explain(name, Net(plain), x))


def in_part(s: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = F.relu(s.c(x))
    return s.head(F.relu(s.d(y)))


@torch.autocast("cpu", torch.bfloat16)
def in_whole(s: Net, x: Tensor) -> Tensor:
    return plain(s, x)


@pytest.mark.parametrize("forward", [in_part, in_whole], ids=["a part", "the whole"])
@pytest.mark.parametrize("name", RUN)
def test_autocast_inside_a_model_is_off_while_it_is_explained(
    name: str, forward: Callable[[Net, Tensor], Tensor], x: Tensor
) -> None:
    """The map is that of the network itself; and what comes behind is in autocast as before."""
    x = x.float()
    found, expected = (explain(name, Net(way).float(), x) for way in (forward, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert Net(in_whole).float()(x).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_around_an_explanation_is_refused(x: Tensor) -> None:
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(BadInput, match=r"leave torch\.autocast around the call out"),
    ):
        explain("srd", Net(plain).float(), x.float())


@pytest.mark.parametrize("name", RUN)
def test_a_model_made_in_inference_mode_is_refused_and_its_copy_is_not(name: str, x: Tensor) -> None:
    with torch.inference_mode():
        model = Net(plain)
    with pytest.raises(Refused, match=r"made in torch\.inference_mode.*or pass copy\.deepcopy\(model\)"):
        explain(name, model, x)
    torch.testing.assert_close(explain(name, copy.deepcopy(model), x), explain(name, Net(plain), x))


def detached_front(s: Net, x: Tensor) -> Tensor:
    return s.head(F.relu(s.d(F.relu(s.c(x)).detach())))


@torch.inference_mode()
def inferred(s: Net, x: Tensor) -> Tensor:
    return plain(s, x)


@torch.no_grad()
def without_gradients(s: Net, x: Tensor) -> Tensor:
    return plain(s, x)


def frozen_front(s: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = F.relu(s.c(x))
    return s.head(F.relu(s.d(y)))


def turned(s: Net, x: Tensor) -> Tensor:
    """Through complex numbers and back."""
    y = F.relu(s.c(x)).transpose(1, 3)
    z = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * torch.ones((), dtype=torch.complex128)
    return s.head(F.relu(s.d(torch.view_as_real(z).flatten(-2).transpose(1, 3))))


def filtered(s: Net, x: Tensor) -> Tensor:
    """A filter in frequency space that passes everything."""
    y = F.relu(s.c(x))
    return s.head(F.relu(s.d(torch.fft.irfft2(torch.fft.rfft2(y), s=y.shape[2:]))))


CUT: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "a detached output": lambda s, x: plain(s, x).detach(),
    "a detached front": detached_front,
    "no_grad": without_gradients,
    "a front without gradients": frozen_front,
    "inference_mode inside": inferred,
    "complex numbers": turned,
    "a filter in frequency space": filtered,
}


@pytest.mark.parametrize("cut", CUT)
@pytest.mark.parametrize("name", RUN)
def test_what_cannot_be_followed_is_right_or_one_line(name: str, cut: str, x: Tensor) -> None:
    found, refusal = tried(name, Net(CUT[cut]), x)
    if found is None:
        assert refusal.count("\n") == 0
        return
    torch.testing.assert_close(found, explain(name, Net(plain), x))


@pytest.mark.filterwarnings("ignore:quantized..linear_dynamic")  # torch says so itself
@pytest.mark.parametrize("name", RUN)
def test_a_quantised_head_is_right_or_one_line(name: str, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(Net(plain).float(), {nn.Linear}, torch.qint8)
    found, refusal = tried(name, model, x.float())
    if found is None:
        assert re.search("no gradient leads|linear layer|quantized.linear_dynamic in fc is neither", refusal)
        return
    torch.testing.assert_close(found, explain(name, Net(plain).float(), x.float()), rtol=0.05, atol=0.05)


def test_activations_of_1e_18_are_decomposed_as_those_of_1(x: Tensor) -> None:
    model = Net(plain).float()
    expected = explain("srd", model, x.float())
    with torch.no_grad():
        for parameter in (model.c.weight, model.c.bias, model.d.bias):
            parameter *= 1e-18
    torch.testing.assert_close(explain("srd", model, x.float()), expected, rtol=1e-3, atol=1e-5)


class Strided(Net):
    """Three strided convolutions, so that a map at 1/8 of the image is there, and ``way`` with what comes of it."""

    def __init__(self, way: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(way)
        self.e, self.f = nn.Conv2d(6, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 2, 1)
        self.c.stride = (2, 2)
        self.float().eval()

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.f(F.relu(self.e(F.relu(self.c(x))))))


def of_logits(made: Callable[[Tensor], Any]) -> type[Net]:
    """A network that puts out what is ``made`` of its logits."""

    class Made(Strided):
        def __init__(self) -> None:
            super().__init__(lambda s, x: made(plain(s, x)))

    return Made


def over_maps(made: Callable[[Tensor], Tensor]) -> type[Net]:
    """A network that goes on with what is ``made`` of a map."""

    class Made(Strided):
        def __init__(self) -> None:
            super().__init__(lambda s, x: s.head(F.relu(s.f(F.relu(made(s.e(F.relu(s.c(x)))))))))

    return Made


class TwoInputs(Strided):
    def __init__(self) -> None:
        super().__init__(plain)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return plain(self, x * mask)


class ByName(Strided):
    def __init__(self) -> None:
        super().__init__(plain)

    def forward(self, *, x: Tensor) -> Tensor:  # type: ignore[override]
        return plain(self, x)


NOT_FLOATING = r"must be dense logits of floating point, got torch\.{}; pass a module whose forward\(\) returns them as the"
NO_LOGITS = r"must be logits \(N, K\), got "
# model -> what every refusal says; None where some methods have a map
ODD: dict[str, tuple[Callable[[], Net], str | None]] = {
    "a detached output": (of_logits(Tensor.detach), None),
    "float16 logits": (of_logits(Tensor.half), None),
    "bfloat16 logits": (of_logits(Tensor.bfloat16), None),
    "float64 logits": (of_logits(Tensor.double), None),
    "complex logits": (of_logits(lambda y: torch.complex(y, y)), NOT_FLOATING.format("complex64")),
    "complex, detached": (
        of_logits(lambda y: torch.complex(y, y).detach()),
        NOT_FLOATING.format("complex64"),
    ),
    "whole numbers": (of_logits(lambda y: (1000 * y).long()), NOT_FLOATING.format("int64")),
    "a class": (of_logits(lambda y: y.argmax(1)), NOT_FLOATING.format("int64")),
    "truth values": (of_logits(lambda y: y > 0), NOT_FLOATING.format("bool")),
    "sparse logits": (of_logits(Tensor.to_sparse), NOT_FLOATING.format("sparse_coo, torch.float32")),
    "no classes": (of_logits(lambda y: y[:, :0]), NO_LOGITS + r"shape \(2, 0\)"),
    "nothing": (of_logits(lambda y: None), NO_LOGITS + "a NoneType"),
    "a text": (of_logits(lambda y: "cat"), NO_LOGITS + "a str"),
    "an array": (of_logits(lambda y: y.detach().numpy()), NO_LOGITS + "a ndarray|out of torch"),
    "a map": (
        of_logits(lambda y: y[:, :, None, None]),
        NO_LOGITS + r"shape \(2, 4, 1, 1\)|needs class logits behind",
    ),
    "constants": (of_logits(lambda y: torch.zeros(2, 4)), None),
    "parameters": (of_logits(lambda y: nn.Parameter(torch.rand(2, 4)) + 0), None),
    "two inputs": (
        TwoInputs,
        r"forward\(x, mask\) cannot be called with the images alone .*'mask'\); wrap it in a",
    ),
    "an input by name": (
        ByName,
        r"forward\(x\) cannot be called with the images alone .*; wrap it in a module whose",
    ),
    "flattened and restored": (over_maps(lambda y: y.flatten(1).view_as(y)), None),
    "shifted when flat": (over_maps(lambda y: (y.flatten() + 0.1).view_as(y)), None),
    "activated when flat": (over_maps(lambda y: F.silu(y.flatten(0, 2)).view_as(y)), None),
}


# a method of every way through the engine
KINDS = (
    *(
        "gradient",
        "guided_backprop",
        "integrated_gradients",
        "fullgrad",
        "gradcam",
        "scorecam",
        "ablationcam",
    ),
    *(
        "layercam_high",
        "srd_low",
        "srd_high",
        "srd",
        "lrp_epsilon",
        "lrp_zplus",
        "excitation_backprop",
        "sobel",
        "random",
    ),
)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", KINDS)
def test_an_odd_model_gives_a_map_or_one_line(name: str, odd: str) -> None:
    """With the options that a method has by default, for a class that is given and for the predicted one."""
    make, said = ODD[odd]
    few = {"integrated_gradients": {"steps": 3}, "smoothgrad": {"samples": 2}}.get(name, {})
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    for target in (1, None):
        found, refusal = tried(name, make(), x, target, few)
        assert "\n" not in refusal
        if found is None:
            assert said is None or METHODS[name].needs or re.search(said, refusal), refusal
        else:
            assert said is None
            assert (found.dtype, len(found)) == (x.dtype, 2)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", RUN)
def test_logits_of_another_precision_are_explained_as_those_of_the_images(
    name: str, kind: torch.dtype
) -> None:
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    found, refusal = tried(name, of_logits(lambda y: y.to(kind))(), x)
    if found is None:
        assert (name, "ends in a linear layer" in refusal) == ("contrastive_excitation", True)
        return
    near = 0 if kind == torch.float64 else 0.05
    torch.testing.assert_close(found, explain(name, Strided(plain), x), rtol=near + 1e-4, atol=near + 1e-6)
