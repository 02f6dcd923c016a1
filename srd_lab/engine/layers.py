"""Which layer of a running model a name or a resolution stands for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from math import log
from typing import Any

from srd_lab.engine.spellings import Call
from srd_lab.errors import BadValue, Refused, SrdLabWarning


@dataclass(frozen=True)
class Place:
    """A map of a running model: its shape (N, C, h, w), and the node of autograd's graph that made it.

    index : where its owner finds it again.
    """

    index: int
    shape: tuple[int, ...]
    node: Any


def call_index(calls: Sequence[Call], layer: str | int) -> int:
    """Index of an activation call by index, by name, or by the submodule whose last call it is.

    layer : an index, from the end if negative; or a dotted name, that of a call first, of which what stands in front may be
        left out: that of a wrapper, or of the only one that has such a part.

    Raises BadValue if there is no such call, or if several layers have that name.
    """
    names = [call.name for call in calls]
    if isinstance(layer, int):
        if not -len(names) <= layer < len(names):
            raise BadValue(f"activation call {layer} does not exist; the model makes {len(names)} calls")
        return layer % len(names)
    if layer in names:
        return names.index(layer)
    inside: dict[str, list[int]] = {}  # by what stands in front of the layer's name
    for i, name in enumerate(names):
        for front in _in_front(name if "#" in layer else name.partition("#")[0], layer):
            inside.setdefault(front, []).append(i)
    if not inside:
        raise BadValue(
            f"no activation call is named {layer!r} or made inside it; the calls are: {', '.join(names)}"
        )
    wrappers = [front for front in inside if all(name.startswith(f"{front}.") for name in names)]
    fronts = [""] if "" in inside else wrappers or list(inside)
    if len(fronts) > 1:
        meant = ", ".join(f"{front}.{layer}" for front in fronts)
        raise BadValue(f"the layer {layer!r} may be any of {meant}; give the whole name")
    whole = f"{fronts[0]}.{layer}"
    return names.index(whole) if whole in names else inside[fronts[0]][-1]


def _in_front(name: str, layer: str) -> Iterator[str]:
    """What stands in front of ``layer`` in the dotted ``name``, wherever it occurs there."""
    parts, wanted = name.split("."), layer.split(".")
    for k in range(len(parts) - len(wanted) + 1):
        if parts[k : k + len(wanted)] == wanted:
            yield ".".join(parts[:k])


def check_rows(what: str, shape: Sequence[int], images: int, cure: str = "name another layer") -> None:
    """Refuse what has no row per image: tokens with the batch second, patches or windows folded into the batch."""
    if shape[0] != images:
        raise not_by_rows(what, shape, images, cure)


def not_by_rows(what: str, shape: Sequence[int], images: int, cure: str = "name another layer") -> Refused:
    """The refusal of what has no row per image."""
    return Refused(
        f"{what} puts out shape {tuple(shape)} for {images} images; expected the batch first, without patches or windows "
        f"folded into it: {cure}"
    )


def high(
    activations: Sequence[Place], others: Sequence[Place], image: Sequence[int], top: Any, bottom: Any
) -> tuple[bool, int]:
    """The last map at 1/8 of the size of images (N, C, H, W), as 28 is of 224, that all paths pass through between two nodes
    of autograd's graph: a residual branch has part of the relevance only. Whether it is an activation, and its index.

    activations, others : where to look. image : the shape of the images. top, bottom : nodes of the graph.

    Others are taken where no activation has that size. Where nothing has, the nearest has to do, and a warning says so.

    Raises SrdLabError if there is no such map of any size.
    """
    passed = cuts(top, bottom)
    wanted = _an_eighth(image)
    fitting = [
        (distance_to_high(place.shape[2:], image), is_other, -place.index, place)
        for is_other, places in ((False, activations), (True, others))
        for place in places
        if len(place.shape) == 4 and max(place.shape[2:]) > 1 and place.node in passed
        if place.shape[0] == image[0]
    ]
    if not fitting:
        raise Refused(
            "no map with spatial extent is passed by all of the relevance; name a layer with level="
        )
    _, is_other, _, nearest = min(fitting, key=lambda found: found[:3])
    if nearest.shape[2:] != wanted:
        warnings.warn(
            f"no map that all of the relevance passes has 1/8 of the input's size, {wanted}; the nearest has "
            f"{tuple(nearest.shape[2:])}: name a layer with level= to choose another",
            SrdLabWarning,
            stacklevel=2,
        )
    return not is_other, nearest.index


def distance_to_high(size: Sequence[int], image: Sequence[int]) -> float:
    """How far height and width of a map are from 1/8 of those of images (N, C, H, W), in natural logarithms."""
    return sum(abs(log(a / b)) for a, b in zip(size, _an_eighth(image), strict=True))


def _an_eighth(image: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-side // 8) for side in image[2:])


def is_cut(node: Any, top: Any, bottom: Any) -> bool:
    """Whether every path from ``top`` down to ``bottom``, nodes of autograd's graph, passes ``node``."""
    return not leads_to(top, bottom, {node})


def leads_to(top: Any, bottom: Any, past: AbstractSet[Any] = frozenset()) -> bool:
    """Whether a path leads from ``top`` down to ``bottom``, nodes of autograd's graph, that does not pass ``past``."""
    waiting, seen = [top], set(past)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node is bottom:
            return True
        seen.add(node)
        waiting += _below(node)
    return False


def cuts(top: Any, bottom: Any) -> set[Any]:
    """The nodes that every path from ``top`` down to ``bottom`` passes: no edge leads past them, in topological order."""
    order = [*_sorted(top)]  # from the bottom up
    leading = {bottom}  # nodes that a path leads on from, down to the bottom
    for node in order:
        if any(below in leading for below in _below(node)):
            leading.add(node)
    place = {node: i for i, node in enumerate(node for node in reversed(order) if node in leading)}
    cuts, reach = set(), 0
    for node, i in place.items():
        if reach <= i:
            cuts.add(node)
        reach = max([reach, *(place[below] for below in _below(node) if below in place)])
    return cuts


def _below(node: Any) -> list[Any]:
    """Where a signal goes on to from a node: not through a constant of the live pass, and not to what is overwritten."""
    first = {"LiveConstantBackward": 1, "_WriteBackBackward": 1}.get(type(node).__name__, 0)
    return [below for below, _ in node.next_functions[first:] if below is not None]


def _sorted(top: Any) -> Iterator[Any]:
    """The nodes below ``top``, each after all that lie below it."""
    seen, waiting = {top}, [(top, iter(_below(top)))]
    while waiting:
        node, rest = waiting[-1]
        below = next(rest, None)
        if below is None:
            waiting.pop()
            yield node
        elif below not in seen:
            seen.add(below)
            waiting.append((below, iter(_below(below))))
