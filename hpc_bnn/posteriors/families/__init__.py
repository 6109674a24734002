"""Families of posteriors: mathematics over slots."""

from .base import Family, Scalars, Slot, Slots
from .ensemble import Ensemble
from .low_rank import LowRank
from .mean_field import MeanField
from .points import Dropout, Point

__all__ = ["Dropout", "Ensemble", "Family", "LowRank", "MeanField", "Point", "Scalars", "Slot", "Slots"]
