"""The paper's experiments, each as one command: what it printed beside what is measured here.

It imports the studies that it repeats (:mod:`srd_lab.evaluation`, ``attacks``, ``apop``) and all that these may import; only
the command line imports it. Begin with :mod:`srd_lab.reproduce.paper`, which reads the printed numbers, and
:mod:`srd_lab.reproduce.evaluation`, which measures those of Table 2.
"""
