"""The predictive of the whole ensemble, and its metrics."""

from .evaluation import (
    ClassPredictive,
    Evaluation,
    ValuePredictive,
    evaluate_dataset,
    out_of_distribution_auroc,
    predict_classes,
    predict_dataset,
    predict_values,
)

__all__ = [
    "ClassPredictive",
    "Evaluation",
    "ValuePredictive",
    "evaluate_dataset",
    "out_of_distribution_auroc",
    "predict_classes",
    "predict_dataset",
    "predict_values",
]
