"""What metrics score: images, the network, and the maps that a method made of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from srd_lab import maps
from srd_lab.errors import BadValue
from srd_lab.logits import class_logits, probabilities
from srd_lab.normalise import normalisation_scale, split_normalisation
from srd_lab.runtime import fast_layout, generator
from srd_lab.types import Explainer

_PIXELS_AT_ONCE = 32 * 224 * 224


class Metric(Protocol):
    """A frozen dataclass whose fields are its parameters."""

    def of(self, explained: Explained) -> Tensor:
        """Scores (N,) float64, each of its image alone; NaN where an image or its map cannot be scored.

        explained : a batch of images with their maps.
        """
        ...


@dataclass(frozen=True)
class Images:
    """A batch to explain; remembers what does not depend on the method, so that it is computed once for all.

    model : the network, on the device of ``x``.
    x : (N, C, H, W) pixels in [0, 1]; target : (N,) explained classes; masks : (N, H, W) bool, or None.
    keys : what seeds the random numbers of every image, whatever batch it is in: its place in the data set, say.
    of_model : remembers what depends on the network alone; give one dict to all batches.
    """

    model: nn.Module
    x: Tensor
    target: Tensor
    keys: Sequence[int | str]
    masks: Tensor | None = None
    of_model: dict[Hashable, Any] = field(default_factory=dict)
    _known: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """``compute()``, remembered under ``key``."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.x.shape[2], self.x.shape[3]

    @property
    def scale(self) -> Tensor:
        """What one unit of pixel value is in normalised units, (1, C, 1, 1)."""
        return self.once("scale", lambda: normalisation_scale(self.model, self.x))

    @property
    def given(self) -> Tensor:
        """The images as the network proper is fed with them: normalised, (N, C, H, W)."""
        return self.once("given", lambda: self.normalised(self.x))

    def normalised(self, x: Tensor) -> Tensor:
        """Pixels x (M, C, H, W) as the network proper is fed with them, of the same shape."""
        with torch.no_grad():
            return split_normalisation(self.model)[0](x.clone())

    def generator(self, i: int, seed: int, *names: int | str) -> torch.Generator:
        """A CPU generator for image ``i``, which depends on its key, ``seed`` and ``names`` alone."""
        return generator(seed, *names, self.keys[i])

    def logits(
        self,
        i: int,
        variants: Callable[[range], Tensor],
        count: int,
        read: Callable[[Any], Tensor] = class_logits,
    ) -> Tensor:
        """Logits (count, K) float64 of ``count`` variants of image ``i``, made and run some at a time.

        variants : range of k -> normalised variants (k, C, H, W); copies, as the network may change them in place.
        read : makes (k, K) of the network's output; the logits by default.
        """
        network = split_normalisation(self.model)[1]
        at_once = max(1, _PIXELS_AT_ONCE // (self.size[0] * self.size[1]))
        parts = (range(first, min(count, first + at_once)) for first in range(0, count, at_once))
        with torch.no_grad():
            layout = self._layout(network)
            return torch.cat(
                [read(network(variants(some).contiguous(memory_format=layout))).double() for some in parts]
            )

    def _layout(self, network: nn.Module) -> torch.memory_format:
        key = ("layout", self.size)
        if key not in self.of_model:
            self.of_model[key] = fast_layout(network, self.given)
        return self.of_model[key]

    def drops(self, i: int, variants: Callable[[range], Tensor], count: int) -> Tensor:
        """How far the logit of the explained class falls from image ``i`` to each variant, (count,) float64.

        variants, count : see :meth:`logits`.
        """

        def itself_first(some: range) -> Tensor:
            changed = variants(range(max(0, some.start - 1), some.stop - 1))
            return changed if some.start else torch.cat([self.given[i : i + 1], changed])

        scores = self._of_class(i, self.logits(i, itself_first, count + 1))
        return scores[0] - scores[1:]

    def probabilities(self, i: int, variants: Callable[[range], Tensor], count: int) -> Tensor:
        """Probability (count,) float64 of the explained class in each variant of image ``i``; see :meth:`logits`."""
        return self._of_class(i, self.logits(i, variants, count, partial(probabilities, dtype=torch.float64)))

    def _of_class(self, i: int, numbers: Tensor) -> Tensor:
        """The column (M,) of the class of image ``i`` in ``numbers`` (M, K), without a look at which one it is."""
        return numbers.index_select(1, self.target[i : i + 1])[:, 0]


@dataclass(frozen=True)
class Explained:
    """Images with the maps of one method, as they are scored: see :func:`srd_lab.maps.prepared`.

    images : what was explained. explainer : by which method.
    maps : (N, H, W) in [-1, 1] at the size of the images; NaN all over where a raw map was not finite.
    """

    images: Images
    explainer: Explainer
    maps: Tensor
    _known: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def by(cls, explainer: Explainer, images: Images) -> Explained:
        """The images explained by ``explainer``; its errors are passed on."""
        raw, _ = explainer.explain_with_logits(images.model, images.x, images.target)
        return cls(images, explainer, maps.prepared(raw, images.size))

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """``compute()``, remembered under ``key``: what several metrics need of this method."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def again(self, x: Tensor, model: nn.Module | None = None) -> Tensor:
        """Prepared maps (N, H, W) of changed images x (N, C, H, W), or of a changed network, for the same classes.

        model : None = the network of the images.
        """
        raw, _ = self.explainer.explain_with_logits(model or self.images.model, x, self.images.target)
        return maps.prepared(raw, self.images.size)

    def each(self) -> Iterator[tuple[int, Tensor]]:
        """Index and map (H, W) in float64 of every image."""
        return enumerate(self.maps.double().unbind())


def check_counts(metric: object, *names: str) -> None:
    """Raise BadValue for a metric of which one of the fields ``names`` is below 1; None passes."""
    for name in names:
        if (value := getattr(metric, name)) is not None and value < 1:
            raise BadValue(f"{type(metric).__name__} needs {name} >= 1, got {value}")


def unscorable(maps: Tensor) -> Tensor:
    """Whether each of ``maps`` (N, H, W) is zero or not finite, (N,) bool."""
    low, high = maps.amin((1, 2)), maps.amax((1, 2))  # NaN wherever there is one
    return ~torch.isfinite(low) | ~torch.isfinite(high) | ((low == 0) & (high == 0))
