"""Channels last, in which forward passes run on the CPU, changes nothing, and is left alone where it cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from srd_lab.methods import cam_by_passes
from srd_lab.metrics import explained
from srd_lab.metrics.explained import Images
from srd_lab.registry import make_explainer


class Viewed(nn.Module):
    """Flattens as older code does: a map with its channels last cannot be viewed so."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU()
        )
        self.head, self.view = nn.Linear(8 * 25, 4), view

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x.view(len(x), -1) if self.view else x.flatten(1))


def test_score_cam_is_the_same_in_every_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, layouts, choose = [], [], cam_by_passes.fast_layout

    def noted(network: nn.Module, image: Tensor) -> torch.memory_format:
        layouts.append(choose(network, image))
        return layouts[-1]

    monkeypatch.setattr(cam_by_passes, "fast_layout", noted)
    for view in (True, False):
        model = Viewed(view).double().eval()
        found.append(make_explainer("scorecam").explain(model, x, 2))
    with torch.enable_grad():
        found.append(make_explainer("scorecam").explain(model, x.clone().requires_grad_(), 2).detach())
    one, last = torch.contiguous_format, torch.channels_last
    assert layouts == [one, one, last, last, one, one]
    assert found[0].max() > 0
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)


def test_passes_of_metrics_are_the_same_in_every_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen: list[bool] = []

    def see(network: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    def logits(view: bool) -> Tensor:
        model = Viewed(view).double().eval()
        images = Images(model, x, torch.tensor([0, 1]), range(2))
        images.logits(0, lambda _: images.given[:1], 1)  # the choice is made
        model.register_forward_pre_hook(see)
        return torch.cat([images.logits(i, lambda _, i=i: x[[i, i, i]], 3) for i in range(2)])

    last, first = logits(view=False), logits(view=True)
    assert seen == [True, True, False, False]
    torch.testing.assert_close(last, first, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(explained, "fast_layout", lambda *_: torch.contiguous_format)
    torch.testing.assert_close(logits(view=False), last, rtol=1e-12, atol=1e-12)
    assert seen[4:] == [False, False]
