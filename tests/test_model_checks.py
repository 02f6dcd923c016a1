"""What a model is tried for once: images apart, a gradient that is its slope, the same output when it is followed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_networks import OPTIONS, Small
from torch import Tensor, nn

from srd_lab.catalogue import for_any_network
from srd_lab.engine import interceptor, layer_trace, model_checks, model_memory
from srd_lab.engine.surrogate import SmoothModel
from srd_lab.errors import Refused, SrdLabWarning
from srd_lab.models import Classifier
from srd_lab.registry import make_explainer

Step = Callable[[Tensor], Tensor]
RUN = [name for name in for_any_network() if name not in ("random", "sobel")]


class Stepped(nn.Module):
    """A step between two layers, or in front of the first."""

    def __init__(self, step: Step, *, front: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act, self.fc = nn.ReLU(), nn.Linear(8, 5)
        nn.init.normal_(self.fc.weight)
        self.step, self.front = step, front
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(self.step(x) if self.front else x))
        return self.fc(self.act(self.b(y if self.front else self.step(y))).mean((2, 3)))


def explain(name: str, model: nn.Module, x: Tensor) -> Tensor:
    return make_explainer(name, **OPTIONS.get(name, {})).explain(model, x, 1)


def found_of(model: nn.Module) -> set[str]:
    return set().union(
        *(memory.get(model_memory.found_of, ()) for memory in model_memory._memories[model].values())
    )


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


# --- images apart ---------------------------------------------------------------------------------------------------

MIXING: dict[str, Step] = {
    "the mean taken off": lambda y: y - y.mean(0),
    "softmax": lambda y: torch.softmax(y, 0) * y,
    "normalised": lambda y: F.normalize(y, dim=0),
    "moved on": lambda y: y.roll(1, 0),
    "turned round": lambda y: y.flip(0),
    "summed up": lambda y: y.cumsum(0),
    "the largest of all": lambda y: y / y.amax().detach(),
}


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("way", MIXING)
@pytest.mark.parametrize("name", RUN)
def test_a_model_that_mixes_the_images_of_a_batch_is_refused(
    name: str, way: str, images: int, x: Tensor
) -> None:
    with pytest.raises(Refused, match="mixes the images of a batch"):
        explain(name, Stepped(MIXING[way]), x[:images])


@pytest.mark.parametrize(
    "there",
    [
        lambda x: x.flip(0),
        lambda x: x.roll(1, 0),
        lambda x: x[torch.arange(len(x)) - 1],
        lambda x: torch.cat([x[1:], x[:1]]),
    ],
)
def test_a_model_that_works_on_the_images_in_another_order_is_refused(there: Step, x: Tensor) -> None:
    """The map of a layer would be another image's."""

    class Turned(Stepped):
        def forward(self, x: Tensor) -> Tensor:
            order = there(torch.arange(len(x)))
            return super().forward(there(x))[order.argsort()]

    torch.testing.assert_close(Turned(lambda y: y)(x), Stepped(lambda y: y)(x))
    for name in ("gradcam", "srd"):
        with pytest.raises(Refused, match="in another order"):
            explain(name, Turned(lambda y: y), x[:2])


def test_a_surrogate_of_a_model_that_mixes_is_refused_too(x: Tensor) -> None:
    with pytest.raises(Refused, match="mixes the images"):
        explain("gradient", SmoothModel(Stepped(MIXING["moved on"]), 10.0), x)


def test_a_model_is_tried_once_whatever_is_asked_of_it(x: Tensor) -> None:
    model, sizes = Stepped(lambda y: y), []
    model.register_forward_hook(lambda module, inputs, out: sizes.append(len(out)))
    explain("srd", model, x)
    sizes.clear()
    explain("srd", model, x)
    explain("srd", SmoothModel(model, 10.0), x)
    assert sizes == [3, 3]


def test_a_model_that_tells_no_images_apart_is_tried_three_times(x: Tensor) -> None:
    model = Stepped(lambda y: y * 0)
    for _ in range(5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            explain("gradient", model, x)
    said = found_of(model)
    assert sum(one.startswith("asked") for one in said) == 2
    assert model_checks._APART in said


def test_a_model_that_was_changed_is_tried_again(x: Tensor) -> None:
    model = Stepped(lambda y: y)
    explain("gradient", model, x)
    handle = model.b.register_forward_hook(lambda module, inputs, out: out.roll(1, 0))
    with pytest.raises(Refused, match="mixes the images"):
        explain("gradient", model, x)
    handle.remove()
    explain("gradient", model, x)


@pytest.mark.parametrize("name", ["gradient", "srd", "gradcam"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_with_an_exchanged_part_is_tried_again(name: str, wrapped: bool, x: Tensor) -> None:
    part = Stepped(lambda y: y)
    model = Classifier(part, (0.5,) * 3, (0.25,) * 3) if wrapped else part
    explain(name, model, x)
    part.step = lambda y: y + y.mean(0, keepdim=True)
    with pytest.raises(Refused, match=r"mixes the images|differs from what started"):
        explain(name, model, x)
    with pytest.raises(Refused):
        explain(name, model, x)
    part.step = lambda y: y
    explain(name, model, x)


def shifted_in_time(y: Tensor) -> Tensor:
    """Four frames of a video as four images, half of the channels of each from the frame before."""
    frames = y.unflatten(0, (len(y) // 4, 4))
    earlier = torch.cat([torch.zeros_like(frames[:, :1]), frames[:, :-1]], 1)
    return torch.cat([earlier[:, :, :4], frames[:, :, 4:]], 2).flatten(0, 1)


def crowded(y: Tensor) -> Tensor:
    """An expert for two images at a time, those that it likes best."""
    liked = y.mean((1, 2, 3)).argsort(descending=True)[:2]
    return y.index_add(0, liked, y[liked])


MIXING_MANY: dict[str, Step] = {
    "frames": shifted_in_time,
    "from three images on": lambda y: y + y.mean(0, keepdim=True) * (len(y) > 2),
    "an expert": crowded,
}


@pytest.mark.parametrize("way", MIXING_MANY)
@pytest.mark.parametrize("name", ["gradient", "guided_backprop", "lrp_epsilon", "srd", "gradcam", "scorecam"])
def test_a_model_that_mixes_more_images_than_two_is_refused(name: str, way: str) -> None:
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with pytest.raises(Refused, match="mixes the images"):
        explain(name, Stepped(MIXING_MANY[way]), x)


def test_a_model_for_four_images_at_a_time_is_tried_with_four(x: Tensor) -> None:
    four = torch.cat([x, x[:1] / 2])
    model = Stepped(lambda y: y.view(4, *y.shape[1:]))
    torch.testing.assert_close(
        explain("gradient", model, four), explain("gradient", Stepped(lambda y: y), four)
    )


class Gained(nn.Module):
    """Adds a share of what is beside an image: as much as a parameter, a buffer, or an attribute says."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.net = Stepped(lambda y: y + self.gain * y.mean(0, keepdim=True))
        self.gain: float | Tensor = 0.0
        if where == "parameter":
            self.gain = nn.Parameter(torch.zeros(()))
        if where == "buffer":
            del self.gain
            self.register_buffer("gain", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def turn(self, gain: float) -> None:
        if isinstance(self.gain, Tensor):
            with torch.no_grad():
                self.gain.fill_(gain)
        else:
            self.gain = gain


@pytest.mark.parametrize("where", ["parameter", "buffer", "attribute"])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_model_with_other_weights_or_attributes_is_tried_again(where: str, smooth: bool, x: Tensor) -> None:
    model = Gained(where).eval()
    asked: nn.Module = SmoothModel(model, 10.0) if smooth else model
    explain("gradient", asked, x)
    model.turn(1.0)
    with pytest.raises(Refused, match="mixes the images"):
        explain("gradient", asked, x)
    model.turn(0.0)
    explain("gradient", asked, x)


def test_axes_that_have_one_hash_are_told_apart(x: Tensor) -> None:
    """In Python -1 and -2 have the same."""

    class Summed(Stepped):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.softmax(self.axis).mean((1, 2, 3), keepdim=True)[..., 0, 0]

    model, states, sequences = Summed(lambda y: y), [], []
    for model.axis in (-1, -2):
        watch = interceptor.Watch(model)
        watch.run(x)
        states.append(model_memory._state_and_weights(model))
        sequences.append(watch.sequence)
    assert states[0] != states[1]
    assert sequences[0] != sequences[1]


def test_of_a_model_that_is_trained_on_the_last_states_are_kept(x: Tensor) -> None:
    model = Gained("parameter").eval()
    for step in range(12):
        model.turn(0.0)
        explain("gradient", model, x[:1])
        assert len(model_memory._memories[model]) <= min(step + 1, model_memory._STATES)


def test_what_logits_have_in_common_hides_no_mixture(x: Tensor) -> None:
    class Far(Stepped):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1000

    explain("gradient", Far(lambda y: y), x)
    with pytest.raises(Refused, match="mixes the images"):
        explain("gradient", Far(lambda y: y + y.mean(0, keepdim=True)), x)


def test_numbers_beside_the_way_do_not_count_as_rounding(x: Tensor) -> None:
    def step(y: Tensor) -> Tensor:
        _ = torch.zeros(1) + 0  # float32
        return y + 1e-4 * (y.mean(0, keepdim=True) - y)

    with pytest.raises(Refused, match="mixes the images"):
        explain("gradient", Stepped(step).double(), x.double())


# --- a gradient that is the slope ----------------------------------------------------------------------------------


def doubled_unseen(y: Tensor) -> Tensor:
    y.data.mul_(2)
    return y


FALSE: dict[str, tuple[Step, bool]] = {
    "changed through .data": (doubled_unseen, False),
    "rounded pixels": (lambda x: (x * 255).round() / 255, True),
    "detached in part": (lambda y: y * y.detach(), False),
}


def warned(name: str, model: nn.Module, x: Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            explain(name, model, x)
        except Refused as error:
            return [str(error)]
    return [str(one.message) for one in seen if issubclass(one.category, SrdLabWarning)]


@pytest.mark.parametrize("way", ["changed through .data", "rounded pixels", "detached in part"])
@pytest.mark.parametrize("name", ["gradient", "guided_backprop", "gradcam", "lrp_epsilon", "srd", "fullgrad"])
def test_a_gradient_that_is_not_the_slope_is_said(name: str, way: str, x: Tensor) -> None:
    step, front = FALSE[way]
    assert warned(name, Stepped(step, front=front), x)


def test_hooks_that_change_gradients_are_said(x: Tensor) -> None:
    """As other tools leave them on a network: those of guided backprop, say."""
    model = Stepped(lambda y: y)
    model.act.register_full_backward_hook(lambda module, to_input, to_output: (3 * to_input[0],))
    assert any("hooks of its modules" in said for said in warned("gradcam", model, x))
    model = Stepped(lambda y: y)
    model.act.register_full_backward_hook(lambda module, to_input, to_output: (to_input[0].clamp(min=0),))
    assert any("hooks of its modules" in said for said in warned("lrp_epsilon", model, x))
    model = Stepped(lambda y: y)
    model.act.register_full_backward_hook(lambda module, to_input, to_output: None)
    assert warned("gradcam", model, x) == []


@pytest.mark.parametrize("name", ["scorecam", "ablationcam"])
def test_methods_without_gradients_say_nothing_of_them(name: str, x: Tensor) -> None:
    step, front = FALSE["rounded pixels"]
    assert warned(name, Stepped(step, front=front), x) == []


def test_a_false_slope_is_said_again(x: Tensor) -> None:
    """Of every map, also where the first call was refused."""
    step, front = FALSE["changed through .data"]
    model = Stepped(step, front=front)
    assert "detached view" in warned("srd", model, x)[0]
    for _ in range(2):
        assert warned("gradient", model, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kink_between_the_steps_is_no_false_slope(dtype: torch.dtype, x: Tensor) -> None:
    class Largest(Stepped):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.b(F.relu(self.a(x)))).amax((2, 3)))

    for seed in range(12):
        model = Largest(lambda y: y)
        torch.manual_seed(seed)
        for module in (model.a, model.b, model.fc):
            module.reset_parameters()
        assert warned("gradient", model.to(dtype), x.to(dtype)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_honest_model_is_not_warned_of(dtype: torch.dtype, x: Tensor) -> None:
    for seed in range(20):
        assert warned("gradient", Small(seed=seed).to(dtype).eval(), x.to(dtype)) == []


def test_nothing_is_drawn_for_the_trial(x: Tensor) -> None:
    """A model whose gradient is zero is tried along a way that is always the same."""
    step, front = FALSE["rounded pixels"]
    model = Stepped(step, front=front)
    state = torch.get_rng_state()
    warned("gradient", model, x)
    assert torch.equal(torch.get_rng_state(), state)


# --- the same output -----------------------------------------------------------------------------------------------


def test_a_network_that_is_another_when_it_is_followed_is_refused(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in what follows a model: here it adds 1 to what every convolution puts out."""
    model = Stepped(lambda y: y)

    def wrong(self: interceptor.Interceptor, conv: interceptor.Convolution) -> Tensor:
        return conv.apply(conv.x, conv.weight, conv.bias) + 1

    monkeypatch.setattr(layer_trace.LayerTrace, "convolution", wrong)
    with pytest.raises(Refused, match=r"differ by .* when its calls are followed"):
        explain("gradcam", model, x)


def test_the_output_is_compared_for_every_way_of_following(x: Tensor) -> None:
    model = Stepped(lambda y: y)
    for name in RUN:
        explain(name, model, x)
    followers = {said.split()[2] for said in found_of(model) if said.startswith("followed")}
    assert {"SRDTrace", "ModifiedTrace", "Gated", "LayerTrace", "_Biases"} <= followers
