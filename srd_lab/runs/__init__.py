"""Runs: the settings of a command, its work in batches, what is stored of it, and the report.

A study of another package works here; the run stores each batch once it is done, so that a run that was stopped goes on.
It imports :mod:`srd_lab.data`, :mod:`srd_lab.models` and :mod:`srd_lab.render`, but no methods, metrics or studies; MLflow
is imported here and nowhere else. Begin with docs/internals.md, "From a command to a run", then :mod:`srd_lab.runs.run` and
:mod:`srd_lab.runs.batches`.
"""
