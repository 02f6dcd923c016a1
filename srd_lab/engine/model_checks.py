"""What is tried once with every model: whether it draws at random, whether its images are apart, and whether following it
leaves it what it is.

All is asked with an image or two when a model is first explained, and remembered as long as the model lives.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srd_lab.engine.model_memory import found_of
from srd_lab.engine.rounding import RoundingWatch, far_apart, logits_of
from srd_lab.errors import Refused

_APART = "its images are apart"
_MOST = "images that are apart: "
_MIXES = (
    "the model mixes the images of a batch: beside others, an image has logits that differ by {:.2g} of the largest, so "
    "that it has no map of its own; take what runs along the first axis out of forward()"
)
_MAGNIFIED = 10  # times its own rounding may a model's logits differ when its calls are followed
_MOST_ROUNDING = 0.01  # of the largest logit, by which float32 images may seem to mix
_TRIES = 3  # with images that the model tells apart too little to say


def check_images_apart(model: nn.Module, x: Tensor) -> None:
    """Refuse (SrdLabError) a model whose output for an image depends on the images beside it.

    x : images (N, C, H, W), of which the first is tried: alone, and beside another in either order; and where these are the
        most images that were seen of the model, some of them as a whole and apart.
    """
    _check_pair(model, x.detach()[:1])
    if len(x) > 1:
        _check_batch(model, x.detach())


def _check_pair(model: nn.Module, one: Tensor) -> None:
    """The same with an image (1, C, H, W) and another one made of it."""
    if _APART in found_of(model):
        return
    _check_no_chance(model, one)
    other, watch = one.flip((2, 3)) / 2, RoundingWatch(model)
    with torch.no_grad():
        alone = [logits_of(watch, image) for image in (one, other)]
        beside, turned = logits_of(watch, torch.cat([one, other])), logits_of(watch, torch.cat([other, one]))
    if alone[0] is None or alone[1] is None or beside is None or turned is None:
        return
    each = torch.cat([alone[0], alone[1]])
    _check_no_probability(model, each, torch.cat([one, other]))
    apart = max(far_apart(beside, each), far_apart(turned, each.flip(0)))
    if apart > watch.rounding and not _is_rounding(model, one, apart):
        raise Refused(_MIXES.format(apart))
    if _is_reordered(watch):
        raise Refused(
            "the model works on the images of a batch in another order than it is given them, so that its maps inside are "
            "those of other images; take what moves the first axis out of forward()"
        )
    tries = f"asked {sum(said.startswith('asked') for said in found_of(model)) + 1} times"
    told_apart = far_apart(each[:1], each[1:]) > watch.rounding  # else a mixture would not show
    found_of(model).add(_APART if told_apart or tries == f"asked {_TRIES} times" else tries)


def _check_no_probability(model: nn.Module, logits: Tensor, x: Tensor) -> None:
    """Refuse a model whose one output lies in [0, 1] whatever it is fed with: class 0 would never be predicted.

    logits : (N, K) of images x (N, C, H, W).
    """
    likely = logits.shape[1] == 2 and bool((logits[:, 0] == -logits[:, 1]).all() and _in_unit(logits[:, 1]))
    if likely:
        with torch.no_grad():
            far = [logits_of(RoundingWatch(model), x * factor) for factor in (1e3, -1e3)]
        if all(made is not None and _in_unit(made[:, 1]) for made in far):
            raise Refused(
                "the model's one output lies in [0, 1] whatever it is fed with, as a probability does; expected the logit "
                "of class 1: take the sigmoid off"
            )


def _in_unit(t: Tensor) -> bool:
    return bool(((t >= 0) & (t <= 1)).all())


def _check_batch(model: nn.Module, x: Tensor) -> None:
    """The same with images (N, C, H, W): some mix from the third image on, or cannot be run on one image alone."""
    most = max(
        [int(said.removeprefix(_MOST)) for said in found_of(model) if said.startswith(_MOST)], default=0
    )
    if most >= len(x):
        return
    watch = RoundingWatch(model)
    with torch.no_grad():
        whole = logits_of(watch, x)
        if whole is None or len(whole) != len(x):
            return  # whoever runs it next says why
        for i in sorted({0, 1, len(x) // 2, len(x) - 1}):
            alone = logits_of(watch, x[i : i + 1])
            if alone is None:  # beside others, then
                others = x.flip((2, 3)) / 2
                others[i] = x[i]
                beside = logits_of(watch, others)
                alone = whole[i : i + 1] if beside is None else beside[i : i + 1]
            apart = far_apart(whole[i : i + 1], alone)
            if apart > watch.rounding and not _is_rounding(model, x, apart):
                raise Refused(_MIXES.format(apart))
    found_of(model).add(f"{_MOST}{len(x)}")


def _is_rounding(model: nn.Module, x: Tensor, apart: float) -> bool:
    """Whether float32 images (N, C, H, W) seem to mix because the model magnifies rounding: in float64 they do not."""
    if x.dtype != torch.float32 or apart > _MOST_ROUNDING:
        return False
    try:
        exact = copy.deepcopy(model).double()
        check_images_apart(exact, x.double())
    except Exception:  # it cannot be copied, or mixes
        return False
    shown = found_of(exact)  # nothing where it could not be run in float64
    return _APART in shown and (len(x) == 1 or f"{_MOST}{len(x)}" in shown)


class SameOutput:
    """Whether a model puts out the same when it is followed; made before it is, as what runs last is what a model keeps.

    follower : what follows it. model, x : the model, and images (N, C, H, W), of which the first is tried.
    """

    def __init__(self, follower: str, model: nn.Module, x: Tensor) -> None:
        self._said, self._model = f"followed by {follower} it is the same", model
        self._watch, self._plain, self._one = RoundingWatch(model), None, x.detach()[:1]
        if self._said not in found_of(model):
            with torch.no_grad():
                self._plain = logits_of(self._watch, self._one)

    def check(self, logits: Any) -> None:
        """Refuse (SrdLabError) a model that, followed, puts out other ``logits`` (N, K)."""
        plain = self._plain
        if plain is None or not isinstance(logits, Tensor) or plain.shape != logits[:1].shape:
            return
        apart = far_apart(logits.detach()[:1], plain)
        if apart > self._watch.rounding and apart > _MAGNIFIED * _own_rounding(self._model, self._one, plain):
            raise Refused(
                f"the model puts out logits that differ by {apart:.2g} of the largest when its calls are followed: it does "
                "something that cannot be followed; use another method on it, and please report the model"
            )
        found_of(self._model).add(self._said)


def _own_rounding(model: nn.Module, one: Tensor, logits: Tensor) -> float:
    """How far the float32 ``logits`` (1, K) of a model for an image (1, C, H, W) are from those in float64, as a share of
    the largest; 0 where that cannot be told."""
    if one.dtype != torch.float32:
        return 0.0
    try:
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            found = logits_of(RoundingWatch(exact), one.double())
    except Exception:  # it cannot be copied
        return 0.0
    own = 0.0 if found is None else far_apart(logits.double(), found)
    return own if own < _MOST_ROUNDING else 0.0


def _check_no_chance(model: nn.Module, one: Tensor) -> None:
    """Refuse a model that draws at random, or whose output for an image (1, C, H, W) depends on earlier runs."""
    for _ in range(2):  # another thread may have drawn
        watches, states = (RoundingWatch(model), RoundingWatch(model)), [_random_states(one)]
        with torch.no_grad():
            outputs = []
            for watch in watches:
                outputs.append(logits_of(watch, one))
                states.append(_random_states(one))
        if outputs[0] is None or outputs[1] is None:
            return
        if states[0] == states[1] and watches[0].own_draws == watches[1].own_draws:
            break
    else:
        raise Refused(
            "the model draws at random, so that the model has no one map for an image; call model.eval() first, or take "
            "chance out of forward()"
        )
    if far_apart(outputs[0], outputs[1]) > watches[0].rounding:
        raise Refused(
            "the model puts out other logits when it is run again on the same image, so that it has no one map for it: it "
            "draws at random, or keeps something from run to run; take that out of forward()"
        )


def _random_states(like: Tensor) -> list[Any]:
    """The states of the random number generators of Python, NumPy and PyTorch, on the CPU and where ``like`` is."""
    found = [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().numpy().tobytes()]  # noqa: NPY002
    if like.is_cuda:
        found.append(torch.cuda.get_rng_state(like.device).numpy().tobytes())
    return found


def _is_reordered(watch: RoundingWatch) -> bool:
    """Whether an activation call of the third run, of two images, has not what those of the first two, of one each, have."""
    one, other, both, *_ = watch.sums
    for first, second, pair in zip(one, other, both, strict=False):
        if len(first) == len(second) == 1 and len(pair) == 2:  # else rows are no images
            expected = torch.cat([first, second])
            if (
                far_apart(pair, expected) > watch.rounding
                and far_apart(pair, expected.flip(0)) <= watch.rounding
            ):
                return True
    return False
