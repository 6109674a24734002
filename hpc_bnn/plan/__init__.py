"""Memory, time and communication of every grid, before a job runs."""

from .. import door

__getattr__, __dir__, __all__ = door(
    __name__, {"plan": "ASSUMED_BETWEEN ASSUMED_WITHIN describe plan_here", "simulate": "rehearse"}
)
