"""What a user can set, one dataclass per room, one sentence and unit per field."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError, Fault


@dataclass
class GridConfig:
    """The process grid; the data axis takes the ranks that the sample axis leaves."""

    sample_size: int | Literal["auto"] = 1
    """Ranks along the sample axis; must divide the number of ranks of the job. auto: measured at the start, as
    `hpc-bnn plan` does."""
    reduction: Literal["axes", "world"] = "axes"
    """Sum gradients over the sample group and then the data group (axes), or over all ranks at once (world)."""
    compression: Literal["none", "fp16", "bf16"] = "none"
    """Send gradients in half the bytes, rounded to 11 bits of a scaled float16 or to 8 of bfloat16; results then depend
    on the grid to that rounding."""
    overlap: bool = False
    """Sum the gradient in parts while the last backward pass of a step still runs, over all ranks at once. It pays where
    ranks wait for the network."""


@dataclass
class DataConfig:
    """Where the training data are."""

    shards: str = "data/digits"
    """Shard directory with a manifest.json."""
    prepare: str | None = None
    """Script that writes these shards where they are missing, called once with --output SHARDS; not used
    when the command line names other shards."""
    train_split: str = "train"
    """Name of the split to train on."""
    test_split: str = "test"
    """Name of the held-out split."""
    reading: Literal["auto", "node", "group", "rank"] = "auto"
    """node: read once into memory that the ranks of a node share; group: one rank of a sample group reads each batch
    for all; rank: each reads its own; auto: node where the data fit, otherwise group."""
    prefetch: int = 2
    """Batches read ahead by a thread, from files or on the way to a GPU."""
    drop_last: bool = False
    """Leave out the last, smaller batch of an epoch; kept, it is exact as well."""


@dataclass
class AugmentationConfig:
    """Random changes of the inputs in training."""

    transforms: list[dict[str, Any]] = field(default_factory=list)
    """In order, such as [{name: crop, padding: 4}, {name: flip}]: crop, flip, erase, mask, noise, mixup, or the import
    path of your own, with arguments."""
    views: Literal["per_sample", "per_group", "shared"] = "per_sample"
    """Whether each sample sees its own view of a batch, each group of samples, or all the same."""
    num_groups: int = 2
    """Groups of samples with a view each, for per_group."""


@dataclass
class ModelConfig:
    """The network, an ordinary nn.Module."""

    name: str = "hpc_bnn.models.MLP"
    """Import path of the class; it is called with in_shape, num_outputs and arguments, and with places (extents of
    the targets behind their channels) where it takes them."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the class."""
    pretrained: str | None = None
    """File with a state_dict of the network (torch.save) to start from."""


@dataclass
class PosteriorConfig:
    """The variational family and its prior."""

    family: Literal["mean_field", "low_rank", "mc_dropout", "ensemble", "deterministic"] = "mean_field"
    """Gaussian with independent weights or low-rank covariance, dropout masks, networks, or one network."""
    prior: Literal["gaussian", "laplace", "student_t", "scale_mixture"] = "gaussian"
    """Prior of each weight; the KL has a closed form for the first two and is a Monte Carlo one otherwise."""
    prior_std: float | Literal["fan_in"] = 1.0
    """Scale of the prior (units of the weight), or fan_in: 1/sqrt(fan-in) of each weight matrix."""
    prior_mean: float | Literal["initial"] = 0.0
    """Mean of a Gaussian or Laplace prior (units of the weight); initial: the weights at the start."""
    prior_df: float = 3.0
    """Degrees of freedom of a Student-t prior."""
    prior_narrow_std: float = 0.1
    """Second, narrow standard deviation of a scale mixture (units of the weight)."""
    prior_fraction: float = 0.5
    """Weight of the wide part of a scale mixture, between 0 and 1."""
    init_std: float = 0.01
    """Standard deviation of each weight at the start (units of the weight)."""
    init_std_relative: float | None = None
    """Instead of init_std: as this fraction of the weight's magnitude (MOPED, for pretrained networks)."""
    deterministic: list[str] = field(default_factory=lambda: ["norm", "embedding"])
    """Weights that stay points: norm, embedding, or patterns of parameter names such as head.*"""
    estimator: Literal["reparameterisation", "local", "flipout"] = "reparameterisation"
    """One draw of the weights per sample, or noise per example (less variance) where layers allow it."""
    antithetic: bool = False
    """Draw samples 2i and 2i+1 with opposite noise."""
    rank: int = 4
    """Rank of the covariance factor of the low_rank family."""


@dataclass
class LikelihoodConfig:
    """What the network's outputs say about a target."""

    name: Literal["auto", "categorical", "bernoulli", "gaussian", "student_t", "poisson", "implicit"] = "auto"
    """Distribution of a target; auto: implicit for the objectives crps and energy, otherwise categorical for classes
    and gaussian for numbers."""
    scale: float | Literal["learned", "heteroscedastic"] = "heteroscedastic"
    """Scale of gaussian and student_t: a number (units of the targets, normalised where the shards have their
    statistics), one learned per target, or an output of the network."""
    init_scale: float = 1.0
    """Start of a learned scale (in the same units)."""
    df: float = 4.0
    """Degrees of freedom of student_t."""


@dataclass
class ObjectiveConfig:
    """How the samples of the whole job make one data term."""

    name: str = "elbo"
    """elbo, log_predictive (the direct loss), moment_matched, crps, energy, or the import path of your own."""
    fairness: float = 0.95
    """Of crps and energy to the finite number of samples: 0 the ordinary score, 1 the fair, 0.95 almost fair."""
    beta: float = 1.0
    """Exponent of the energy score, above 0 and below 2; other than 1 is the beta-energy score."""
    weights: str | None = "auto"
    """Weights of the targets in crps and energy: auto takes those of the shards where they have any (such as
    cos(latitude)), null none, a file (.npy) its array, such as [latitudes, 1]."""


@dataclass
class KlAnnealingConfig:
    """How the factor of the KL comes up to kl_weight."""

    schedule: Literal["constant", "linear", "cosine", "cyclical"] = "constant"
    """constant: from the start; linear or cosine: up from 0; cyclical: up from 0 again and again."""
    num_epochs: float = 10.0
    """Epochs until kl_weight is reached; of cyclical: length of a cycle, which rises for its first half."""


@dataclass
class OptimizerConfig:
    """The optimizer and its learning rate."""

    name: str = "Adam"
    """Class of torch.optim, such as Adam, AdamW or SGD, or the import path of another."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the class, such as {momentum: 0.9}."""
    learning_rate: float = 1e-3
    """Learning rate after the warm-up."""
    warmup_epochs: float = 0.0
    """Epochs in which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Course of the learning rate over num_epochs; cosine ends at 0; step: times decay every decay_every_epochs."""
    decay: float = 0.1
    """Factor of a step of the learning rate."""
    decay_every_epochs: float = 30.0
    """Epochs between steps of the learning rate."""
    max_gradient_norm: float | None = None
    """Scale the gradient of the job down to this norm where it is larger."""
    sharded: bool = False
    """Divide the optimizer's state over the ranks of the sample group (ZeRO stage 1): less memory, the same numbers."""


@dataclass
class CheckpointConfig:
    """When the state of the run is written, and how much of it is kept."""

    every_epochs: int = 1
    """Write after so many epochs; at the end and when the run is stopped in any case."""
    every_steps: int | None = None
    """Write after so many steps besides, within an epoch."""
    keep_last: int = 2
    """Newest checkpoints to keep; the best one stays besides."""
    metric: str = "auto"
    """Metric of the evaluation that makes a checkpoint the best, less is better; auto: test/nll or test/rmse."""
    asynchronous: bool = False
    """Write in a thread while training goes on, from a copy in memory."""


@dataclass
class EarlyStoppingConfig:
    """When a run ends before num_epochs because it no longer improves."""

    patience: int | None = None
    """Evaluations without improvement after which the run ends; null: never."""
    min_change: float = 0.0
    """Least change of the metric (that of the checkpoints) that counts as an improvement."""


@dataclass
class Config:
    """A training run."""

    run_dir: str = "runs/default"
    """Directory of everything that the run writes; a former run there is moved aside."""
    seed: int = 0
    """Key of all random numbers of the run; with the config it fixes the result, on every grid."""
    dtype: Literal["float64", "float32", "bfloat16"] = "float32"
    """Precision; bfloat16 runs the network under autocast and keeps weights and sums in float32."""
    device: str = "auto"
    """auto, cpu, cuda (one GPU per rank of a node) or cuda:N."""
    backend: Literal["auto", "horovod", "torch"] = "auto"
    """What carries tensors between ranks: Horovod, torch.distributed (NCCL or Gloo), or auto: Horovod where all ranks
    can use it, otherwise torch."""
    num_samples: int = 8
    """Weight samples per step in the whole job."""
    num_test_samples: int = 64
    """Weight samples of the predictive in the whole job."""
    chunk_size: int | Literal["auto"] = "auto"
    """Samples that a rank evaluates at once; memory grows with it. auto: 1 on a CPU, measured on a GPU."""
    global_batch_size: int = 128
    """Examples per step in the whole job."""
    num_epochs: int = 10
    """Passes over the training split."""
    max_seconds: float | None = None
    """Stop with a checkpoint and exit code 75 when the run has taken so long (seconds)."""
    resume: bool = False
    """Go on from the newest sound checkpoint in run_dir, on any grid; without one begin."""
    max_steps: int | None = None
    """Stop after so many optimizer steps, wherever the epoch is; the learning rate keeps its course."""
    tensorboard: bool = False
    """Write the metrics of each epoch for TensorBoard, too, to run_dir/tensorboard."""
    test_every_epochs: int = 10
    """Evaluate on the held-out split after so many epochs, and at the end."""
    kl_weight: float = 1.0
    """Factor of the KL; 1 is Bayes, below 1 a cold posterior."""
    kl_annealing: KlAnnealingConfig = field(default_factory=KlAnnealingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    posterior: PosteriorConfig = field(default_factory=PosteriorConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain dicts."""
        return asdict(self)

    def check(self) -> None:
        """Check the values, each by itself. Local.

        Raises
        ------
        ConfigError
            With all faults together; the same on each rank.
        """
        faults = [
            Fault(f"--{name}", value, f"must be {rule}", remedy)
            for name, value, fits, rule, remedy in self._rules()
            if not fits
        ]
        if faults:
            raise ConfigError(*faults)

    def _rules(self):
        """Yield (flag, value, whether it fits, rule, remedy)."""
        yield "run_dir", repr(self.run_dir), self.run_dir.strip() != "", "a path", "Try runs/NAME"
        for name in (
            "num_test_samples",
            "global_batch_size",
            "num_epochs",
            "test_every_epochs",
        ):
            value = getattr(self, name)
            yield name, value, value >= 1, "at least 1", "Give a positive number"
        if self.max_steps is not None:
            yield "max_steps", self.max_steps, self.max_steps >= 1, "at least 1", "Leave it out for no limit"
        yield (
            "kl_weight",
            self.kl_weight,
            0 <= self.kl_weight < math.inf,
            "0 or more and finite",
            "1 is Bayes",
        )
        yield from self._objective_rules()
        groups, samples = self.augmentation.num_groups, self.num_samples
        fits = self.augmentation.views != "per_group" or 1 <= groups <= samples
        yield "augmentation.num_groups", groups, fits, f"between 1 and num_samples, {samples}", "Try 2"
        yield "data.prefetch", self.data.prefetch, self.data.prefetch >= 0, "0 or more", "Try 2"
        scales = ("prior_std", "prior_df", "prior_narrow_std", "init_std", "init_std_relative")
        for name in scales:
            value = getattr(self.posterior, name)
            fits = value in (None, "fan_in") or 0 < value < math.inf
            yield f"posterior.{name}", value, fits, "positive and finite", "Try 0.1"
        fraction = self.posterior.prior_fraction
        yield "posterior.prior_fraction", fraction, 0 < fraction < 1, "between 0 and 1", "Try 0.5"
        yield "posterior.rank", self.posterior.rank, self.posterior.rank >= 1, "at least 1", "Try 4"
        chunk = self.chunk_size
        yield "chunk_size", chunk, chunk == "auto" or chunk >= 1, "auto or at least 1", "Try auto"
        posterior, family = self.posterior, self.posterior.family
        if posterior.prior == "scale_mixture":
            std = posterior.prior_std
            yield "posterior.prior_std", std, std != "fan_in", "a number for scale_mixture", "Try 1.0"
        if posterior.prior in ("scale_mixture", "student_t"):
            mean = posterior.prior_mean
            yield (
                "posterior.prior_mean",
                mean,
                mean == 0,
                f"0 for the {posterior.prior} prior",
                "Use gaussian",
            )
        if posterior.estimator != "reparameterisation":
            fits = (
                family == "mean_field"
                and posterior.prior in ("gaussian", "laplace")
                and not posterior.antithetic
            )
            rule = (
                "reparameterisation unless mean_field, with a gaussian or laplace prior, and not antithetic"
            )
            yield "posterior.estimator", posterior.estimator, fits, rule, "Use reparameterisation"
        if family == "ensemble":
            name = self.objective.name
            yield (
                "objective.name",
                name,
                name == "elbo",
                "elbo for an ensemble: members train alone",
                "Use elbo",
            )
        if family in ("mc_dropout", "ensemble"):
            std = self.posterior.prior_std
            yield "posterior.prior_std", std, std != "fan_in", f"a number for {family}", "Try 1.0"
        if family == "ensemble":
            tests, members = self.num_test_samples, self.num_samples
            yield (
                "num_test_samples",
                tests,
                tests == members,
                f"num_samples, {members}: the members",
                "Set both",
            )
        yield from self._overlap_rules()
        yield from self._optimizer_rules()
        yield from self._checkpoint_rules()

    def _overlap_rules(self):
        grid, posterior = self.grid, self.posterior
        if not grid.overlap:
            return
        for name, value, others in (
            ("grid.compression", grid.compression, ("none",)),
            ("optimizer.sharded", str(self.optimizer.sharded).lower(), ("false",)),
            ("posterior.family", posterior.family, ("mean_field", "mc_dropout", "deterministic")),
            ("posterior.estimator", posterior.estimator, ("reparameterisation",)),
            ("posterior.prior", posterior.prior, ("gaussian", "laplace")),
        ):
            matters = name != "posterior.prior" or posterior.family == "mean_field"
            rule = f"{' or '.join(others)} with --grid.overlap true"
            yield name, value, value in others or not matters, rule, "Leave one of the two out"

    def _optimizer_rules(self):
        optimizer = self.optimizer
        for name, example in (("learning_rate", 1e-3), ("decay", 0.1), ("decay_every_epochs", 30)):
            value = getattr(optimizer, name)
            yield f"optimizer.{name}", value, 0 < value < math.inf, "positive and finite", f"Try {example}"
        value = optimizer.warmup_epochs
        rule = f"0 or more and below num_epochs, {self.num_epochs}"
        yield "optimizer.warmup_epochs", value, 0 <= value < max(self.num_epochs, 1), rule, "Try 0"
        norm = optimizer.max_gradient_norm
        fits = norm is None or 0 < norm < math.inf
        yield "optimizer.max_gradient_norm", norm, fits, "positive and finite", "Try 1.0, or leave it out"

    def _checkpoint_rules(self):
        for group, name in (
            ("checkpoint", "every_epochs"),
            ("checkpoint", "every_steps"),
            ("checkpoint", "keep_last"),
            ("early_stopping", "patience"),
        ):
            value = getattr(getattr(self, group), name)
            yield f"{group}.{name}", value, value is None or value >= 1, "at least 1", "Try 1"
        seconds = self.max_seconds
        yield "max_seconds", seconds, seconds is None or seconds > 0, "positive", "Leave it out for no limit"

    def _objective_rules(self):
        objective, likelihood = self.objective, self.likelihood
        names = ("elbo", "log_predictive", "moment_matched", "crps", "energy")
        yield (
            "objective.name",
            objective.name,
            objective.name in names or "." in objective.name,
            f"one of {', '.join(names)}, or package.module.name",
            "Try elbo",
        )
        yield (
            "objective.fairness",
            objective.fairness,
            0 <= objective.fairness <= 1,
            "between 0 and 1",
            "Try 0.95",
        )
        yield "objective.beta", objective.beta, 0 < objective.beta < 2, "above 0 and below 2", "Try 1"
        if objective.name in ("crps", "energy"):
            rule = f"implicit for {objective.name}, which scores predictions of numbers, not classes"
            yield (
                "likelihood.name",
                likelihood.name,
                likelihood.name in ("auto", "implicit"),
                rule,
                "Use --likelihood.name implicit",
            )
            fits = self.num_samples > 1 or objective.fairness == 0
            yield "num_samples", self.num_samples, fits, "2 or more for pairs", "Or --objective.fairness 0"
        elif objective.name in names and objective.weights not in ("auto", None):
            yield (
                "objective.weights",
                objective.weights,
                False,
                f"left out for {objective.name}",
                "Use crps or energy",
            )
        elif objective.name in names and likelihood.name == "implicit":
            yield (
                "likelihood.name",
                "implicit",
                False,
                f"one with a density for {objective.name}",
                "Try gaussian",
            )
        scale = likelihood.scale
        fits = isinstance(scale, str) or 0 < scale < math.inf
        yield "likelihood.scale", scale, fits, "positive and finite", "Try 1.0 or heteroscedastic"
        for name in ("init_scale", "df"):
            value = getattr(likelihood, name)
            yield f"likelihood.{name}", value, 0 < value < math.inf, "positive and finite", "Try 1.0"
        value = self.kl_annealing.num_epochs
        yield "kl_annealing.num_epochs", value, 0 < value < math.inf, "positive and finite", "Try 10"


def config_of_run(run_dir: str | Path) -> Path:
    """Return the path of RUN_DIR/config.yaml. Local.

    Raises
    ------
    ConfigError
        It is not there: the directory holds no run.
    """
    path = Path(run_dir, "config.yaml")
    if not path.exists():
        remedy = "Name the --run_dir of hpc-bnn train"
        raise ConfigError(Fault("RUN_DIR", run_dir, f"it holds no run (no {path.name})", remedy))
    return path


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the nested dicts of a config as one, with dotted names; arguments of users' classes stay dicts."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        is_group = isinstance(value, dict) and name != "arguments"
        flat |= flatten(value, f"{prefix}{name}.") if is_group else {prefix + name: value}
    return flat
