"""The command line: one module per group of commands, which reads options, makes a study and runs it.

It is the top of the project: it may import every package, and none imports it. What it imports at the start is light; torch
and MLflow are loaded by the command that runs. Begin with :mod:`srd_lab.cli.main`, which lists the commands, and
:mod:`srd_lab.cli.tracked`, by which all that make runs go.
"""
