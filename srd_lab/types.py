"""The few types that every module shares: a sample, a data set, an explainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from srd_lab.errors import Leak

if TYPE_CHECKING:  # the command line imports this module, and must start quickly
    from torch import Tensor, nn


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

        Raises BadInput for images or targets that do not fit, and Refused where the model cannot be followed or its numbers
        overflow, so that there is no map of some image.
        """
        from srd_lab.overflow import refuse_overflow

        try:
            raw, logits = self.explain_with_logits(model, x, target)
        except Leak:
            refuse_overflow(model, x, None, x.new_zeros(1, 1, 1), squares=True)  # then the reason is known
            raise
        refuse_overflow(model, x, logits, raw, squares=getattr(self, "squares", False))
        return raw

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The maps, and the model's output (N, K) from the same forward pass; arguments as in :meth:`explain`.

        Maps and logits may be infinite or NaN: work on many images leaves single ones out.
        """
        ...
