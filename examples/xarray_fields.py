"""A Dataset over fields that xarray opens: NetCDF, GRIB or, with zarr installed, a zarr store.

Train a network on it by its import path, on any grid of ranks, without shards:

    PYTHONPATH=examples mpirun -np 4 python -m mpi4py -m hpc_bnn train --grid.sample_size 2 --config configs/digits.yaml \
        --data.dataset xarray_fields.Forecast --data.arguments '{path: era5.nc, variable: t2m, lead: 6, every: 4}' \
        --model.arguments '{hidden: [64]}' --run_dir runs/fields

Each example is read from the store when a batch needs it. Chunks of one time each are read fastest.
"""

import numpy as np
import torch
import xarray
from torch.utils.data import Dataset


class Forecast(Dataset):
    """A field [latitudes x longitudes] as input, and its mean some steps later as target.

    Parameters
    ----------
    split : {"train", "test"}
        The first four fifths of the times, or the rest; no pair of times crosses the border.
    path, variable : str
        Store and variable [time, latitude, longitude].
    lead, every : int
        Steps of time from input to target; take every so many points of a field.
    """

    def __init__(self, split: str, path: str, variable: str, lead: int = 1, every: int = 1):
        self._field, self._lead = xarray.open_dataset(path)[variable][:, ::every, ::every], lead
        border = len(self._field) * 4 // 5
        train = self._field[:border].values.astype(np.float64)
        self._mean, self._std = float(train.mean()), float(train.std())
        times = {"train": range(border - lead), "test": range(border, len(self._field) - lead)}
        self._times = times[split]

    def __len__(self) -> int:
        return len(self._times)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        time = self._times[index]
        now, later = (
            torch.from_numpy(
                (self._field[step].values.astype(np.float64) - self._mean) / self._std
            ).float()  # in this order
            for step in (time, time + self._lead)
        )
        return now.flatten(), later.mean().view(1)
