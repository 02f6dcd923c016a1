"""Settings of the studies of attacks; see :mod:`srd_lab.runs.settings` for what is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from srd_lab.runs.settings import Settings

DEFAULT_SIZES = {"l2": 2.0, "linf": 8.0}  # of a budget, in units of 0..255; of legacy it is a factor of 1


@dataclass(frozen=True, kw_only=True)
class PairSettings(Settings):
    """What every study of attacked images is told.

    methods : names, wrapped or not; ``all`` = those of Fig. 4.
    model : the network's name.
    pairs : images to attack; each has another one, whose map is a goal.
    starts : where SRD starts: ``ones``, ``contrastive``, ``gradcam``; each is attacked by itself.
    attacks : names of the attacks.
    """

    methods: tuple[str, ...] = ("srd",)
    model: str = "vgg16"
    pairs: int = 100
    starts: tuple[str, ...] = ("ones",)
    attacks: tuple[str, ...] = ("eq10",)


@dataclass(frozen=True, kw_only=True)
class ManipulationSettings(PairSettings):
    """The published attack (Eq. 10).

    steps : Adam steps at most.
    lr : their size, in normalised units.
    output_term : what shall stay: ``probabilities``, or ``logits`` as Eq. 10 prints it.
    bound : largest change of a pixel, in units of 0..255.
    stop_mse : mean squared change, in normalised units, that ends an image.
    beta_start, beta_end : softplus beta of the surrogate at the first step, and after the last.
    """

    steps: int = 100
    lr: float = 1e-3
    output_term: Literal["probabilities", "logits"] = "probabilities"
    bound: float = 8.0
    stop_mse: float = 1e-3
    beta_start: float = 10.0
    beta_end: float = 100.0


@dataclass(frozen=True, kw_only=True)
class RobustnessSettings(ManipulationSettings):
    """The standard evaluation, or some of its attacks.

    mode : ``quick`` or ``full``.
    norm : ``legacy``, ``l2`` or ``linf``.
    budget : its size, in units of 0..255 (legacy: a factor); None = the norm's default.
    seeds : repeats with other random starts.
    curve : whether a quarter, half and twice the budget are tried as well.
    certify : draws of the certificate of the smoothed maps; 0 = none.
    sigma : standard deviation of these draws, pixels in [0, 1].
    gates, entries : whether gates are checked, and entries written.
    """

    methods: tuple[str, ...] = ("srd", "lrp_zplus", "guided_backprop", "gradcam", "sobel")
    starts: tuple[str, ...] = ("contrastive", "ones")
    attacks: tuple[str, ...] = ("standard", "eq10")
    mode: Literal["quick", "full"] = "quick"
    norm: Literal["legacy", "l2", "linf"] = "legacy"
    budget: float | None = None
    seeds: int = 1
    curve: bool = True
    certify: int = 0
    sigma: float = 0.1
    gates: bool = True
    entries: bool = True

    @property
    def effective_budget(self) -> float:
        """The size of the budget, whether it was given or is the norm's default."""
        return self.budget or DEFAULT_SIZES.get(self.norm, 1.0)


@dataclass(frozen=True, kw_only=True)
class ModelManipulationSettings(Settings):
    """A network fine-tuned until a method's maps say what the attacker wants (Heo et al. 2019).

    methods : attacked, each on a copy of its own; ``all`` = those of Fig. 4.
    others : read on the manipulated networks as well.
    model : the network's name.
    manipulate_model : ``location``, ``top-k``, ``centre-of-mass`` or ``active``; None = not this study.
    frame : location: width of the frame in pixels; None = an eighth of the image.
    top_share : top-k: share of the pixels that the maps shall leave, in (0, 1).
    swap : active: the two classes.
    map_weight : weight of the maps against the accuracy.
    keep : what shall hold meanwhile: ``labels`` or ``outputs``.
    train_images, train_batch, train_steps, train_lr : images to train on, at once; Adam steps and their size.
    pairs : images held out.
    """

    methods: tuple[str, ...] = ("srd",)
    others: tuple[str, ...] = ()
    model: str = "vgg16"
    manipulate_model: str | None = None
    frame: int | None = None
    top_share: float = 0.1
    swap: tuple[int, ...] = (0, 1)
    map_weight: float = 3.0
    keep: Literal["labels", "outputs"] = "labels"
    train_images: int = 800
    train_batch: int = 16
    train_steps: int = 150
    train_lr: float = 1e-3
    pairs: int = 100
