"""The data and the networks that a command's settings name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from srd_lab.runs.settings import Settings, weights_of


def data_for(settings: Settings, name: str) -> Any:
    """The data as the settings have it, at the size that the network ``name`` is made for.

    Errors are those of :func:`srd_lab.data.load_data` and :func:`srd_lab.models.input_size`.
    """
    from srd_lab.data import load_data
    from srd_lab.models import input_size

    size = input_size(name, settings.data)
    return load_data(settings.data, seed=settings.seed, size=size, non_rgb=settings.non_rgb)


def network_for(settings: Settings, name: str, models: Sequence[str], device: Any, dataset: Any) -> Any:
    """The network ``name``, one of ``models``, with the weights that the settings have for it, on ``device``.

    Raises BadWeights where its classes are not those of ``dataset``; else the errors are those of
    :func:`srd_lab.models.load_model` and :func:`srd_lab.runs.settings.weights_of`.
    """
    from srd_lab.models import check_classes, load_model

    model = load_model(name, settings.data, weights_of(settings.weights, models)[name], str(device))
    check_classes(model, dataset)
    return model


def checked_networks(
    settings: Settings, models: Sequence[str], fits: Callable[[str, Any], object] | None = None
) -> Any:
    """The data at the first network's size, after every network was loaded, tried and let go again.

    So what is wrong with the last one shows before the work on the first.

    fits : called with name and network, on the CPU; may refuse one by an error.

    Errors are those of :func:`data_for` and :func:`network_for`.
    """
    dataset = data_for(settings, models[0])
    for name in models:
        model = network_for(settings, name, models, "cpu", dataset)
        if fits:
            fits(name, model)
    return dataset


def weights_sums(settings: Settings, models: Sequence[str]) -> tuple[str, ...]:
    """``NAME:SHA256`` of every network's weights file, bundled and downloaded ones too.

    Errors are those of :func:`srd_lab.models.weights_file`.
    """
    from srd_lab.models import weights_file

    sums = []
    for name, given in weights_of(settings.weights, models).items():
        with weights_file(name, settings.data, given).open("rb") as file:
            sums.append(f"{name}:{hashlib.file_digest(file, 'sha256').hexdigest()}")
    return tuple(sums)
