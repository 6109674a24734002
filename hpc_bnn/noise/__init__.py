"""Keyed random numbers: noise belongs to its key, never to a rank, a time or a device."""

from .keys import GENERATOR, Clock, Key, Stream
from .segments import Segments, from_host

__all__ = ["GENERATOR", "Clock", "Key", "Segments", "Stream", "from_host"]
