"""Training data: HDF5 shards, the order of examples, reading, augmentation (floor 3)."""

from .dataset import ShardDataset
from .loader import Batch, BatchLoader
from .manifest import ArraySpec, Manifest, Statistics
from .order import epoch_order, global_batches, num_global_batches
from .verify import verify_shards
from .writer import Examples, write_shards

__all__ = [
    "ArraySpec",
    "Batch",
    "BatchLoader",
    "Examples",
    "Manifest",
    "ShardDataset",
    "Statistics",
    "epoch_order",
    "global_batches",
    "num_global_batches",
    "verify_shards",
    "write_shards",
]
