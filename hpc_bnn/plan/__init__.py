"""Memory, time and communication of every grid, before a job runs."""

from .. import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "costs": "Costs write_costs",
        "plan": "ASSUMED_BETWEEN ASSUMED_WITHIN describe measure_here plan_here",
        "simulate": "rehearse",
    },
)
