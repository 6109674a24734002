"""Training data: HDF5 shards, the order of examples, reading, augmentation."""

from .augment import Augmentation
from .dataset import ShardDataset
from .loader import Batch, BatchLoader
from .manifest import ArraySpec, Manifest, Statistics
from .order import EpochOrder, global_batches, num_global_batches
from .source import DatasetSource, GlobalBatchSampler, Source, StreamSource, TensorSource, as_source
from .stage import Staged, stage_shards, unstage_shards, verify_shards
from .writer import Examples, write_shards

__all__ = [
    "ArraySpec", "Augmentation", "Batch", "BatchLoader", "DatasetSource", "EpochOrder", "Examples",
    "GlobalBatchSampler", "Manifest", "ShardDataset", "Source", "Staged", "Statistics", "StreamSource", "TensorSource",
    "as_source", "global_batches", "num_global_batches", "stage_shards", "unstage_shards", "verify_shards",
    "write_shards",
]  # fmt: skip
