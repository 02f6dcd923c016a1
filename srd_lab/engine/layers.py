"""Which activation call a name or a resolution stands for."""

from __future__ import annotations

from collections.abc import Sequence

from srd_lab.engine.spellings import Call
from srd_lab.errors import SrdLabError


def call_index(calls: Sequence[Call], layer: str | int) -> int:
    """Index of an activation call by index, by name, or by the submodule whose last call it is."""
    names = [call.name for call in calls]
    if isinstance(layer, int):
        if not -len(names) <= layer < len(names):
            raise SrdLabError(f"activation call {layer} does not exist; the model makes {len(names)} calls")
        return layer % len(names)
    for suffix in ("", "."):
        exact = [
            i for i, name in enumerate(names) if name == layer or (suffix and name.endswith("." + layer))
        ]
        if exact:
            return exact[0]
    within = [
        i
        for i, name in enumerate(names)
        if f".{name}".find(f".{layer}.") >= 0 or name.startswith(layer + "#")
    ]
    if not within:
        raise SrdLabError(
            f"no activation call is named {layer!r} or made inside it; the calls are: {', '.join(names)}"
        )
    return within[-1]


def high_call(shapes: Sequence[tuple[int, ...]], image: Sequence[int]) -> int:
    """Index of the last map (N, C, h, w) at 1/8 of the size of images (N, C, H, W), as 28 is of 224."""
    size = tuple(-(-side // 8) for side in image[2:])
    fitting = [i for i, shape in enumerate(shapes) if len(shape) == 4 and shape[2:] == size]
    if not fitting:
        raise SrdLabError(f"no activation has 1/8 of the input's size, {size}; name a layer with level=")
    return fitting[-1]
