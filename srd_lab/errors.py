"""What is wrong, said in one line."""

from __future__ import annotations


class SrdLabError(Exception):
    """What was wrong, what was expected, and what to do: one line, shown to the user as it stands."""


class OtherWork(SrdLabError):
    """What is stored in a run is not of the work to do: going on with it makes no sense, and leaves it as it was."""


class LostRelevance(SrdLabError):
    """Not all relevance that started arrived, for a reason that the method does not know."""


class SrdLabWarning(UserWarning):
    """What a user should know of a result: one line, shown once."""
