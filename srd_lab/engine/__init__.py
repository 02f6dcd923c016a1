"""One modified backward pass over an unmodified network.

What follows a model's calls, makes a rule stand in for derivatives, and knows where channels and places of each tensor lie.
It imports the modules at the top of ``srd_lab`` (errors, types, runtime, maps, ...) and nothing else of this project: no
method, no network, no data. Begin with docs/internals.md, "From a call to a map"; the equations are in
:mod:`srd_lab.engine.rules`, and what every method does before and after is in :mod:`srd_lab.engine.attribution`.
"""
