"""The list of what is affine: every function that torch lets anybody override, put between a convolution and its ReLU, is
affine there by measurement, or selects among the values of its map, or is refused by name.

By default a function that is refused by name is called in one way; `-m peers` calls every function in all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import get_overridable_functions, resolve_name

from srd_lab.engine.affine import GATES, SELECTIONS
from srd_lab.engine.norms_and_attention import AFFINE_FORMS
from srd_lab.engine.spellings import ACTIVATIONS, IN_PLACE_ACTIVATIONS, LAYERS, MAX_POOLS
from srd_lab.errors import Refused, SrdLabError
from srd_lab.registry import make_explainer

Step = Callable[[Tensor], Any]
DECOMPOSING = ("srd", "lrp_epsilon", "lrp_zplus", "lrp_gamma", "excitation_backprop")
# these have a rule of their own: tests/test_intercept.py, tests/test_architectures.py
RULED = {*ACTIVATIONS, *IN_PLACE_ACTIVATIONS, *MAX_POOLS, *LAYERS, *AFFINE_FORMS, *GATES}
# no operations on maps, or they leave the process changed
NOT_CALLED = {"__setstate__", "__reduce_ex__", "share_memory_", "register_hook", "set_", "__array__"}
NOT_CALLED |= {"lobpcg"}  # iterates for half a second at each call, and is on no list


def drawn(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


CONSTANT, INDEX = drawn(1, 4, 4, 4) + 0.5, (4 * drawn(1, 4, 4, 4)).long()


def const() -> Tensor:
    return CONSTANT.clone()  # some functions write into what they are given


# ways to call a function of a map t (1, 4, 4, 4); those by "|" where the first did not work
PATTERNS: dict[str, Callable[[Callable[..., Any], Tensor], Any]] = {
    "(t)": lambda f, t: f(t),
    "(t, t)": lambda f, t: f(t, t.flip(-1)),
    "(t, constant)": lambda f, t: f(t, const()),
    "(constant, t)": lambda f, t: f(const(), t),
    "(t, 0.5)": lambda f, t: f(t, 0.5),
    "(t, 2)": lambda f, t: f(t, 2),
    "(t, 1)": lambda f, t: f(t, 1),
    "(2.0, t)": lambda f, t: f(2.0, t),
    "(t, 1, 1)": lambda f, t: f(t, 1, 1),
    "(t, -1, index)": lambda f, t: f(t, -1, INDEX),
    "([t, t])": lambda f, t: f([t, t.flip(-1)]),
    "(t, t, t)": lambda f, t: f(t, t.flip(-1), t.flip(-2)),
    "(t, constant, constant)": lambda f, t: f(t, const(), const()),
    "(t)|(matrix)": lambda f, t: f(t[0, 0]),
    "(t, t)|(matrix, matrix)": lambda f, t: f(t[0, 0], t[0, 1]),
    "(t, constant)|(matrix, constant)": lambda f, t: f(t[0, 0], const()[0, 0]),
    "(t, t)|(vector, vector)": lambda f, t: f(t[0, 0, 0], t[0, 1, 1]),
}


class Net(nn.Module):
    """A step between a convolution and its ReLU; both signs of what it makes are seen, if asked for."""

    def __init__(self, step: Step, both: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.c, self.d = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.end, self.step, self.both = nn.Identity(), step, both
        self.d.weight.data *= 6  # so that steps of rounding and the like are taken
        self.double().eval().requires_grad_(False)

    def before(self, x: Tensor) -> Tensor:
        return self.d(F.relu(self.c(x)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        made = self.step(self.before(x)).double().reshape(1, -1)
        y = F.linear(made, torch.eye(made.shape[1]).double())[..., None, None]  # whose channels are known
        y = self.end(F.relu(torch.cat([y, -y], 1) if self.both else y)).flatten(1)
        return y @ torch.linspace(-1, 1, 3 * y.shape[1], dtype=torch.float64).reshape(-1, 3)


def explain(net: Net, name: str) -> Tensor:
    options = {"srd": {"encoder": "end", "start": "ones"}, "excitation_backprop": {"level": "input"}}.get(
        name, {}
    )
    return make_explainer(name, **options).explain(net, drawn(1, 3, 4, 4), 1)


def whole(step: Step) -> Step:
    """All real maps that a step makes, as one."""

    def run(t: Tensor) -> Tensor:
        out = step(t)
        parts = out if isinstance(out, tuple | list) else (out,)
        found = [p.reshape(-1) for p in parts if isinstance(p, Tensor) and p.is_floating_point()]
        return found[0] if len(found) == 1 else torch.cat(found)

    return run


Y = Net(lambda t: t).before(drawn(1, 3, 4, 4))
AWAY = drawn(1, 4, 4, 4) - 0.5


def bent(step: Step, lengths: tuple[float, ...]) -> bool:
    """Whether the step is bent along a line through two maps, beyond rounding, or not the same twice."""
    with torch.no_grad():
        for y in (Y, 1.7 * Y.flip(1) - 0.1):
            middle, again = step(y.clone()), step(y.clone())
            if not torch.equal(middle, again):
                return True
            rounding = (1000 if middle.dtype == torch.float64 else 4) * torch.finfo(middle.dtype).eps
            for length in lengths:
                ends = step(y + length * AWAY).double() + step(y - length * AWAY).double()
                if not (ends - 2 * middle.double()).abs().max() <= rounding * (1 + ends.abs().max()):
                    return True
    return False


def overridable(ruled: bool = False) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Name and function, each function once; with those that have a rule of their own if ``ruled``."""
    seen = set[Any]()
    for functions in get_overridable_functions().values():
        for function in functions:
            name = resolve_name(function) or ""
            if (
                function in seen
                or (function in RULED and not ruled)
                or name.rpartition(".")[2] in NOT_CALLED
                or "dlpack" in name
            ):
                continue
            seen.add(function)
            yield name, function


def cases(function: Callable[..., Any]) -> Iterator[tuple[str, Step]]:
    """The ways to call a function that make a map of another one, in a network."""
    found = set[str]()
    for pattern, call in PATTERNS.items():
        if pattern.partition("|")[0] in found:
            continue
        step = whole(lambda t, call=call: call(function, t))  # type: ignore[misc]
        try:
            out = step(Y.clone().requires_grad_().clone())
            if not (out.requires_grad and out.any() and Net(step)(drawn(1, 3, 4, 4)).isfinite().all()):
                continue
        except Exception:  # no way to call this function
            continue
        found.add(pattern)
        yield pattern, step


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of functions that are deprecated or experimental
@pytest.mark.parametrize("every_way", [False, pytest.param(True, marks=pytest.mark.peers)])
def test_every_function_of_torch_is_affine_a_selection_or_refused(every_way: bool) -> None:
    """LRP's passes share what refuses, and are asked about every ninth case."""
    count, silent = Counter[str](), list[str]()
    for name, function in overridable():
        refused = False
        for pattern, step in cases(function):
            if refused and not every_way:
                break
            count["cases"] += 1
            wrong = bent(step, (1e-5,) if function in SELECTIONS else (1e-3, 0.3, 3.0))
            others = DECOMPOSING[1:] if count["cases"] % 9 == 0 else ()
            for method in ("srd", *others):
                try:
                    arrived = explain(Net(step, both=method in ("srd", "lrp_epsilon")), method).any()
                except SrdLabError as error:
                    count["refused"] += 1
                    refused |= "there is no rule for it" in str(error)
                    continue
                except Exception as error:
                    if "is not implemented" in str(error):  # torch has no derivative, and says so
                        continue
                    silent.append(f"{name}{pattern} by {method}: {type(error).__name__}: {error}")
                    continue
                count["taken"] += 1
                if wrong and arrived:
                    silent.append(f"{name}{pattern} by {method}: a map")
    assert silent == []
    assert count["cases"] > (1500 if every_way else 700)
    assert count["taken"] > 400
    assert count["refused"] > (1000 if every_way else 600)


class Recurrent(nn.Module):
    """A recurrent layer along the rows of a map."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = kind(4, 4, batch_first=True).double()

    def forward(self, t: Tensor) -> Tensor:
        return self.cell(t[:, 0])[0]  # type: ignore[no-any-return]


def sampled(t: Tensor) -> Tensor:
    """A spatial transformer: where to look is read off the map."""
    grid = F.affine_grid(torch.eye(2, 3).double()[None], [1, 4, 4, 4], align_corners=False)
    return F.grid_sample(t, grid + 0.1 * t[:, :2].permute(0, 2, 3, 1), align_corners=False)


NAMED: dict[str, Step] = {
    "LSTM": Recurrent(nn.LSTM),
    "GRU": Recurrent(nn.GRU),
    "RNN": Recurrent(nn.RNN),
    "a spatial transformer": sampled,
    "a kernel made of the map": lambda t: F.conv2d(t, t.transpose(0, 1)[:, :1].expand(4, 4, 4, 4)),
    "weights made of the map": lambda t: F.linear(t, t[0, 0]),
    "a norm with a scale made of the map": lambda t: F.batch_norm(
        t, torch.zeros(4).double(), torch.ones(4).double(), t.mean((0, 2, 3))
    ),
    "linalg.matmul": lambda t: torch.linalg.matmul(t, t),
    "float_power": lambda t: torch.float_power(t, 2),
    "erfc": torch.erfc,
    "arctan": torch.arctan,
    "asinh": torch.asinh,
    "special.expm1": torch.special.expm1,
    "multiply_": lambda t: t.clone().multiply_(t),
    "xlogy": lambda t: torch.xlogy(t, t.abs() + 1),
    "fake_quantize": lambda t: torch.fake_quantize_per_tensor_affine(t, 0.1, 0, -128, 127),
    "round": torch.round,
    "a cast to integers": lambda t: t + t.long() * t,
    "a random factor": lambda t: t + torch.bernoulli(0.5 + 0 * t) * t,
    "gumbel softmax": lambda t: F.gumbel_softmax(t),
    "a comparison by operator": lambda t: t.where(t.gt(0), -t),
}


@pytest.mark.parametrize("method", DECOMPOSING)
@pytest.mark.parametrize("name", NAMED)
def test_what_was_taken_for_affine_once_is_refused(name: str, method: str) -> None:
    with pytest.raises(Refused, match=r"there is no rule for it|draws at random"):
        explain(Net(NAMED[name], both=method in ("srd", "lrp_epsilon")), method)


KEPT: dict[str, Step] = {
    "sampled at fixed places": lambda t: F.grid_sample(
        t,
        F.affine_grid(torch.eye(2, 3).double()[None] / 2, [1, 4, 4, 4], align_corners=False),
        align_corners=False,
    ),
    "einsum": lambda t: torch.einsum("nchw,cd->ndhw", t, const()[0, 0]),
    "written into a buffer": lambda t: torch.zeros_like(t).copy_(t),
    "dropout that drops nothing": lambda t: F.dropout(t, training=False),
    "sorted": lambda t: t.flatten(1).sort(1).values,
    "the largest by index": lambda t: t.flatten(2).gather(2, t.flatten(2).argmax(2, keepdim=True)),
    "another precision": lambda t: t.float(),
}


@pytest.mark.parametrize("method", ["srd", "lrp_epsilon"])
@pytest.mark.parametrize("name", KEPT)
def test_what_is_affine_in_more_than_name_stays(name: str, method: str) -> None:
    assert explain(Net(KEPT[name]), method).any()
