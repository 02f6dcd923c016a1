"""Files of every kind that the toolkit reads, each broken in many ways, from a seed.

``python tests/broken_files.py FOLDER`` writes all of them, to try other programs on.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIDE = 24
WAYS = 200  # to break a file


def sound() -> dict[str, bytes]:
    """One sound file of every kind: name -> content."""
    chance = np.random.default_rng(0)
    picture = Image.fromarray(chance.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    found = {
        f"{kind}.{kind}": _saved(picture, kind)
        for kind in ("png", "jpeg", "gif", "tiff", "webp", "bmp", "ppm")
    }
    rows, labels = chance.integers(0, 256, (20, 3072), dtype=np.uint8), [k % 10 for k in range(20)]
    found["test_batch"] = pickle.dumps({"data": rows, "labels": labels}, protocol=2)
    found["test_batch.bin"] = b"".join(
        bytes([k]) + row.tobytes() for k, row in zip(labels, rows, strict=True)
    )
    found["cifar.npz"] = _arrays(test_images=rows.reshape(20, 3, 32, 32), test_labels=np.array(labels))
    weights = {"conv.weight": torch.linspace(-1, 1, 108).view(4, 3, 3, 3), "conv.bias": torch.zeros(4)}
    found["weights.pth"] = _stored(weights)
    found["weights.npz"] = _arrays(**{name: value.numpy() for name, value in weights.items()})
    found["weights.safetensors"] = _safetensors(weights)
    found["batch.npz"] = _arrays(pair=np.arange(3), ssim=chance.random(3), files=np.array(["a", "b", "c"]))
    found["boxes.csv"] = b"file,x0,y0,x1,y1,width,height\na.png,1,2,10,12,24,24\nb.png,0,0,23,23,24,24\n"
    found["boxes.xml"] = (
        b"<annotation><size><width>24</width><height>24</height></size><object><name>n01440764</name><bndbox><xmin>1</xmin>"
        b"<ymin>2</ymin><xmax>10</xmax><ymax>12</ymax></bndbox></object></annotation>"
    )
    found["val.txt"] = b"a.png n01440764\nb.png n01443537\n"
    found["run.json"] = json.dumps(
        {
            "command": "it",
            "name": "it",
            "status": "KILLED",
            "params": {"seed": "0"},
            "metrics": {"ssim": 0.5},
            "not_finite": [],
        }
    ).encode()
    return found


def broken(name: str, content: bytes, ways: int = WAYS) -> Iterator[tuple[str, bytes]]:
    """What a file may have become: how, and its content then; the same every time.

    name : of the file, which the draws depend on. ways : how many.
    """
    chance = np.random.default_rng([ways, *name.encode()])
    for k in range(ways):
        at, until = sorted(int(i) for i in chance.integers(0, len(content) + 1, 2))
        yield _BREAKS[k % len(_BREAKS)](content, at, until, chance)


def _cut(content: bytes, at: int, until: int, chance: np.random.Generator) -> tuple[str, bytes]:
    return f"cut off at {at}", content[:at]


def _flipped(content: bytes, at: int, until: int, chance: np.random.Generator) -> tuple[str, bytes]:
    at, bit = min(at, len(content) - 1), int(chance.integers(8))
    return f"bit {bit} of {at} flipped", content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def _overwritten(content: bytes, at: int, until: int, chance: np.random.Generator) -> tuple[str, bytes]:
    some = chance.bytes(min(16, len(content) - at))
    return f"{len(some)} bytes from {at} on at random", content[:at] + some + content[at + len(some) :]


def _huge(content: bytes, at: int, until: int, chance: np.random.Generator) -> tuple[str, bytes]:
    return f"4 bytes from {at} on at their most", content[:at] + b"\xff\xff\xff\x7f" + content[at + 4 :]


def _zeroed(content: bytes, at: int, until: int, chance: np.random.Generator) -> tuple[str, bytes]:
    return f"zeros from {at} to {until}", content[:at] + bytes(until - at) + content[until:]


def _removed(content: bytes, at: int, until: int, chance: np.random.Generator) -> tuple[str, bytes]:
    return f"without {at} to {until}", content[:at] + content[until:]


def _twice(content: bytes, at: int, until: int, chance: np.random.Generator) -> tuple[str, bytes]:
    return f"{at} to {until} twice", content[:until] + content[at:]


def _digit(content: bytes, at: int, until: int, chance: np.random.Generator) -> tuple[str, bytes]:
    """Another number in a text: far too large, negative, or none."""
    text = [b"9" * 5000, b"-1", b"nan", b"1e308", b"", b"\xef\xbb\xbf", b"\0", b'"', b"<", b"\n\n"][
        int(chance.integers(10))
    ]
    digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    place = digits[at % len(digits)] if digits else 0
    return f"{text[:9]!r} in place of {place}", content[:place] + text + content[place + 1 :]


_BREAKS = (_cut, _flipped, _overwritten, _huge, _zeroed, _removed, _twice, _digit)


def _saved(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def _arrays(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return _without_times(file.getvalue())


def _stored(weights: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(weights, file)
    return file.getvalue()


def _safetensors(weights: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save(weights)


def _without_times(content: bytes) -> bytes:
    """A zip file with one date for all its members, so that it is the same every time."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(zipfile.ZipInfo(name), old.read(name), zipfile.ZIP_DEFLATED)
    return made.getvalue()


def main(folder: str) -> None:
    for name, content in sound().items():
        for k, (how, changed) in enumerate(broken(name, content)):
            place = Path(folder, name, f"{k:03d}-{how.replace(' ', '-').replace('/', '')}{Path(name).suffix}")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(changed)


if __name__ == "__main__":
    main(*sys.argv[1:])
