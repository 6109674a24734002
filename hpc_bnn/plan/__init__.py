"""Memory, time and communication of every grid, before a job runs."""

from .. import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "ASSUMED_BETWEEN": "plan",
        "ASSUMED_WITHIN": "plan",
        "describe": "plan",
        "plan_here": "plan",
        "rehearse": "simulate",
    },
)
