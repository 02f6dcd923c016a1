"""Defences that wrap a method and are methods themselves: Gaussian smoothing, and the map of a softplus network.

- Smoothed: ``mean_k map_c(x + sigma n_k)`` over Gaussian copies of the image, for the class c of the image itself, every
  copy's map made comparable first (SmoothGrad for any method: Smilkov et al. 2017; as a defence: Levine et al. 2019).
- BetaSmoothed: the map of the network whose ReLUs are ``softplus(beta)``, which bounds the curvature that an attack needs
  (Dombrowski et al. 2019).

Every copy's map is divided by its largest absolute value, so that a copy adds at most 1/draws to a pixel and none decides
the mean. Divided by its sum (``abs_sum``), a copy with all its relevance on one pixel would outweigh all others.

Example
-------
>>> from srd_lab.registry import make_explainer
>>> Smoothed(make_explainer("srd"), sigma=0.1, draws=4).explain(model, x).shape     # (N, h, w), signed
torch.Size([2, 64, 64])
>>> parse_explainer("smoothed(gradient,0.1)", make_explainer).draws
64
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from srd_lab.catalogue import outer_parts
from srd_lab.engine.attribution import plain_logits
from srd_lab.engine.recompute import recomputed
from srd_lab.engine.surrogate import SmoothModel
from srd_lab.errors import BadValue
from srd_lab.logits import check_target
from srd_lab.normalise import check_pixel_range
from srd_lab.overflow import refuse_overflow
from srd_lab.runtime import generator
from srd_lab.types import Explainer

NORMALISE = ("max_abs", "abs_sum", "none")
_PIXELS_AT_ONCE = 8 * 224 * 224  # of a differentiable SRD pass on VGG16, 3 GiB
_EXAMPLE = "smoothed(srd,0.1,64)"


@dataclass(frozen=True)
class Smoothed(Explainer):
    """Mean of an explainer's maps over noisy copies of the image, all for the class of the image itself.

    explainer : what is smoothed; may be a wrapper itself. Of nested ones each draws noise of its own.
    sigma : standard deviation of the Gaussian noise, > 0, in units of pixels in [0, 1]; copies are not clipped.
    draws : copies, >= 1.
    seed : decides the noise, which is the same for every image, whatever batch it is in.
    normalise : what each copy's map is divided by: its largest absolute value ("max_abs"), the sum of its absolute values
        ("abs_sum"), or "none". Zero maps stay zero.
    images_at_once : copies in one pass, at least one of every image; None keeps a pass near 8 images of 224 x 224.

    Raises SrdLabError for values out of these ranges.
    """

    explainer: Explainer
    sigma: float = 0.1
    draws: int = 64
    seed: int = 0
    normalise: str = "max_abs"
    images_at_once: int | None = None

    def __post_init__(self) -> None:
        check_wrapped(self)
        if not 0 < self.sigma < inf:
            raise BadValue(f"smoothed needs sigma > 0 (pixels are in [0, 1]), got {self.sigma}")
        for name, count in (("draws", self.draws), ("images_at_once", self.images_at_once)):
            if count is not None and count < 1:
                raise BadValue(f"smoothed needs {name} >= 1, got {count}")
        if self.normalise not in NORMALISE:
            raise BadValue(
                f"smoothed: normalise must be one of {', '.join(NORMALISE)}, got {self.normalise!r}"
            )

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The mean map (N, h, w); the model's output for x without noise, by which ``target=None`` is decided.

        Differentiable if x asks for a gradient; with several passes, each is run again backwards, and one is in memory.
        """
        logits = plain_logits(model, x)
        classes = check_target(target, logits)
        together = max(1, (self.images_at_once or _PIXELS_AT_ONCE // x[0, 0].numel()) // len(x))
        chunks = [range(first, min(self.draws, first + together)) for first in range(0, self.draws, together)]

        def part(some: range) -> Callable[[Tensor], Tensor]:
            return lambda base: self._sum(model, base, classes, some)

        several = len(chunks) > 1
        parts = [recomputed(part(some), x) if several else part(some)(x) for some in chunks]
        return torch.stack(parts).sum(0) / self.draws, logits

    def noise(self, x: Tensor, some: range) -> Tensor:
        """The noise of some draws, (len(some), C, H, W), of standard deviation sigma.

        x : images (N, C, H, W), of which shape, dtype and device count. some : the numbers of the draws, from 0.
        """
        inside = _smoothings(self.explainer)
        keys = ("smoothed", inside) if inside else ("smoothed",)
        drawn = [
            torch.randn(x.shape[1:], generator=generator(self.seed, *keys, k), dtype=torch.float32)
            for k in some
        ]
        return self.sigma * torch.stack(drawn).to(x)

    def _sum(self, model: nn.Module, base: Tensor, classes: Tensor, some: range) -> Tensor:
        """Sum over draws of the comparable maps, (N, h, w)."""
        copies = (base + self.noise(base, some)[:, None]).flatten(0, 1)
        found = _unchecked(self.explainer, model, copies, classes.repeat(len(some)))
        return _comparable(found, self.normalise).unflatten(0, (len(some), -1)).sum(0)


@dataclass(frozen=True)
class BetaSmoothed(Explainer):
    """An explainer's map of the network whose ReLUs are ``softplus(beta)``.

    explainer : what explains the softplus network.
    beta : > 0; the larger, the closer to the network itself.

    The network given still decides the class, and only its explanation is taken elsewhere: the logits are those of the
    network *itself*, with its ReLUs. Where ``model`` is a softplus surrogate already (an attack's), the network under it is
    taken, since its beta is not the defence's and softplus of softplus is neither. So an attack on any surrogate attacks
    what is deployed, and its condition that the class must hold is one on the original network.
    """

    explainer: Explainer
    beta: float = 10.0

    def __post_init__(self) -> None:
        check_wrapped(self)
        if not 0 < self.beta < inf:
            raise BadValue(f"beta_smoothed needs beta > 0, got {self.beta}")

    def explain(self, model: nn.Module, x: Tensor, target: Tensor | int | None = None) -> Tensor:
        """The map (N, h, w); without a pass of the network itself where ``target`` is given."""
        if target is None:
            return super().explain(model, x)
        check_pixel_range(model, x)
        raw = _unchecked(self, model, x, target)
        refuse_overflow(SmoothModel(_original(model), self.beta), x, None, raw)
        return raw

    def explain_with_logits(
        self, model: nn.Module, x: Tensor, target: Tensor | int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The map (N, h, w) on the softplus network; the output of the network itself, see the class."""
        logits = plain_logits(_original(model), x)
        return _unchecked(self, model, x, check_target(target, logits)), logits


def _unchecked(explainer: Explainer, model: nn.Module, x: Tensor, target: Tensor | int) -> Tensor:
    """An explainer's map, finite or not; a softplus network's without a pass of the network itself."""
    while isinstance(explainer, BetaSmoothed):
        model, explainer = SmoothModel(_original(model), explainer.beta), explainer.explainer
    return explainer.explain_with_logits(model, x, target)[0]


def _comparable(raw: Tensor, how: str) -> Tensor:
    if how == "none":
        return raw
    size = raw.abs().amax((1, 2), True) if how == "max_abs" else raw.abs().sum((1, 2), keepdim=True)
    return raw / size.masked_fill(size == 0, 1)


def _original(model: nn.Module) -> nn.Module:
    while isinstance(model, SmoothModel):
        model = model.model
    return model


def _smoothings(explainer: Any) -> int:
    """How many of an explainer and those that it wraps draw noise in this way."""
    inner = getattr(explainer, "explainer", None)
    return isinstance(explainer, Smoothed) + (0 if inner is None else _smoothings(inner))


def check_wrapped(wrapper: Any) -> None:
    """Refuse (SrdLabError) a wrapper whose ``explainer`` is none."""
    if not isinstance(wrapper.explainer, Explainer) or isinstance(wrapper.explainer, type):
        raise BadValue(
            f"{type(wrapper).__name__} wraps an explainer such as SRD(), got {wrapper.explainer!r}"
        )


# explainers as text --------------------------------------------------------------------------------------
WRAPPERS: dict[str, type[Any]] = {"smoothed": Smoothed, "beta_smoothed": BetaSmoothed}
_READ: dict[str, Callable[[str], Any]] = {"float": float, "int": int, "str": str}


def parse_explainer(text: str, make: Callable[[str], Explainer]) -> Explainer:
    """The explainer that a text names: a method, or a wrapper around one with its fields by place or by name.

    text : ``srd``, ``smoothed(srd,0.1,64)``, ``smoothed(beta_smoothed(gradient,10),sigma=0.1,normalise=abs_sum)``.
    make : makes the explainer of a plain name, such as ``registry.make_explainer``; its errors are passed on.

    Raises SrdLabError, one line, for what is none of these.
    """
    name, arguments = _read(text)
    if not arguments:
        return make(name)
    inner = parse_explainer(arguments[0], make)
    return WRAPPERS[name](inner, **_options(name, arguments[1:]))


def plain_name(text: str) -> str:
    """The name of the method inside all wrappers. Raises SrdLabError for a text that cannot be read.

    Example
    -------
    >>> plain_name("smoothed(beta_smoothed(srd,10),0.1)")
    'srd'
    """
    name, arguments = _read(text)
    return plain_name(arguments[0]) if arguments else name


def _read(text: str) -> tuple[str, list[str]]:
    """The name in a text and its arguments, of which a plain method has none."""
    found = re.fullmatch(r"\s*([^\s(),]+)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if found is None:
        raise BadValue(f"{text!r} cannot be read as a method; expected a name, or {_EXAMPLE}")
    parts = [] if found[2] is None else outer_parts(found[2])
    if bool(parts) != (found[1] in WRAPPERS):
        wrong = "is no wrapper" if parts else "lacks the method that it wraps"
        raise BadValue(
            f"{found[1]!r} in {text!r} {wrong}; wrappers are {', '.join(WRAPPERS)}, as in {_EXAMPLE}"
        )
    if not all(parts) or (parts and "=" in re.split(r"[(?]", parts[0])[0]):
        raise BadValue(f"{text!r} has an argument that is empty, or not a method first; expected {_EXAMPLE}")
    return found[1], parts


def _options(name: str, given: list[str]) -> dict[str, Any]:
    """Fields of a wrapper behind its first, from values by place and then by name."""
    types = {field.name: str(field.type).partition(" ")[0] for field in fields(WRAPPERS[name])[1:]}
    options: dict[str, Any] = {}
    if len(given) > len(types):
        raise BadValue(f"{name} takes at most {len(types)} values ({', '.join(types)}), got {len(given)}")
    for place, argument in enumerate(given):
        key, named, value = (part.strip() for part in argument.rpartition("="))
        if not named and any("=" in before for before in given[:place]):
            raise BadValue(f"{name}: {argument!r} stands behind a named value; name it too")
        key = key if named else list(types)[place]
        if key not in types or key in options:
            wrong = f"is given {key} twice" if key in options else f"has no option {key!r}"
            raise BadValue(f"{name} {wrong}; it takes {', '.join(types)}, each once")
        options[key] = _value(name, key, value, types[key])
    return options


def _value(name: str, key: str, text: str, kind: str) -> Any:
    try:
        return _READ[kind](text)
    except ValueError:
        expected = "a whole number" if kind == "int" else "a number"
        raise BadValue(f"{name}: {key} must be {expected}, got {text!r}") from None
