"""Convolutions as values: their transpose by either way, several inputs at once, and what autograd makes of both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from srd_lab.engine import geometry
from srd_lab.engine.geometry import Convolution

DOUBLE = torch.float64
GEOMETRIES = {
    "plain": ((3, 3), (1, 1), (1, 1), (1, 1)),
    "stem": ((7, 7), (2, 2), (3, 3), (1, 1)),
    "a remainder": ((4, 4), (3, 3), (0, 0), (1, 1)),
    "uneven": ((3, 2), (2, 1), (0, 1), (2, 3)),
    "one pixel": ((1, 1), (1, 1), (0, 0), (1, 1)),
}


def made(name: str, channels: int = 3, groups: int = 1) -> Convolution:
    torch.manual_seed(0)
    kernel, stride, padding, dilation = GEOMETRIES[name]
    x = torch.randn(2, channels, 13, 10, dtype=DOUBLE)
    weight = torch.randn(4, channels // groups, *kernel, dtype=DOUBLE)
    return Convolution(x, weight, None, stride, padding, dilation, groups)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_few_channels_go_back_as_many_do(name: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = made(name, channels)
    x = conv.x.requires_grad_()
    signal = torch.randn_like(conv.call())

    def back() -> Tensor:
        return torch.autograd.grad(conv.apply(x, conv.weight), x, signal)[0]

    by_columns = back()
    monkeypatch.setattr(geometry, "_FEW", 0)
    torch.testing.assert_close(by_columns, back(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        by_columns, torch.autograd.grad(conv.call(), x, signal)[0], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", GEOMETRIES)
def test_both_derivatives_are_slopes(name: str) -> None:
    conv = made(name)
    x = conv.x.requires_grad_()
    assert gradcheck(lambda t: conv.apply(t, conv.weight), (x,))
    assert gradgradcheck(lambda t: conv.apply(t, conv.weight), (x,))


@pytest.mark.parametrize("groups", [1, 2])
def test_several_inputs_are_added_up(groups: int) -> None:
    conv = made("stem", 4, groups)
    terms = [(torch.randn_like(conv.x), torch.randn_like(conv.weight)) for _ in range(3)]
    expected = sum(conv.apply(x, weight) for x, weight in terms)
    torch.testing.assert_close(conv.total(terms), expected, rtol=1e-12, atol=1e-12)
