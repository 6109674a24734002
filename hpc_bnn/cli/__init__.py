"""The command line: parsing and calling, nothing else."""

from .commands import main

__all__ = ["main"]
