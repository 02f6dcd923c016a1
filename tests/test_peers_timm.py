"""Classifiers of timm with random weights: every map is right, as far as a sum and a second way to it can tell, or the
network is refused by name. The table says which, so that a change shows."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
from script_files import script_module
from torch import Tensor, nn

from srd_lab.errors import SrdLabError
from srd_lab.methods.srd import SRD
from srd_lab.registry import make_explainer
from srd_lab.types import Explainer

pytest.importorskip("timm", reason="needs timm: pip install -e '.[dev]'")
timm_table = script_module("timm_table")
pytestmark = pytest.mark.peers

# what refusals say, by method; that of "srd" is expected of the other methods that decompose too, unless they are named
NOT_RELU = {
    "lrp_zplus": r"needs activations that are >= 0 \(ReLU, softplus\), but '.*' is (gelu|silu|hardswish)"
}
WINDOWS = {"fullgrad": "rows and columns of the output of a layer with a bias|expected the batch first"}
TOKENS = {"gradcam": r"level 'low' holds tokens of which it is not known where in the image they lie"}
PADDED = (
    r"torch\.max_pool2d in stem\.pool chooses between a map and a constant"  # its map has negative entries
)
SHARED = ("lrp_epsilon", "srd_high", "lrp_zplus")
METHODS: dict[str, Explainer] = {
    "srd": SRD(start="ones"),
    "srd_high": SRD(start="ones", level="high"),
    **{
        name: make_explainer(name)
        for name in ("lrp_epsilon", "lrp_zplus", "guided_backprop", "fullgrad", "gradcam")
    },
}


def no_rule(what: str) -> dict[str, str]:
    """SRD and LRP refuse this function."""
    return {"srd": rf"{what} in .* is neither affine nor an activation, and there is no rule for it"}


class Case(NamedTuple):
    """What becomes of a network.

    refused : by method, what its refusal says; there is a map by all others, and where that is "".
    leaks : causes by which relevance may not arrive, besides rounding.
    """

    refused: dict[str, str] = {}  # noqa: RUF012
    leaks: tuple[str, ...] = ()


DEAD, CONSTANTS = ("dead fields",), ("constants",)
CASES: dict[str, Case] = {
    "resnet18": Case(),
    "resnet26d": Case(),
    "resnext26ts": Case(NOT_RELU),
    "seresnet18": Case(),
    "ecaresnet26t": Case(),
    "skresnet18": Case(),
    "resnest14d": Case(),
    "res2net50_26w_4s": Case(),
    "gcresnext26ts": Case(NOT_RELU),
    "botnet26t_256": Case(),
    "lambda_resnet26t": Case(
        no_rule("torch.Tensor.matmul")
        | {"fullgrad": r"conv3d in .* adds a bias that FullGrad has no place for"},
    ),
    "regnetx_002": Case(),
    "regnety_002": Case(),
    "nf_regnet_b0": Case(NOT_RELU),
    "nfnet_l0": Case(NOT_RELU),
    "densenet121": Case(),
    "dla46_c": Case(),
    "dpn48b": Case(NOT_RELU),
    "ese_vovnet19b_slim": Case(),
    "hrnet_w18_small": Case(),
    "hgnetv2_b0": Case({"srd": PADDED, "guided_backprop": PADDED, "srd_high": ""}),
    "inception_v3": Case(),
    "repvgg_a0": Case(),
    "efficientnet_b0": Case(NOT_RELU),
    "efficientnet_lite0": Case(),
    "mobilenetv2_050": Case(),
    "mobilenetv3_small_050": Case(NOT_RELU),
    "mobilenetv4_conv_small_050": Case(),
    "mixnet_s": Case(NOT_RELU),
    "ghostnet_050": Case(leaks=DEAD),
    "rexnet_100": Case(NOT_RELU),
    "lcnet_050": Case(NOT_RELU),
    "convnext_atto": Case(NOT_RELU),
    "convnextv2_atto": Case(no_rule("torch.Tensor.mul") | NOT_RELU),
    "starnet_s1": Case(no_rule("torch.Tensor.mul")),
    "mobilevit_xxs": Case(NOT_RELU | WINDOWS),
    "efficientvit_b0": Case(no_rule("torch.Tensor.div") | NOT_RELU | WINDOWS),
    "poolformer_s12": Case(NOT_RELU),
    "mixer_s32_224": Case(NOT_RELU),
    "resmlp_12_224": Case(NOT_RELU, CONSTANTS),
    "gmlp_ti16_224": Case(no_rule("torch.Tensor.mul") | NOT_RELU),
    "vit_tiny_patch16_224": Case(NOT_RELU, CONSTANTS),
    "deit_tiny_distilled_patch16_224": Case(NOT_RELU, CONSTANTS),
    "cait_xxs24_224": Case(NOT_RELU | WINDOWS, CONSTANTS),
    "xcit_nano_12_p16_224": Case(NOT_RELU, CONSTANTS),
    "levit_128s": Case(NOT_RELU),
    "coat_tiny": Case(
        NOT_RELU
        | {"srd": "several maps are pooled, each by itself", "gradcam": "several maps are pooled"}
        | {"lrp_epsilon": r"torch\.nn\.functional\.conv1d in aggregate is neither affine"},
    ),
    "tnt_s_legacy_patch16_224": Case(NOT_RELU | TOKENS | WINDOWS, CONSTANTS),
    "tnt_s_patch16_224": Case(
        NOT_RELU
        | TOKENS
        | {"srd_high": "no map with spatial extent is passed by all of the relevance"}
        | WINDOWS,
        CONSTANTS,
    ),
    "swin_tiny_patch4_window7_224": Case(NOT_RELU | WINDOWS, DEAD),
    "hiera_tiny_224": Case(NOT_RELU),
    "sequencer2d_s": Case(no_rule("torch.lstm") | NOT_RELU | WINDOWS),
}


def outcome(method: str, model: nn.Module, x: Tensor) -> tuple[Tensor | None, str]:
    """The map, or why there is none; any other error is the network's undoing."""
    try:
        return METHODS[method].explain(model, x, 1), ""
    except SrdLabError as error:
        return None, str(error)


@pytest.mark.filterwarnings("ignore")  # timm's own; and that no map has 1/8 of the image's size
@pytest.mark.parametrize("name", CASES)
def test_maps_are_right_or_refused_by_name(name: str) -> None:
    case = CASES[name]
    model, x = timm_table.random_network(name), timm_table.images_for(name)
    for method in METHODS:
        expected = case.refused.get(method, case.refused.get("srd") if method in SHARED else None)
        model.requires_grad_(True)
        found, refusal = outcome(method, model, x)
        if expected:
            assert re.search(expected, refusal), f"{method}: {refusal or 'a map'}"
            continue
        assert found is not None, f"{method}: {refusal}"
        assert found.isfinite().all(), method
        assert len(found) == 2
        assert method == "gradcam" or found.flatten(1).any(1).all(), method  # the positive part may be none
        model.requires_grad_(False)  # and alone
        again, refusal = outcome(method, model, x[1:])
        assert again is not None, f"{method}, frozen: {refusal}"
        assert (again[0] - found[1]).abs().max() <= 1e-6 * found[1].abs().max(), method
    if "srd" not in case.refused:
        lost = METHODS["srd"].leaks(model, x[:1])  # type: ignore[attr-defined]
        assert lost["other"].abs().max() < 1e-9
        assert tuple(cause for cause, share in lost.items() if share.abs().max() > 1e-9) == case.leaks
