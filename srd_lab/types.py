"""The few types that every module shares: a sample, a data set, what a network needs of an image, an explainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from srd_lab.errors import BadValue, Leak

if TYPE_CHECKING:  # the command line imports this module, and must start quickly
    from torch import Tensor, nn


Colour = tuple[float, float, float]
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """What a network needs of an image: a square of pixels in [0, 1], normalised per channel.

    size : side in pixels.
    mean, std : per channel, in units of pixels in [0, 1]; (0, 0, 0) and (1, 1, 1) for a network that takes pixels.
    crop : the square's share of the picture's shorter side after resizing, in (0, 1]; .875 is 224 of 256.
    interpolation : of resizing, one of ``INTERPOLATIONS``; with antialiasing.

    Raises BadValue for values out of range.
    """

    size: int = 224
    mean: Colour = (0.485, 0.456, 0.406)
    std: Colour = (0.229, 0.224, 0.225)
    crop: float = 0.875
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        numbers = (*self.mean, *self.std)
        if (
            len(self.mean) != 3
            or len(self.std) != 3
            or not all(abs(n) < 1e6 for n in numbers)
            or min(self.std) <= 0
        ):
            raise BadValue(f"mean {self.mean} and std {self.std} must be three numbers each, std above 0")
        if max(map(abs, numbers)) > 10:
            raise BadValue(
                f"mean {self.mean} and std {self.std} are those of pixels in [0, 1]; divide numbers of 0..255 by 255"
            )
        if not 1 <= self.size <= 10_000 or not 0.1 <= self.crop <= 1:
            raise BadValue(f"size {self.size} must be in 1..10000 and crop {self.crop} in [0.1, 1]")
        if self.interpolation not in INTERPOLATIONS:
            raise BadValue(
                f"unknown interpolation {self.interpolation!r}; expected one of {', '.join(INTERPOLATIONS)}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The reverse of ``dataclasses.asdict``, also after JSON. Raises BadValue where ``values`` are something else."""
        try:
            return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
        except (TypeError, KeyError) as error:
            raise BadValue(f"{values!r:.80} is no preprocessing ({error})") from None

    def __str__(self) -> str:
        mean, std = (" ".join(f"{n:.6g}" for n in numbers) for numbers in (self.mean, self.std))
        return f"{self.size} px; crop {self.crop:.4g}; {self.interpolation}; mean {mean}; std {std}"


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    image : (3, H, W) float32 pixels in [0, 1].
    label : class index.
    mask : (H, W) bool, True on the object; None where the data set has none.
    name : what the data set calls it (a file, or ``scenes/test/17``).
    """

    image: Tensor
    label: int
    mask: Tensor | None
    name: str


class Dataset(Protocol):
    """Random access to samples; labels and names are known without decoding an image.

    classes : names of the classes, by index. labels : (len,) int64 class indices.
    """

    classes: list[str]
    labels: Tensor  # (len,) int64

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def name(self, index: int) -> str:
        """The name of sample ``index``, as in ``Sample.name``."""
        ...


def name_of(explainer: Any) -> str:
    """What an explainer is called in messages: by its name, if it was given by one, else by its class."""
    return str(getattr(explainer, "name", type(explainer).__name__))


@runtime_checkable
class Explainer(Protocol):
    """A frozen dataclass whose fields are its hyper-parameters.

    A method may inherit from it, and has to say no more than ``explain_with_logits`` then.
    """

    def explain(self, model: nn.Module, x: Tensor, target: Tensor | int | None = None) -> Tensor:
        """Raw maps (N, h, w) of images x (N, C, H, W); h, w as the method's resolution has it, H, W at the input.

        target : classes (N,), one for all, or None = the predicted ones.

        Differentiable if and only if ``x`` asks for a gradient. The model, its flags, hooks and ``param.grad``, and ``x``,
        are left as they were.

        Raises BadInput for images or targets that do not fit, among them pixels far from [0, 1] where the model normalises
        them itself (:func:`srd_lab.normalise.check_pixel_range`); and Refused where the model cannot be followed or its
        numbers overflow, so that there is no map of some image.
        """
        from srd_lab.normalise import check_pixel_range

        check_pixel_range(model, x)
        return finite_maps(self, model, x, target)

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The maps, and the model's output (N, K) from the same forward pass; arguments as in :meth:`explain`.

        Maps and logits may be infinite or NaN: work on many images leaves single ones out. Pixels may be anything: noise,
        paths and attacks leave [0, 1].
        """
        ...


def finite_maps(
    explainer: Explainer, model: nn.Module, x: Tensor, target: Tensor | int | None = None
) -> Tensor:
    """The maps of :meth:`Explainer.explain`, of images whose pixels may leave [0, 1]: another library adds noise, say.

    explainer : what explains. model, x, target : as in :meth:`Explainer.explain`, whose other errors are raised here.
    """
    from srd_lab.overflow import refuse_overflow

    try:
        raw, logits = explainer.explain_with_logits(model, x, target)
    except Leak:
        refuse_overflow(model, x, None, x.new_zeros(1, 1, 1), squares=True)  # then the reason is known
        raise
    refuse_overflow(model, x, logits, raw, squares=getattr(explainer, "squares", False))
    return raw
