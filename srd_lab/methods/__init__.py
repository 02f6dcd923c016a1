"""Explanation methods, one short file per family; :mod:`srd_lab.registry` has them by name.

A method is a frozen dataclass that declares itself with :func:`srd_lab.catalogue.method`; nothing else lists it. Methods
import :mod:`srd_lab.engine`, but no networks, data or metrics. Begin with :mod:`srd_lab.methods.gradient`, the shortest, or
:mod:`srd_lab.methods.srd`; how to add one is in CONTRIBUTING.md.
"""
