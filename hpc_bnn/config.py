"""Fields that a user can set: one dataclass per room; one sentence, unit and rule per field; and their vocabularies."""

from __future__ import annotations

import functools
import json
import math
import operator
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import yaml

from .capabilities import FAMILIES, Features, check_features
from .errors import ConfigError, Fault, Rule, above_and_below, at_least, check_all, number, positive

Auto = Literal["auto"]
SampleSize = Literal[Auto, "max"]
Library = Literal["horovod", "torch", "mpi"]
Backend = Literal[Auto, Library]
Batching = Literal["auto", "walking", "vmap"]
Capture = Literal["auto", "on", "off"]
Compression = Literal["none", "fp16", "bf16"]
Dtype = Literal["float64", "float32", "bfloat16"]
Estimator = Literal["reparameterisation", "local", "flipout"]
Float32Precision = Literal["ieee", "tf32"]
Family = Literal["mean_field", "low_rank", "mc_dropout", "ensemble", "deterministic"]
KlSchedule = Literal["constant", "linear", "cosine", "cyclical"]
LearningRateSchedule = Literal["constant", "cosine", "step"]
LikelihoodName = Literal["auto", "categorical", "bernoulli", "gaussian", "student_t", "poisson", "implicit"]
LikelihoodScale = float | Literal["learned", "heteroscedastic"]
PriorMean = float | Literal["initial"]
PriorName = Literal["gaussian", "laplace", "student_t", "scale_mixture"]
PriorScale = float | Literal["fan_in"]
"""A number, or fan_in: 1 / sqrt(fan-in) per weight matrix, 1 for vectors (Neal, 1996: a proper limit of infinite width)."""
Reading = Literal["auto", "node", "group", "rank"]
Reduction = Literal["axes", "world", "shares", "auto"]
Scaling = Literal["temperature", "vector"]
Score = Literal["crps", "energy"]
SetScore = Literal["threshold", "aps", "raps"]
"""Objectives that score members: they need the implicit likelihood, and pairs of samples."""
ObjectiveName = Literal["elbo", "log_predictive", "moment_matched", Score]
ViewKind = Literal["per_sample", "per_group", "shared"]


def _ruled(default: Any, rule: Rule) -> Any:
    return field(default=default, metadata={"rule": rule})


def _named(default: str, words: Any) -> Any:
    """Return a field that takes words, or the import path of something of the user's."""
    names = get_args(words)
    rule = f"one of {', '.join(names)}, or package.module.name"
    return _ruled(default, Rule(lambda name: name in names or "." in str(name), rule, f"Try {default}"))


@dataclass
class GridConfig:
    """The process grid; the data axis takes the ranks that the sample axis leaves."""

    sample_size: int | SampleSize = 1
    """Ranks along the sample axis; must divide the number of ranks of the job. auto: hpc_bnn measures the grids at
    the start, as `hpc-bnn plan` does. max: as many as there are samples for."""
    reduction: Reduction = "auto"
    """Sum gradients over the sample group and then the data group (axes), or over all ranks at once (world), or so that
    each rank of a sample group sums its share of them over the data group (shares), which sends fewer bytes between nodes.
    auto: shares on several nodes, for sums of 1 MiB and more; otherwise axes."""
    compression: Compression = "none"
    """Send gradients in half the bytes, rounded to 11 bits (scaled float16) or 8 bits (bfloat16); results on two
    grids then agree only to that rounding."""
    overlap: bool = False
    """Sum the gradient in buckets while the last backward pass of a step still runs, over all ranks at once. Use it
    if ranks wait for the network."""


@dataclass
class DataConfig:
    """The training data, and how the ranks read them."""

    shards: str = "data/digits"
    """Shard directory with a manifest.json."""
    dataset: str | None = None
    """Import path of a class or function that gives the data instead of shards: called with split and arguments, it
    returns a torch Dataset of pairs (x, y), tensors (x, y), or an hpc_bnn.Source."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the dataset."""
    prepare: str | None = None
    """Script that writes these shards if they are missing, called once with --output SHARDS; not used if the command
    line names other shards."""
    train_split: str = "train"
    """Name of the split to train on."""
    test_split: str = "test"
    """Name of the held-out split."""
    validation_split: str | None = "auto"
    """Name of the split that chooses the best checkpoint and ends a run early; the test split then stays unseen until the
    end. auto: validation, if the shards have it; null: the test split does it."""
    reading: Reading = "auto"
    """node: the ranks of a node read the data once into common memory; group: one rank of a sample group reads each
    batch for all; rank: each rank reads its own examples; auto: node if the data fit, otherwise group."""
    prefetch: int = _ruled(2, at_least(0, "Try 2"))
    """Number of batches that a thread reads ahead, from files or on the way to a GPU."""
    shuffle_window: int | None = _ruled(None, at_least(1, "Try 100000"))
    """Shuffle within windows of so many examples that are stored one after another, and the windows among each other:
    many files are then read a few at a time. By default over the whole split."""
    drop_last: bool = False
    """Leave out the last, smaller batch of an epoch; if it is kept, its gradient is exact, too."""


@dataclass
class AugmentationConfig:
    """Random changes of the inputs in training."""

    transforms: list[dict[str, Any]] = field(default_factory=list)
    """In order, such as [{name: crop, padding: 4}, {name: flip}]: crop, flip, erase, mask, noise, mixup, or the import
    path of your own, with arguments."""
    views: ViewKind = "per_sample"
    """Each sample gets its own view of a batch (per_sample), each group of samples does (per_group), or all samples
    get the same view (shared)."""
    num_groups: int = 2
    """Number of groups of samples for per_group; each group gets its own view."""


@dataclass
class ModelConfig:
    """The network, an ordinary nn.Module."""

    name: str = "hpc_bnn.models.MLP"
    """Import path of the class. hpc_bnn calls it with in_shape, num_outputs and arguments, and with target_shape
    (spatial shape of the targets) if the class accepts it."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the class."""
    output: str | int | None = None
    """Which tensor the likelihood gets if the network returns a dict, a tuple or an object: a key or attribute such as
    logits, or a place such as 0."""
    checkpoint_layers: list[str] = field(default_factory=list)
    """Layers that keep their inputs only and run once more in the backward pass, as patterns of their names such as
    blocks.*: less memory, more time, the same numbers."""
    pretrained: str | None = None
    """File with a state_dict of the network (torch.save) to start from."""


@dataclass
class PosteriorConfig:
    """The variational family and its prior."""

    family: str = _named("mean_field", Family)
    """Gaussian with independent weights (mean_field) or low-rank covariance (low_rank), dropout masks (mc_dropout), an
    ensemble of networks, one deterministic network, or the import path of your own hpc_bnn.Family."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of your own family."""
    prior: PriorName = "gaussian"
    """Prior of each weight; the KL has a closed form for the first two, otherwise it is a Monte Carlo estimate."""
    prior_std: PriorScale = _ruled(1.0, positive("Try 0.1"))
    """Scale of the prior (units of the weight), or fan_in: 1/sqrt(fan-in) of each weight matrix."""
    prior_mean: PriorMean = _ruled(0.0, number(math.isfinite, "a finite number or initial", "Try 0.0"))
    """Mean of a Gaussian or Laplace prior (units of the weight); initial: the weights at the start."""
    prior_df: float = _ruled(3.0, positive("Try 3.0"))
    """Degrees of freedom of a Student-t prior."""
    prior_narrow_std: float = _ruled(0.1, positive("Try 0.1"))
    """Second, narrow standard deviation of a scale mixture (units of the weight)."""
    prior_fraction: float = _ruled(0.5, above_and_below(0, 1, "Try 0.5"))
    """Weight of the wide component of a scale mixture, between 0 and 1."""
    init_std: float = _ruled(0.01, positive("Try 0.1"))
    """Standard deviation of each weight at the start (units of the weight)."""
    init_std_relative: float | None = _ruled(None, positive("Try 0.1"))
    """Instead of init_std: this fraction of the weight's magnitude (MOPED, for pretrained networks)."""
    deterministic: list[str] = field(default_factory=lambda: ["norm", "embedding"])
    """Weights that stay points: norm, embedding, or patterns of parameter names such as head.*"""
    estimator: Estimator = "reparameterisation"
    """One draw of the weights per sample (reparameterisation), or noise per example (local, flipout: less variance)
    in the layers that allow it."""
    antithetic: bool = False
    """Draw samples 2i and 2i+1 with opposite noise."""
    rank: int = _ruled(4, at_least(1, "Try 4"))
    """Rank of the covariance factor of the low_rank family."""


@dataclass
class LikelihoodConfig:
    """The distribution of a target given the network's outputs."""

    name: str = _named("auto", LikelihoodName)
    """Distribution of a target: auto, categorical, bernoulli, gaussian, student_t, poisson, implicit, or the import path
    of your own hpc_bnn.Likelihood. auto: implicit for crps and energy, otherwise categorical or gaussian."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of your own likelihood, besides num_targets."""
    scale: LikelihoodScale = _ruled("heteroscedastic", positive("Try 1.0 or heteroscedastic"))
    """Scale of gaussian and student_t: a number (units of the targets, normalised if the shards have their
    statistics), learned (one per target), or heteroscedastic (an output of the network)."""
    init_scale: float = _ruled(1.0, positive("Try 1.0"))
    """Initial value of a learned scale (in the same units)."""
    min_scale: float = _ruled(0.0, at_least(0, "Try 0.01"))
    """Floor of a learned or heteroscedastic scale (in the same units), to which the scale is added: without one, a
    network can be sure without bound of what it has seen. 0: none."""
    df: float = _ruled(4.0, positive("Try 4.0"))
    """Degrees of freedom of student_t."""


@dataclass
class ObjectiveConfig:
    """The data term, computed from the samples of the whole job."""

    name: str = _named("elbo", ObjectiveName)
    """elbo, log_predictive (the direct loss), moment_matched, crps, energy, or the import path of your own."""
    fairness: float = _ruled(0.95, number(lambda value: 0 <= value <= 1, "between 0 and 1", "Try 0.95"))
    """Fairness of crps and energy to the finite number of samples: 0 the ordinary score, 1 the fair, 0.95 almost
    fair."""
    beta: float = _ruled(1.0, above_and_below(0, 2, "Try 1"))
    """Exponent of the energy score, above 0 and below 2; a value other than 1 gives the beta-energy score."""
    weights: str | None = "auto"
    """Weights of the targets in crps and energy. auto: those of the shards, if they have any (such as cos(latitude));
    null: no weights; a file (.npy): its array, such as [latitudes, 1]."""


@dataclass
class KlAnnealingConfig:
    """How the factor of the KL increases to kl_weight."""

    schedule: str = _named("constant", KlSchedule)
    """constant: kl_weight from the start; linear or cosine: increase from 0; cyclical: increase from 0 in every
    cycle; or the import path of a function of your own: from epochs / num_epochs to a multiple of kl_weight."""
    num_epochs: float = _ruled(10.0, positive("Try 10"))
    """Epochs until the factor reaches kl_weight; for cyclical: length of a cycle, in which the factor rises for the
    first half."""
    fraction_of_run: float | None = _ruled(None, number(lambda v: 0 < v <= 1, "above 0 and at most 1", "Try 0.5"))
    """In place of num_epochs: this share of the epochs of the run, such as 0.5; it follows num_epochs of the run."""


@dataclass
class OptimizerConfig:
    """The optimizer and its learning rate."""

    name: str = "Adam"
    """Class of torch.optim, such as Adam, AdamW or SGD, or the import path of another."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the class, such as {momentum: 0.9}."""
    learning_rate: float = _ruled(1e-3, positive("Try 0.001"))
    """Learning rate after the warm-up."""
    warmup_epochs: float = 0.0
    """Epochs in which the learning rate rises from 0."""
    schedule: str = _named("cosine", LearningRateSchedule)
    """Learning rate over num_epochs: constant; cosine ends at 0; step multiplies it by decay every decay_every_epochs;
    or the import path of a function of your own: from the fraction of the epochs after the warm-up, 0 to 1, to a
    multiple of learning_rate."""
    decay: float = _ruled(0.1, positive("Try 0.1"))
    """Factor of a step of the learning rate."""
    decay_every_epochs: float = _ruled(30.0, positive("Try 30"))
    """Epochs between steps of the learning rate."""
    max_gradient_norm: float | None = _ruled(None, positive("Try 1.0, or leave it out"))
    """Scale the gradient of the job down to this norm if it is larger; null: no clipping."""
    sharded: bool = False
    """Divide the optimizer's state over the ranks of the sample group (ZeRO stage 1): less memory, the same numbers."""


@dataclass
class CheckpointConfig:
    """When hpc_bnn writes checkpoints, and how many it keeps."""

    every_epochs: int = _ruled(1, at_least(1, "Try 1"))
    """Write after this number of epochs; hpc_bnn also writes at the end and when the run is stopped."""
    every_steps: int | None = _ruled(None, at_least(1, "Try 1"))
    """In addition, write after this number of steps, within an epoch."""
    every_minutes: float | None = _ruled(None, positive("Try 15, or leave it out"))
    """In addition, write after this time since the last checkpoint, by the clock of rank 0, within an epoch (minutes)."""
    keep_last: int = _ruled(2, at_least(1, "Try 1"))
    """Number of newest checkpoints to keep; hpc_bnn keeps the best one in addition."""
    metric: str = "auto"
    """Metric of the evaluation that selects the best checkpoint, lower is better; auto: nll, or rmse without a density, of
    the validation split, or of the test split where there is none."""
    asynchronous: bool = False
    """A thread writes from a copy in memory while training continues."""


@dataclass
class EarlyStoppingConfig:
    """Ends a run before num_epochs if it no longer improves."""

    patience: int | None = _ruled(None, at_least(1, "Try 1"))
    """Evaluations without improvement after which the run ends; null: never."""
    min_change: float = 0.0
    """Smallest change of the metric of the checkpoints that counts as an improvement."""


@dataclass
class Config:
    """A training run."""

    run_dir: str = _ruled("runs/default", Rule(lambda path: path.strip() != "", "a path", "Try runs/NAME"))
    """Directory of everything that the run writes; hpc_bnn moves a former run there aside, to RUN_DIR.1 and so on."""
    seed: int = 0
    """Key of all random numbers of the run; with the config it fixes the result, on every grid."""
    dtype: Dtype = "float32"
    """Precision; bfloat16 runs the network under autocast and keeps weights and sums in float32."""
    float32_precision: Float32Precision = "ieee"
    """Products of float32 matrices, and convolutions, on a GPU: ieee, or tf32, which is faster and rounds what it multiplies
    to 11 bits; two grids, or devices, then agree only to that rounding."""
    deterministic: bool = False
    """Only operations that give the same bits in every run (torch.use_deterministic_algorithms): on a GPU some are slower,
    and one that has no such form is an error."""
    device: str = "auto"
    """auto, cpu, cuda (one GPU per rank of a node) or cuda:N."""
    backend: str = _named("auto", Backend)
    """Communication library for tensors: horovod, torch (torch.distributed: NCCL or Gloo), mpi (the MPI itself), or the
    import path of a TensorTransport. auto: on GPUs the one that has NCCL; on CPUs Horovod if all ranks can use it,
    otherwise the MPI."""
    num_samples: int = _ruled(8, at_least(1, "Give a positive number"))
    """Weight samples per step in the whole job."""
    num_test_samples: int = _ruled(64, at_least(1, "Give a positive number"))
    """Weight samples of the predictive in the whole job."""
    chunk_size: int | Auto = _ruled("auto", at_least(1, "Try auto", "auto or at least 1"))
    """Samples that a rank evaluates at once; memory grows with this number. On a GPU more than 1 is faster for small
    networks. auto: on a GPU hpc-bnn train measures 1, 4, 16, ... in its first steps, and keeps the fastest for the run;
    elsewhere 1."""
    batching: Batching = "auto"
    """How a rank evaluates chunk_size samples: one after another (walking) or in one batch (vmap, in training and
    prediction). auto: a batch in training, but walking for ensembles and predictions."""
    capture: Capture = "auto"
    """Launch the operations of a step as CUDA graphs, and wait for no step; the numbers are the same. auto: on a GPU."""
    micro_batch_size: int | None = _ruled(None, at_least(1, "Leave it out for the whole batch"))
    """Examples of a rank that one forward pass evaluates; gradients add up to those of the whole batch, and memory is
    bounded. null: all examples of the rank at once."""
    global_batch_size: int = _ruled(128, at_least(1, "Give a positive number"))
    """Examples per step in the whole job."""
    num_epochs: int = _ruled(10, at_least(1, "Give a positive number"))
    """Passes over the training split."""
    max_seconds: float | None = _ruled(None, Rule(lambda value: value > 0, "positive", "Leave it out for no limit"))
    """Stop with a checkpoint and exit code 75 after this time (seconds)."""
    stall_seconds: float | None = _ruled(None, positive("Leave it out for no limit"))
    """End the job, with a traceback, if a rank makes no progress for this time (seconds). Make it longer than the longest
    batch and the writing of a checkpoint."""
    resume: bool = False
    """Continue from the newest sound checkpoint in run_dir, on any grid; without a checkpoint start at the
    beginning."""
    max_steps: int | None = _ruled(None, at_least(1, "Leave it out for no limit"))
    """Stop after this number of optimizer steps, also within an epoch; the schedule of the learning rate does not
    change."""
    profile: int | None = _ruled(None, at_least(1, "Try 3"))
    """Record this number of steps with torch.profiler, after the first eight, and one with names for its parts, to
    run_dir/profile.json (for ui.perfetto.dev)."""
    tensorboard: bool = False
    """Also write the metrics of each epoch for TensorBoard, to run_dir/tensorboard."""
    test_every_epochs: int = _ruled(10, at_least(1, "Give a positive number"))
    """Evaluate after this number of epochs, and at the end, on the validation split, or on the test split where there is
    none; at the end always on the test split."""
    check_up: bool = True
    """Look at the posterior at the end of a run and with evaluate, for the report: KL and signal-to-noise ratio of each
    tensor, and the metrics of the mean network, which take one more pass over the test split."""
    kl_weight: float = _ruled(1.0, at_least(0, "1 is Bayes", "0 or more and finite"))
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

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Config:
        """Return the config of what `to_dict` returned; `ConfigError` names a field that this version does not know."""
        return _from_dict(cls, tree, "")

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain dicts: the run, without `resume`, which is how it was started."""
        return {name: value for name, value in asdict(self).items() if name != "resume"}

    def check(self) -> None:
        """Check the values, each by itself and with the others; `ConfigError` names all faults together. Local."""
        augmentation, objective, samples = self.augmentation, self.objective, self.num_samples
        is_score = objective.name in get_args(Score)
        check_all(
            *(functools.partial(check_field, name, self._value(name)) for name in FIELDS),
            lambda: check_groups(augmentation.views, augmentation.num_groups, samples),
            lambda: is_score and check_pairs(objective.name, objective.fairness, samples),
            *(functools.partial(self._check_rule, *rule) for rule in self._rules()),
            self._check_features,
        )

    def _value(self, name: str) -> Any:
        return operator.attrgetter(name)(self)

    def _check_rule(self, name: str, fits: bool, rule: str, remedy: str) -> None:
        if not fits:
            raise ConfigError(Fault(name, self._value(name), f"must be {rule}", remedy))

    def _rules(self) -> Iterator[tuple[str, bool, str, str]]:
        """Yield (field, whether its value fits, rule, remedy) of what goes with what."""
        epochs, samples, objective, likelihood = self.num_epochs, self.num_samples, self.objective, self.likelihood
        posterior, family, prior = self.posterior, self.posterior.family, self.posterior.prior
        split = self.data.validation_split
        fits = split is None or split != self.data.train_split
        yield "data.validation_split", fits, "another split than that of the training", "Try null"
        fits = 0 <= self.optimizer.warmup_epochs < max(epochs, 1)
        yield "optimizer.warmup_epochs", fits, f"0 or more and below <num_epochs>, {epochs}", "Try 0"

        name = objective.name
        if name in get_args(Score):
            rule = f"implicit for {name}, which scores predictions of numbers, not classes"
            yield "likelihood.name", likelihood.name in ("auto", "implicit"), rule, "Use <likelihood.name> implicit"
        elif name in get_args(ObjectiveName):
            yield "objective.weights", objective.weights in ("auto", None), f"left out for {name}", "Use crps or energy"
            yield "likelihood.name", likelihood.name != "implicit", f"one with a density for {name}", "Try gaussian"

        is_number = posterior.prior_std != "fan_in"
        if prior == "scale_mixture":
            yield "posterior.prior_std", is_number, "a number for scale_mixture", "Try 1.0"
        if prior in ("scale_mixture", "student_t"):
            yield "posterior.prior_mean", posterior.prior_mean == 0, f"0 for the {prior} prior", "Use gaussian"
        for group, name in (("posterior", family), ("likelihood", likelihood.name)):
            rule, arguments = f"left out for {name}, which has fields of its own", self._value(f"{group}.arguments")
            yield f"{group}.arguments", "." in name or not arguments, rule, "Leave them out"
        if family in ("mc_dropout", "ensemble"):
            yield "posterior.prior_std", is_number, f"a number for {family}", "Try 1.0"
        if family == "ensemble":
            rule = f"<num_samples>, {samples}: the members"
            yield "num_test_samples", self.num_test_samples == samples, rule, "Set both"

    def _check_features(self) -> None:
        """Check which feature goes with which (`hpc_bnn.capabilities`), as far as a config knows."""
        posterior, name = self.posterior, self.objective.name
        if posterior.family not in FAMILIES:
            return  # that is the fault, or it is checked when it is built
        can = FAMILIES[posterior.family]
        if can.has_random_weights and can.kl == "closed form" and posterior.prior in ("student_t", "scale_mixture"):
            can = can.but(kl="Monte Carlo")
        asked = Features(
            couples=name in get_args(ObjectiveName) and name != "elbo",
            overlap=self.grid.overlap,
            can_overlap=self.backend != "mpi",
            sharded=self.optimizer.sharded,
            compression=self.grid.compression != "none",
            estimator=posterior.estimator,
            antithetic=posterior.antithetic,
            micro_batches=self.micro_batch_size is not None,
        )
        check_features(can, asked, self._value)


def config_of_run(run_dir: str | Path) -> Path:
    """Return the path of RUN_DIR/config.yaml; raise `ConfigError` where it is missing. Local."""
    path = Path(run_dir, "config.yaml")
    if not path.exists():
        remedy = "Name the <run_dir> of hpc-bnn train"
        raise ConfigError(Fault("RUN_DIR", run_dir, f"it holds no run (no {path.name})", remedy))
    return path


def read_tree(path: str | Path) -> dict[str, Any]:
    """Return the content of a config file; `ConfigError` where it cannot be read, or holds no fields. Local."""
    remedy = "Mend it, or put back a copy"
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
        json.dumps(tree, default=str, skipkeys=True)  # ValueError where an anchor stands in itself
    except OSError as error:
        raise ConfigError(Fault("--config", path, f"it cannot be read ({error.strerror})", remedy)) from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(Fault("--config", path, f"it is no YAML in UTF-8 ({error})", remedy)) from error
    if not isinstance(tree, dict):
        raise ConfigError(Fault("--config", path, f"it holds no fields, but {tree!r:.40}", remedy))
    _check_groups(tree)
    return tree


class _Loader(yaml.SafeLoader):
    """Refuses what YAML would read in silence otherwise than it looks: what stands twice, 010 for 8, 1:30 for 90."""

    def construct_scalar(self, node: Any) -> Any:
        if node.tag.endswith((":int", ":float")) and re.match(r"[+-]?0\d+$|.*:", node.value):
            rule = (
                f"YAML reads '{node.value}' as a number to the base 8 or 60: write it without 0 before it, or in quotes"
            )
            raise yaml.constructor.ConstructorError(None, None, rule, node.start_mark)
        return super().construct_scalar(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in getattr(node, "value", ()) if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"'{twice}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _check_groups(tree: dict[str, Any], prefix: str = "", seen: set[str] | None = None) -> None:
    seen = set() if seen is None else seen
    for name, value in tree.items():
        if f"{prefix}{name}" in NAMES - FIELDS.keys() and value is not None:  # jsonargparse fails at what is no mapping
            if not isinstance(value, dict):
                remedy = "Write them below it, or leave it out"
                raise ConfigError(Fault(f"{prefix}{name}", value, "it is a group of fields", remedy))
            _check_groups(value, f"{prefix}{name}.", seen)
        elif f"{prefix}{name}" in seen:
            raise ConfigError(Fault(f"{prefix}{name}", value, "it stands twice, once below its group", "Leave one out"))
        else:
            seen.add(f"{prefix}{name}")


def _from_dict(kind: Any, tree: Mapping[str, Any], prefix: str) -> Any:
    types = get_type_hints(kind)
    for name in tree.keys() - types.keys():
        remedy = "Use the version of hpc_bnn that wrote it, or a newer one"
        raise ConfigError(Fault(prefix + name, tree[name], "this version of hpc_bnn has no such field", remedy))
    return kind(**{
        name: _from_dict(types[name], value, f"{prefix}{name}.") if is_dataclass(types[name]) else value
        for name, value in tree.items()
    })  # fmt: skip


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the nested dicts of a config as one, with dotted names; arguments of users' classes stay dicts."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        is_group = isinstance(value, dict) and name != "arguments"
        flat |= flatten(value, f"{prefix}{name}.") if is_group else {prefix + name: value}
    return flat


# --- the fields, by name --------------------------------------------------------------------------------


class Field(NamedTuple):
    """What is known of a field."""

    type: Any
    default: Any
    rule: Rule | None
    """What a value must be that is none of its words; of a field that takes words only, one of them."""


def words_of(type_: Any) -> tuple[str | None, ...]:
    """Return the words that a type takes, and None where it is one of its values."""
    if type_ is type(None):
        return (None,)
    arguments = get_args(type_)
    return arguments if typing.get_origin(type_) is Literal else sum(map(words_of, arguments), ())


def _fields(kind: Any, prefix: str = "") -> dict[str, Field]:
    # `kind` is a dataclass. To type it takes an import for the type checker only, and where a module has one, jsonargparse
    # parses its source anew for each class of a config: half of the time to build the parser.
    found, hints, defaults = {}, typing.get_type_hints(kind), kind()
    for one in fields(kind):
        name, type_, default = prefix + one.name, hints[one.name], getattr(defaults, one.name)
        if isinstance(type_, type) and is_dataclass(type_):
            found |= _fields(type_, f"{name}.")
            continue
        rule = one.metadata.get("rule")
        if typing.get_origin(type_) is Literal:
            words = get_args(type_)
            rule = Rule(words.__contains__, f"one of {', '.join(words)}", f"The default is {default}")
        found[name] = Field(type_, default, rule)
    return found


FIELDS = _fields(Config)
"""The fields of `Config`, by their dotted names."""

NAMES = {*FIELDS, *(name.rpartition(".")[0] for name in FIELDS if "." in name)}
"""Names of fields and of groups of them."""


def check_field(name: str, value: object, argument: str = "") -> None:
    """Raise `ConfigError` unless a value fits the rule of a field; ``argument`` is its other name in Python. Local."""
    one = FIELDS[name]
    is_word = isinstance(value, (str, type(None))) and value in words_of(one.type)
    if one.rule is not None and not is_word:
        one.rule.check(name, value, argument)


def check_groups(views: str, num_groups: int, num_samples: int) -> None:
    """Raise `ConfigError` where groups of samples, with a view each, are more than samples. Local."""
    if views == "per_group" and not 1 <= num_groups <= num_samples:
        rule = f"must be between 1 and <num_samples>, {num_samples}"
        raise ConfigError(Fault("augmentation.num_groups", num_groups, rule, "Try 2"))


def check_pairs(objective: str, fairness: float, num_samples: int) -> None:
    """Raise `ConfigError` where a score has no pair of samples to compare. Local."""
    if num_samples < 2 and fairness > 0:
        rule = f"{objective} with fairness {fairness} compares pairs of samples"
        raise ConfigError(Fault("num_samples", num_samples, rule, "Use 2 or more, or <objective.fairness> 0"))
