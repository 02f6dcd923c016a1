"""What there is, by name: every method and metric with its source. Data only, so that the command line starts quickly;
:mod:`srd_lab.registry` has the code behind the names."""

from __future__ import annotations

from typing import NamedTuple


class Method(NamedTuple):
    """What is known of an explanation method.

    title : as Table 2 of the SRD paper, or its own paper, writes it.
    resolution : of its maps: input, high (1/8 of the image) or low (the encoder output).
    attackable : whether the map has a derivative in the image that an attack can use.
    passes : its cost in forward passes of one image; a backward pass counts as two. K: channels of the layer.
    tested : what it is held against in the tests; "definition" is the formula, written out slowly.
    """

    title: str
    paper: str
    resolution: str
    attackable: bool
    passes: str
    tested: str


class Metric(NamedTuple):
    """What is known of a metric.

    better : "higher" or "lower".
    scores : what of an explanation it looks at.
    tested : what it is held against in the tests.
    """

    title: str
    paper: str
    better: str
    scores: str
    tested: str


def title_of(method: str) -> str:
    """A method as tables write it; a wrapped one as it was asked for."""
    return METHODS[method].title if method in METHODS else method


def outer_parts(text: str) -> list[str]:
    """The parts of a list, split at the commas outside of all parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


METHODS = {
    "gradient": Method("Saliency", "Simonyan et al. 2014", "input", True, "3", "captum"),
    "guided_backprop": Method("Guided Backprop", "Springenberg et al. 2015", "input", True, "3", "captum"),
    "grad_input": Method("GradInput", "Ancona et al. 2018", "input", True, "3", "captum"),
    "integrated_gradients": Method("InteGrad", "Sundararajan et al. 2017", "input", True, "91", "captum"),
    "lrp_zplus": Method("LRP z+", "Montavon et al. 2017", "input", True, "6", "definition"),
    "smoothgrad": Method("SmoothGrad", "Smilkov et al. 2017", "input", True, "76", "captum"),
    "fullgrad": Method("FullGrad", "Srinivas & Fleuret 2019", "input", True, "3", "definition"),
    "gradcam": Method("Grad-CAM", "Selvaraju et al. 2017", "low", True, "3", "captum, grad-cam"),
    "gradcam_pp": Method("Grad-CAM++", "Chattopadhyay et al. 2018", "low", True, "3", "definition"),
    "scorecam": Method("Score-CAM", "Wang et al. 2020", "low", True, "1 + K", "grad-cam"),
    "ablationcam": Method("Ablation-CAM", "Ramaswamy et al. 2020", "low", True, "1 + K tails", "grad-cam"),
    "xgradcam": Method("XGrad-CAM", "Fu et al. 2020", "low", True, "3", "grad-cam"),
    "layercam_low": Method("LayerCAM, low", "Jiang et al. 2021", "low", True, "3", "grad-cam"),
    "layercam_high": Method("LayerCAM, high", "Jiang et al. 2021", "high", True, "3", "grad-cam"),
    "srd_low": Method("SRD, low", "Han et al. 2024", "low", True, "3", "definition"),
    "srd_high": Method("SRD, high", "Han et al. 2024", "high", True, "4", "definition"),
    "srd": Method("SRD, input", "Han et al. 2024", "input", True, "4", "definition"),
    "deconvnet": Method("Deconvnet", "Zeiler & Fergus 2014", "input", False, "3", "captum"),
    "lrp_epsilon": Method("LRP epsilon", "Bach et al. 2015", "input", True, "3", "definition, zennit"),
    "lrp_gamma": Method("LRP gamma", "Montavon et al. 2019", "input", True, "6", "definition"),
    "excitation_backprop": Method("Excitation BP", "Zhang et al. 2016", "high", True, "6", "definition"),
    "contrastive_excitation": Method("c-Excitation BP", "Zhang et al. 2016", "high", True, "6", "definition"),
    "random": Method("Random", "control", "input", False, "1", "its moments"),
    "sobel": Method("Sobel edges", "control", "input", True, "1", "scikit-image"),
}
ATTACKABLE = tuple(name for name, method in METHODS.items() if method.attackable)
# the rows of Table 2, in its order, and the methods of Fig. 4
TABLE_2 = tuple(METHODS)[:17]
TABLE_4 = (
    *("guided_backprop", "grad_input", "integrated_gradients", "lrp_zplus", "smoothgrad", "fullgrad"),
    *("gradcam", "scorecam", "ablationcam", "xgradcam", "layercam_low", "srd"),
)
FIGURE_4 = ("srd", "gradient", "grad_input", "guided_backprop", "integrated_gradients", "lrp_zplus")

METRICS = {
    "pointing_game": Metric(
        "Pointing game", "Zhang et al. 2018", "higher", "localisation", "definition, quantus"
    ),
    "attribution_localization": Metric(
        "Attribution localization", "Kohlbrenner et al. 2020", "higher", "localisation", "definition, quantus"
    ),
    "sparseness": Metric(
        "Sparseness", "Chalasani et al. 2020", "higher", "complexity", "definition, quantus"
    ),
    "fidelity": Metric("Fidelity", "Bhatt et al. 2020", "higher", "faithfulness", "definition, quantus"),
    "stability": Metric(
        "Stability", "Alvarez Melis & Jaakkola 2018", "lower", "robustness", "definition, quantus"
    ),
    "ssim": Metric("SSIM under noise", "Wang et al. 2004", "higher", "robustness", "scikit-image"),
    "pcc": Metric("PCC under noise", "Pearson", "higher", "robustness", "scipy"),
    "insertion": Metric("Insertion", "Petsiuk et al. 2018", "higher", "faithfulness", "definition"),
    "deletion": Metric("Deletion", "Petsiuk et al. 2018", "lower", "faithfulness", "definition"),
    "morf": Metric("MoRF", "Samek et al. 2017", "higher", "faithfulness", "definition"),
    "lerf": Metric("LeRF", "Samek et al. 2017", "lower", "faithfulness", "definition"),
    "infidelity": Metric("Infidelity", "Yeh et al. 2019", "lower", "faithfulness", "captum"),
    "max_sensitivity": Metric("Max-sensitivity", "Yeh et al. 2019", "lower", "robustness", "captum"),
    "randomization": Metric("Randomization", "Adebayo et al. 2018", "lower", "sanity", "definition"),
    "roughness": Metric("Roughness", "Geary 1954", "lower", "complexity", "definition"),
}
TABLE_2_METRICS = tuple(METRICS)[:5]

BASELINES = ("black", "white", "mean", "minimum")  # what fidelity sets pixels to
