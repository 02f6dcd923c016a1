"""Metrics of explanations: scores per image, in batches, exact, on the device of the maps.

A metric is a frozen dataclass that declares itself with :func:`srd_lab.catalogue.metric`; nothing else lists it. Metrics
import the modules at the top of ``srd_lab`` and nothing else of this project: an explanation comes to them as
:class:`srd_lab.metrics.explained.Explained`. Begin with that module and :mod:`srd_lab.metrics.localisation`; how to add one
is in CONTRIBUTING.md.
"""
