"""The predictive of the whole ensemble, and its metrics."""

from .calibration import (
    INTERVALS,
    NOISE_FACTORS,
    SETS,
    TEMPERATURES,
    Calibration,
    calibrate_dataset,
    check_methods,
    log_of,
)
from .checked_weights import check_up, mean_network
from .evaluation import (
    Block,
    Evaluation,
    block_size,
    evaluate_dataset,
    metrics_to_minimise,
    out_of_distribution_metrics,
    predict_dataset,
    score_dataset,
    uncertainties_of_dataset,
)
from .groups import REFERENCES, Group, check_references, find_groups, parse_regions
from .predictive import (
    ClassPredictive,
    Predictive,
    ValuePredictive,
    is_of_classes,
    member_outputs,
    predict_classes,
    predict_values,
)

__all__ = [
    "INTERVALS", "NOISE_FACTORS", "REFERENCES", "SETS", "TEMPERATURES", "Block", "Calibration", "ClassPredictive", "Evaluation", "Group", "Predictive", "ValuePredictive", "block_size", "calibrate_dataset",
    "check_methods", "check_references", "check_up", "evaluate_dataset", "find_groups", "is_of_classes", "log_of", "mean_network", "member_outputs", "metrics_to_minimise", "out_of_distribution_metrics", "parse_regions", "predict_classes", "predict_dataset", "predict_values",
    "score_dataset", "uncertainties_of_dataset",
]  # fmt: skip
