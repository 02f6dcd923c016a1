"""The few shapes that every module shares: one error class, one protocol, one sample."""

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
    """Random access to samples; ``labels`` and names are known without decoding an image."""

    classes: list[str]
    labels: Tensor  # (len,) int64

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def name(self, index: int) -> str:
        """The name of that sample."""
        ...


@runtime_checkable
class Explainer(Protocol):
    """A frozen dataclass whose fields are its hyper-parameters.

    A method may inherit from it, and has to say no more than ``explain_with_logits`` then.
    """

    def explain(self, model: nn.Module, x: Tensor, target: Tensor | int | None = None) -> Tensor:
        """Map of ``x`` (N, C, H, W) for classes ``target`` (N,), raw, as (N, H, W).

        ``target=None`` is the predicted class. Differentiable if and only if ``x`` asks for a gradient.
        The model, its flags, hooks and ``param.grad``, and ``x``, are left as they were.

        Raises SrdLabError where numbers overflow, so that there is no map of some image.
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
        """The map, and the model's output (N, K) from the same forward pass; finite or not, for work on many images that
        leaves single ones out."""
        ...
