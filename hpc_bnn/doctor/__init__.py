"""Facts of the ranks of a job, tests of their sums, problems and remedies."""

from .. import door

__getattr__, __dir__, __all__ = door(__name__, {"examination": "examine"})
