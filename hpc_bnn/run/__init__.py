"""Runs: training by a config, checkpoints, exported predictions, plots and reports."""

from .. import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "check": "train",
        "CheckpointStore": "checkpoint",
        "connect_grid": "experiment",
        "Experiment": "experiment",
        "predict_run": "export",
        "read_or_prepare": "experiment",
        "Run": "train",
        "shown_examples": "plotted_examples",
        "StopRequest": "train",
        "write_plots": "plots",
        "write_report": "report",
    },
)
