"""Runs: training by a config, checkpoints, exported predictions, plots and reports."""

from .. import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "calibrate": "calibrate_run read_calibration",
        "checkpoint": "CheckpointStore",
        "experiment": "Experiment check_same_start connect_grid read_or_prepare",
        "inference_data": "to_arviz",
        "export": "predict_run verify_predictions",
        "plots": "write_plots",
        "plotted_examples": "shown_examples",
        "predictor": "Predictor load",
        "report": "write_report",
        "train": "Run StopRequest",
    },
)
