"""Images without labels: what the network predicts stands in the place of their classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from srd_lab.data.loading import load_batches
from srd_lab.logits import class_logits
from srd_lab.runtime import Batcher
from srd_lab.types import Dataset, Sample

AT_ONCE = 16


class Predicted:
    """A data set with the classes that a network predicts as its labels.

    dataset : whose own labels do not count. model : on ``device``, which takes its images.

    All images are looked at once; one that cannot be read keeps the label -1 and is skipped later, as it would be anyway.
    """

    def __init__(self, dataset: Dataset, model: nn.Module, device: torch.device) -> None:
        self.dataset, self.classes = dataset, dataset.classes
        self.labels = torch.full((len(dataset),), -1)

        def predict(some: Sequence[Sample]) -> list[int]:
            with torch.no_grad():
                x = torch.stack([sample.image for sample in some]).to(device)
                return class_logits(model(x)).argmax(1).tolist()

        batcher, everything = Batcher(AT_ONCE), range(len(dataset))
        for loaded in load_batches(dataset, [everything[k : k + AT_ONCE] for k in everything[::AT_ONCE]], 0):
            found = [label for part in batcher.run(predict, loaded.samples) for label in part]
            self.labels[loaded.indices] = torch.tensor(found, dtype=self.labels.dtype)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return replace(self.dataset[index], label=int(self.labels[index]))

    def name(self, index: int) -> str:
        """The data set's own name for it."""
        return self.dataset.name(index)


def has_labels(dataset: Dataset) -> bool:
    """Whether a data set knows the class of any of its images."""
    return bool((torch.as_tensor(dataset.labels) >= 0).any())
