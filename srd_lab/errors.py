"""What is wrong, said in one line.

Every error that a user can bring about is an :class:`SrdLabError` of one of the kinds below. Its sentence may be reworded;
its class and ``code`` stay.

| class | code | what is at fault |
|---|---|---|
| :class:`BadValue` | ``value`` | a parameter or an option: out of range, or a name that is not known |
| :class:`BadInput` | ``input`` | images, maps, targets: their type, shape, range or number |
| :class:`Refused` | ``refused`` | the network: it does what this method cannot follow, or is in a wrong state |
| :class:`Leak` | ``leak`` | the network, noticed by the sum: less or more arrived than started |
| :class:`BadData` | ``data`` | files of a data set |
| :class:`BadWeights` | ``weights`` | a file of weights, or a network that is not of the data's classes |
| :class:`StoreTrouble` | ``store`` | the tracking store, or a folder that cannot be written |
| :class:`BadRun` | ``run`` | a stored run: not there, damaged, or not of this command |
| :class:`OtherWork` | ``run`` | the same; and the run is left as it was |
| :class:`BadEntry` | ``entry`` | an entry of the standard evaluation: damaged, altered, not to be compared |
| :class:`NoGradient` | ``gradient`` | a map that has no gradient, attacked by gradients |
| :class:`Unavailable` | ``unavailable`` | this machine: a package, a device, a download or memory is missing |

Example
-------
>>> try:
...     raise Refused("the model draws at random; call model.eval() first")
... except SrdLabError as error:
...     print(error.code, "-", error)
refused - the model draws at random; call model.eval() first
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class SrdLabError(Exception):
    """What was wrong, what was expected, and what to do: one line, shown to the user as it stands.

    code : the kind of error, a word that stays when the sentence is reworded.
    """

    code: ClassVar[str]


class BadValue(SrdLabError):
    """A parameter or an option is out of range, or names what is not there."""

    code = "value"


class BadInput(SrdLabError):
    """Images, maps or targets are of a wrong type, shape, range or number."""

    code = "input"


class Refused(SrdLabError):
    """The network does what this method cannot follow, or is in a state in which it cannot be followed."""

    code = "refused"


class Leak(Refused):
    """More or less relevance arrived than started, or FullGrad's terms miss the logit, by more than rounding."""

    code = "leak"


class BadData(SrdLabError):
    """Files of a data set are missing, damaged or contradict each other."""

    code = "data"


class BadWeights(SrdLabError):
    """Weights are missing, damaged, or not of this network or of these classes."""

    code = "weights"


class StoreTrouble(SrdLabError):
    """The tracking store cannot be used, or a folder cannot be written."""

    code = "store"


class BadRun(SrdLabError):
    """A stored run is not there, is damaged, or was made by something else."""

    code = "run"


class OtherWork(BadRun):
    """What is stored in a run is not of the work to do: going on with it makes no sense, and leaves it as it was."""


class BadEntry(SrdLabError):
    """An entry of the standard evaluation cannot be read, does not verify, or measures something else."""

    code = "entry"


class NoGradient(SrdLabError):
    """A method whose map has no gradient was attacked by gradients."""

    code = "gradient"


class Unavailable(SrdLabError):
    """A package, a device, a download or memory is not to be had here."""

    code = "unavailable"


class SrdLabWarning(UserWarning):
    """What a user should know of a result: one line, shown once."""


def meant(name: str, known: Iterable[str]) -> str:
    """What to add to an error about a name that is not known: the one that it looks like; empty where there is none.

    Example
    -------
    >>> meant("gradcan", ["srd", "gradcam"]), meant("nothing", ["srd"])
    ("; did you mean 'gradcam'?", '')
    """
    near = get_close_matches(name.casefold(), list(known), n=1, cutoff=0.75)
    return f"; did you mean {near[0]!r}?" if near else ""


def first_line(error: BaseException, most: int = 200) -> str:
    """What another library's error says, in one line of at most ``most`` characters; its kind where it says nothing.

    Example
    -------
    >>> first_line(ValueError("cut off\\nat line 3")), first_line(EOFError())
    ('cut off', 'EOFError')
    """
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= most else line[: most - 3] + "..."
