"""The predictive of the whole ensemble, and its metrics."""

from .evaluation import (
    Block,
    ClassPredictive,
    Evaluation,
    ValuePredictive,
    block_size,
    evaluate_dataset,
    member_outputs,
    metrics_to_minimise,
    out_of_distribution_auroc,
    predict_classes,
    predict_dataset,
    predict_values,
    score_dataset,
    uncertainties_of_dataset,
)

__all__ = [
    "Block",
    "ClassPredictive",
    "Evaluation",
    "ValuePredictive",
    "block_size",
    "evaluate_dataset",
    "member_outputs",
    "metrics_to_minimise",
    "out_of_distribution_auroc",
    "predict_classes",
    "predict_dataset",
    "predict_values",
    "score_dataset",
    "uncertainties_of_dataset",
]
