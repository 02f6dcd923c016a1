"""Transformers of timm, torchvision and transformers: Grad-CAM is that of the module that is known to be the right one, with
as many tokens in front of the patches as stand there; AttnLRP and gradient-weighted rollout have maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from srd_lab.errors import Refused
from srd_lab.methods.cam import GradCAM
from srd_lab.methods.lrp import AttnLRP
from srd_lab.methods.rollout import GradientRollout

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
HF = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 8,
    "num_labels": 5,
}


class Logits(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x).logits
        return logits


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library: Any = pytest.importorskip("timm")
        made: nn.Module = library.create_model(name, num_classes=5, depth=3, **options)
        return made

    return make


def hf(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library: Any = pytest.importorskip("transformers")
        config = getattr(library, f"{name}Config")(**HF, **options)
        return Logits(getattr(library, f"{name}ForImageClassification")(config))

    return make


def torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 16, 3, 3, 48, 96, num_classes=5)


class Case(NamedTuple):
    """layer : the module whose output the maps are of. prefix : tokens in front of the patches there. side : of images."""

    make: Callable[[], nn.Module]
    layer: str
    prefix: int
    side: int = 64


CASES = {
    "torchvision": Case(torchvision, "encoder.layers.encoder_layer_2.ln_1", 1),
    "vit": Case(timm("vit_tiny_patch16_224", img_size=64), "blocks.2.norm1", 1),
    "vit, mean": Case(timm("vit_tiny_patch16_224", img_size=64, global_pool="avg"), "norm", 1),
    "deit": Case(timm("deit_tiny_distilled_patch16_224", img_size=64), "blocks.2.norm1", 2),
    "deit 3": Case(timm("deit3_small_patch16_224", img_size=64), "blocks.2.norm1", 1),
    "beit": Case(timm("beit_base_patch16_224", img_size=64, embed_dim=96, num_heads=3), "blocks.2", 1),
    "dinov2": Case(timm("vit_small_patch14_reg4_dinov2", img_size=56), "blocks.2.norm1", 5, 56),
    "dinov3": Case(timm("vit_small_patch16_dinov3", img_size=64), "norm", 5),
    "hf vit": Case(hf("ViT"), "network.vit.layers.2.layernorm_before", 1),
    "hf vit, eager": Case(hf("ViT", attn_implementation="eager"), "network.vit.layers.2.layernorm_before", 1),
    "hf deit": Case(hf("DeiT"), "network.deit.layers.2.layernorm_before", 2),
    "hf dinov2": Case(hf("Dinov2WithRegisters"), "network.dinov2_with_registers.layernorm", 5),
}


def drawn(network: nn.Module) -> nn.Module:
    """Random weights in which nothing is neutral."""
    torch.manual_seed(0)
    for p in network.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    return network.double().eval().requires_grad_(False)


@pytest.mark.parametrize("name", CASES)
def test_maps_are_made_at_the_layer_that_is_known(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    network, outputs = drawn(case.make()), list[Tensor]()
    x = torch.rand(2, 3, case.side, case.side, generator=torch.Generator().manual_seed(1)).double()
    got = GradCAM().explain(network, x, 1)
    rollout, lrp = (method.explain(network, x, 1) for method in (GradientRollout(), AttnLRP()))
    assert rollout.shape == got.shape
    assert lrp.isfinite().all()
    hook = dict(network.named_modules())[case.layer].register_forward_hook(
        lambda m, i, out: outputs.append(out)
    )
    logits = network(x.clone().requires_grad_())
    hook.remove()
    (slope,) = torch.autograd.grad(logits[:, 1].sum(), outputs[-1])
    side = got.shape[-1]
    a, g = (t[:, t.shape[1] - side * side :] for t in (outputs[-1].detach(), slope))
    assert outputs[-1].shape[1] - side * side == case.prefix
    expected = (g.mean(1, keepdim=True) * a).sum(2).relu().unflatten(1, (side, side))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12 * float(a.abs().max()))


def test_attention_pooling_needs_a_name() -> None:
    network = drawn(timm("vit_base_patch16_siglip_224", img_size=64, embed_dim=96, num_heads=3)())
    x = torch.rand(2, 3, 64, 64).double()
    with pytest.raises(Refused, match=r"level 'low' are not known to be those of the image"):
        GradCAM().explain(network, x, 1)
    assert GradCAM(encoder="norm").explain(network, x, 1).shape == (2, 4, 4)
    with pytest.raises(Refused, match=r"attention in attn_pool has weights of shape \(2, 3, 1, 16\)"):
        GradientRollout().explain(network, x, 1)
