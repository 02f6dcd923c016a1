"""The commands ``explain``, ``evaluate`` and ``compare``: every method by every metric on the same images.

What is measured, how runs are compared, and the tables. It imports methods, metrics, data, networks, figures and
:mod:`srd_lab.runs`, but neither attacks nor the command line. Begin with :mod:`srd_lab.evaluation.experiment`, the scores of
one batch, and :mod:`srd_lab.evaluation.study`, the run around it.
"""
