"""The data and the networks that a command's settings name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from srd_lab.errors import BadData, SrdLabWarning
from srd_lab.parts import is_own
from srd_lab.runs.settings import Settings, weights_of
from srd_lab.types import Preprocessing


class Inputs(Protocol):
    """What of the settings of a command says which images and networks it takes; see
    :class:`srd_lab.runs.settings.Settings`."""

    @property
    def data(self) -> str: ...
    @property
    def weights(self) -> tuple[str, ...]: ...
    @property
    def size(self) -> int | None: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...


def preprocessing_for(settings: Inputs, name: str) -> Preprocessing:
    """What the network ``name`` needs of an image, but for what the settings say themselves.

    Errors are those of :func:`srd_lab.models.preprocessing`; BadValue for statistics that are not three numbers each.
    """
    from srd_lab.models import preprocessing

    own = preprocessing(name, settings.data)
    given: dict[str, Any] = {"size": settings.size, "mean": settings.mean, "std": settings.std}
    return replace(own, **{key: value for key, value in given.items() if value})


def data_for(settings: Settings, name: str, split: str = "test") -> Any:
    """The data as the settings have it, made for the network ``name``; split : see :func:`srd_lab.data.load_data`.

    Errors are those of :func:`srd_lab.data.load_data` and :func:`preprocessing_for`.
    """
    from srd_lab.data import load_data

    wants = preprocessing_for(settings, name)
    return load_data(
        *(settings.data, split),
        seed=settings.seed,
        size=wants.size,
        crop=wants.crop,
        interpolation=wants.interpolation,
        non_rgb=settings.non_rgb,
    )


def data_and_network(settings: Settings, name: str, models: Sequence[str], device: Any) -> tuple[Any, Any]:
    """What :func:`data_for` and :func:`network_for` give, with the settings' names of classes. A network from elsewhere,
    which has to be there before its data can be resized, is made once."""
    from srd_lab.data import check_place
    from srd_lab.data.labels import read_labels
    from srd_lab.models import make_own

    given = weights_of(settings.weights, models)[name]
    if is_own(name):
        check_place(settings.data)  # before weights are downloaded
    made = make_own(name, with_weights=given is None) if is_own(name) else None
    dataset = data_for(settings, name)
    model = network_for(settings, name, models, device, dataset, made)
    if settings.labels:
        dataset = copy.copy(dataset)  # the user's own stays as it is
        dataset.classes = read_labels(settings.labels, model.classes)
    return dataset, model


def network_for(
    settings: Inputs, name: str, models: Sequence[str], device: Any, dataset: Any = None, made: Any = None
) -> Any:
    """The network ``name``, one of ``models``, with the weights that the settings have for it, on ``device``.

    made : see :func:`srd_lab.models.load_model`.

    Raises BadWeights where its classes are not those of ``dataset``, if one is given; else the errors are those of
    :func:`srd_lab.models.load_model` and :func:`srd_lab.runs.settings.weights_of`.
    """
    from srd_lab.models import check_classes, load_model, make_own

    weights = weights_of(settings.weights, models)[name]
    if made is None and is_own(name):
        made = make_own(name, with_weights=weights is None)
    wants = preprocessing_for(settings, name)
    model = load_model(name, settings.data, weights, str(device), wants, made)
    if dataset is not None:
        check_classes(model, dataset)
    return model


def labelled(dataset: Any, model: Any, device: Any) -> Any:
    """The data themselves; where they have no labels, with the classes that the network predicts, which a warning says."""
    from srd_lab.data.predicted import Predicted, has_labels

    if has_labels(dataset):
        return dataset
    warnings.warn(
        "the images have no labels: the classes that the network predicts stand in their place",
        SrdLabWarning,
        stacklevel=2,
    )
    return Predicted(dataset, model, device)


def checked_networks(
    settings: Settings, models: Sequence[str], fits: Callable[[str, Any], object] | None = None
) -> tuple[Any, tuple[str, ...]]:
    """The data at the first network's size and :func:`weights_sums` of all networks, after every one was loaded, tried and
    let go again.

    So what is wrong with the last one shows before the work on the first.

    fits : called with name and network, on the CPU; may refuse one by an error.

    Errors are those of :func:`data_for` and :func:`network_for`.
    """
    from srd_lab.data.predicted import has_labels

    dataset, model = data_and_network(settings, models[0], models, "cpu")
    if not has_labels(dataset):
        raise BadData(
            f"{settings.data} has no labels, which this command compares predictions with; give data that have"
        )
    sums: tuple[str, ...] = ()
    for k, name in enumerate(models):
        model = network_for(settings, name, models, "cpu", dataset) if k else model
        if fits:
            fits(name, model)
        sums += weights_sums(settings, models, {name: model})
    return dataset, sums


def weights_sums(settings: Settings, models: Sequence[str], loaded: Mapping[str, Any]) -> tuple[str, ...]:
    """``NAME:SHA256`` of the weights, bundled and downloaded ones too, of networks that :func:`network_for` has loaded.

    models : all that the settings' weights are for. loaded : name -> network.

    Errors are those of :func:`srd_lab.models.weights_digest`.
    """
    from srd_lab.models import weights_digest

    files = weights_of(settings.weights, models)
    return tuple(
        f"{name}:{network.weights_sha256 or weights_digest(name, settings.data, files[name])}"
        for name, network in loaded.items()
    )
