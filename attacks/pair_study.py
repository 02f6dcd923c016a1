"""What the studies of attacked images share: the methods, the network, the pairs of images and how many go at once."""

from __future__ import annotations

from collections.abc import Sequence

from attacks.experiment import attack_explainer
from attacks.settings import PairSettings
from srd_lab.data import skipped_report
from srd_lab.data.draw import draw_pairs
from srd_lab.errors import Refused
from srd_lab.methods.smoothed import plain_name
from srd_lab.parts import spoken
from srd_lab.registry import refusals
from srd_lab.runs.inputs import data_and_network, labelled, weights_sums
from srd_lab.runs.label import drawn_from
from srd_lab.runtime import Batcher, pick_device

PIXELS_AT_ONCE = 48 * 64 * 64  # on a CPU; an accelerator takes 16 times as many


class PairStudy:
    """Opens the data, the network and the pairs that the settings name, before a run exists.

    methods : names, wrapped or not; those of SRD are attacked once for each of ``settings.starts``.

    A method that refuses the network is left out (``refused``, name -> why).

    Raises BadValue for methods that are not known and for more pairs than the data gives, and Refused where no method is
    left; else the errors are those of
    :func:`srd_lab.runs.inputs.data_for` and :func:`srd_lab.runs.inputs.network_for`.
    """

    def __init__(self, settings: PairSettings, methods: Sequence[str]) -> None:
        self.settings: PairSettings = settings
        self.variants = variants(methods, settings.starts)
        explainers = {name: attack_explainer(*variant) for name, variant in self.variants.items()}
        self.device = pick_device(settings.device)
        name = settings.model
        self.dataset, self.model = data_and_network(settings, name, [name], self.device)
        self.dataset = labelled(self.dataset, self.model, self.device)
        self.weights_sha256 = weights_sums(settings, [name], {name: self.model})
        self.pairs, self.skipped = draw_pairs(
            *(self.dataset, self.model, settings.pairs, settings.seed, self.device, settings.workers)
        )
        self.drawn = drawn_from(settings, self.dataset, [pair.original for pair in self.pairs])
        image = self.dataset[self.pairs[0].original].image
        side = image.shape[-1]
        self.refused = refusals(self.model, image[None].to(self.device), explainers)
        self.variants = {n: variant for n, variant in self.variants.items() if n not in self.refused}
        if not self.variants:
            raise Refused(f"no method goes with {name}: {next(iter(self.refused.values()))}")
        self.batcher = Batcher(settings.batch_size or pairs_at_once(side, self.device.type))
        self.where = f"{spoken(name)} on {settings.shown_source}"

    def left_out(self) -> list[str]:
        """A line for each method that refuses the network, and one on files that could not be read."""
        lines = [f"{name} does not go with this network: {why}" for name, why in self.refused.items()]
        return [*lines, *([skipped_report(self.skipped)] if self.skipped else [])]


def variants(methods: Sequence[str], starts: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What is attacked, name -> (method, SRD's start); SRD, wrapped or not, once for each start.

    Example
    -------
    >>> variants(["srd", "gradcam"], ["ones", "contrastive"])
    {'srd_ones': ('srd', 'ones'), 'srd_contrastive': ('srd', 'contrastive'), 'gradcam': ('gradcam', 'ones')}
    """
    found = {}
    for method in dict.fromkeys(methods):
        has_starts = plain_name(method) == "srd" and len(starts) > 1
        for start in dict.fromkeys(starts) if has_starts else starts[:1]:
            found[f"{method}_{start}" if has_starts else method] = (method, start)
    return found


def pairs_at_once(side: int, device: str) -> int:
    """Pairs in a batch, of images with this side in pixels, on a device of this type.

    Example
    -------
    >>> pairs_at_once(64, "cpu"), pairs_at_once(224, "cpu"), pairs_at_once(224, "cuda")
    (48, 3, 62)
    """
    return max(1, PIXELS_AT_ONCE * (1 if device == "cpu" else 16) // side**2)
