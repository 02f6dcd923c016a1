"""What the words of a report mean: those that occur in it, each in a sentence.

Example
-------
>>> [term for term, _ in explained("srd  0.398  SSIM 0.4")]
['SSIM', 'SRD']
"""

from __future__ import annotations

import re

# what a word looks like in a report, the word, and what it means
_TERMS: tuple[tuple[str, str, str], ...] = (
    ("pcc", "PCC",
     "Pearson's correlation of two maps, pixel by pixel: 1 = the same but for a factor, 0 = unrelated, below 0 "
     "= one is strong where the other is weak."),
    ("ssim", "SSIM",
     "Structural similarity of two maps: brightness, contrast and pattern of small windows compared; 1 = the "
     "same, 0 = unrelated, below 0 = the pattern is turned round."),
    ("top-10 %|top_k", "top-10 %",
     "The share of the strongest tenth of the pixels that is among the strongest tenth afterwards."),
    ("local|local_top_k", "local",
     "The same, where a strongest pixel one place further counts, too."),
    ("rer", "RER",
     "The share of images whose map survives: its score stays above what JPEG compression or a shift by one "
     "pixel leave of a map."),
    (r"noise|noise_\w+", "noise",
     "Random noise of the same size in place of the attack: what a map loses without an aim."),
    (r"eq10|Eq\. 10", "eq10",
     "The published attack of Dombrowski et al. (2019), equation 10 of the SRD paper: it steers the map "
     "towards that of another image."),
    ("quick ensemble", "quick ensemble",
     "Several attacks of 40 steps each; for every image the one that moved its map most counts. The full "
     "ensemble has more attacks, 100 steps and restarts."),
    ("full ensemble", "full ensemble",
     "All attacks, 100 steps each, with restarts and 5,000 queries without gradients; for every image the one "
     "that moved its map most counts."),
    (r"srd\w*|SRD", "SRD",
     "Sharing Ratio Decomposition (ICLR 2024): relevance goes back through the network by each activation's "
     "share of the sum that it is part of."),
    ("srd_(?:ones|contrastive|gradcam)|starts?", "start",
     "What SRD begins with at the end of the encoder: ones = every place alike, for no class; contrastive = "
     "the places that speak for the class more than for the others; gradcam = Grad-CAM's."),
    (r"lrp_\w+|LRP", "LRP",
     "Layer-wise relevance propagation: the logit is handed back from layer to layer, in proportion to what "
     "each input added."),
    ("gradcam|Grad-CAM", "Grad-CAM",
     "The channels of the encoder's last layer, weighted by their mean gradient: a coarse map."),
    ("sobel", "sobel",
     "Plain edges of the image, a control: the map never looks at the network."),
    ("random", "random",
     "Random numbers as a map, a control."),
    ("scenes", "scenes",
     "The data set that comes with srd-lab: one of ten shapes on a cluttered background, 64 x 64 pixels, drawn "
     "by a program, with the shape's outline known."),
    ("Pointing game|pointing_game", "pointing game",
     "1 if the largest value of the map lies on the object."),
    ("Attribution localization|attribution_localization", "attribution localization",
     "The share of the map's positive part that lies on the object."),
    ("insertion", "insertion",
     "Pixels are put into a blurred image in the order of the map, strongest first: the mean probability of "
     "the class on the way. High = the map marks what the network needs."),
    ("deletion", "deletion",
     "Pixels are replaced by the mean colour, strongest first: the mean probability of the class on the way. "
     "Low = the map marks what the network needs."),
    ("fidelity", "fidelity",
     "Random sets of pixels are removed: how well the sum of the map over a set predicts what the logit loses, "
     "as a correlation."),
    ("sparseness", "sparseness",
     "Gini index of the map: 0 = all pixels alike, near 1 = a few pixels hold everything. No merit by itself."),
    ("stability", "stability",
     "How much the map changes at most for small random noise, per size of the noise. Low = steady."),
    ("max sensitivity|max_sensitivity", "max sensitivity",
     "The same as a share of the map's size."),
    ("infidelity", "infidelity",
     "How far the map is from predicting what the logit does under noise. Low = close."),
    ("randomization", "randomization",
     "SSIM of the map to that of the same network with random weights. 1 = the map does not depend on what the "
     "network has learnt."),
    ("roughness", "roughness",
     "Steps between neighbouring pixels, as a share of the map's variance."),
    ("apop", "APOP",
     "What the network answers when all it keeps of an image is which of its activations were on."),
    (r"\[-?\d[\d.]*, -?\d[\d.]*\]", "[low, high]",
     "The 95 % interval of the mean over the images: of other images of the same kind the mean would mostly "
     "lie in it."),
    (r"holm\w*", "Holm's correction",
     "p-values are raised by the number of tests, so that many tests do not find something by chance alone."),
    ("flags?", "flags",
     "Signs that a figure is not to be trusted, such as an attack that stalled; how many, and below the table "
     "which."),
)  # fmt: skip


def explained(text: str) -> list[tuple[str, str]]:
    """The words that occur in a text, in the order of the table above, and what each means."""
    return [
        (word, said)
        for pattern, word, said in _TERMS
        if re.search(rf"(?<![\w.])(?:{pattern})(?!\w)", text, re.IGNORECASE)
    ]
