"""Training data: HDF5 shards and the order of examples (floor 3)."""

from .order import epoch_order, global_batches
from .shards import ArraySpec, Manifest, ShardDataset, verify_shards, write_shards

__all__ = [
    "ArraySpec",
    "Manifest",
    "ShardDataset",
    "epoch_order",
    "global_batches",
    "verify_shards",
    "write_shards",
]
