"""The command line: parsing and calling, nothing else."""

from __future__ import annotations

import logging
import math
import re
import socket
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jsonargparse

from .. import __version__, comm
from ..config import Backend, Config, Scaling, SetScore, config_of_run
from ..errors import ConfigError, DataError, Fault, HpcBnnError, check_all
from ..grid import Grid, check, grids, sample_sizes
from ..safe_files import check_can_write, write_atomically
from .all_errors import Parser, check_together, refuse_nulls, settings

if TYPE_CHECKING:
    from ..run import Experiment


logger = logging.getLogger(__name__)


class Command(NamedTuple):
    """A subcommand of ``hpc-bnn``."""

    description: str
    run: Callable[[jsonargparse.Namespace, set[str]], int]
    """Takes the options, and the flags that the user gave."""
    arguments: dict[str, dict[str, Any]]
    """Its own arguments, besides those of a config."""
    config_help: str = ""
    """Of ``--config``; empty: the command takes no config."""

    def make_parser(self) -> Parser:
        """Return the parser of its arguments."""
        parser = Parser(description=self.description)
        if self.config_help:
            parser.add_argument("--config", action="config", help=self.config_help)
        for name, options in self.arguments.items():
            parser.add_argument(name, **options)
        if self.config_help:
            parser.add_class_arguments(Config, fail_untyped=True)
        return parser


def build_parser(words: Sequence[str] | None = None) -> Parser:
    """Return the parser of ``hpc-bnn``; with all commands, or only those among the words, as it takes long."""
    # The sentences of the fields, whose source must be read and parsed, are there only for help
    with_help = words is None or not {"-h", "--help"}.isdisjoint(words)
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=with_help)
    parser = Parser(prog="hpc-bnn", description="Bayesian neural networks by sampling parallelism.")
    parser.add_argument("--version", action="version", version=f"hpc_bnn {__version__}")
    commands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        is_needed = words is None or name in words
        commands.add_subcommand(name, command.make_parser() if is_needed else Parser(description=command.description))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 for an error, 2 for a request that cannot be fulfilled.

    Collective over the world when launched by ``mpirun`` or ``srun``. Errors on which all ranks agree are
    printed once and end the job in order; any other exception is left to ``python -m mpi4py``, which
    prints it and aborts the job.
    """

    def work() -> int:
        words = in_order(sys.argv[1:] if arguments is None else arguments)
        # --data '{shards: D}' gives --data.shards
        given = {f"--{name}" for name, _, is_flag in settings(words[1:]) if is_flag}
        parser = build_parser(words)
        try:
            parsed = parser.parse_args(words)
        except ConfigError:
            _say_all_faults(words)
            raise
        refuse_nulls(parsed[parsed.subcommand])
        return COMMANDS[parsed.subcommand].run(parser.instantiate(parsed)[parsed.subcommand], given)

    return run_and_report("hpc-bnn", work)


def in_order(words: Sequence[str]) -> list[str]:
    """Return a command line with its config files first, that of a RUN_DIR before others: flags override them. Local.

    jsonargparse takes files and flags in their order, and a flag must win wherever it stands.
    """
    command = COMMANDS.get(words[0]) if words else None
    if command is None or not command.config_help:
        return list(words)
    files, flags, run_dirs, rest = [], [], [], list(words[1:])
    while rest:
        word = rest.pop(0)
        if word == "--":  # names follow, which may begin with -
            run_dirs += [f"./{name}" if name.startswith("-") else name for name in rest]
            break
        name, equals, _ = word.partition("=")
        takes_value = not equals and name not in ("-h", "--help", "--print_config")
        if not word.startswith("-"):
            run_dirs.append(word)
        else:
            value = [rest.pop(0)] if takes_value and rest and not rest[0].startswith("--") else []
            (files if name == "--config" else flags).extend([word, *value])
    if "run" in command.arguments and run_dirs:
        files = [f"--config={config_of_run(run_dirs[0])}", *files]
    return [words[0], *files, *flags, *run_dirs]


def _say_all_faults(words: list[str]) -> None:
    """Raise one error with all faults, if the command takes a config. Local."""
    command = COMMANDS.get(words[0]) if words else None
    if command is not None and command.config_help:
        known, on_ranks = set(command.make_parser()._option_string_actions), comm.world_size()
        verify = (lambda config: check(config, on_ranks)) if words[0] == "train" else Config.check
        check_together(words[1:], known, verify)


def run_and_report(name: str, work: Callable[[], int]) -> int:
    """Run a command on this rank; print an error on which all ranks agree once, and return the exit code.

    Collective over the world. An error of `hpc_bnn.errors` that only this rank sees ends the job; any other
    exception passes through.
    """
    is_first = comm.launched_rank() == 0
    level = logging.INFO if is_first else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        return work()
    except HpcBnnError as error:
        together = comm.wait_for_others(5.0)  # an error that only this rank saw must not leave them waiting
        if is_first or not together:
            print(f"{name}: {error.label}: {error.on_command_line()}", file=sys.stderr, flush=True)
        if not together:
            comm.abort(error.exit_code)
        return error.exit_code


def _train(options: jsonargparse.Namespace, given: set[str]) -> int:
    from ..run import Run, StopRequest, connect_grid, write_plots

    stop = StopRequest()
    with stop.watching_signals():  # a signal during the start counts
        config = config_of(options, given)
        check(config, comm.world_size())  # before the first collective
        if isinstance(config.grid.sample_size, str):
            _choose_grid(config)
        grid_comm = connect_grid(config, config.grid.sample_size)
        run = Run(config, grid_comm, stop)
        summary, examples = run.train()
    with grid_comm.agree("drawing plots"):
        if run.is_writer:
            plots = write_plots(run.run_dir, examples)
            tested = {name: value for name, value in summary.items() if name.startswith("test/")}
            metrics = ", ".join(f"{name.replace('/', ' ')} {value:.4f}" for name, value in tested.items())
            print(f"{metrics}, {summary['seconds']:.1f} s", run.run_dir / "summary.json", *plots, sep="\n")
    return 0


def config_of(options: jsonargparse.Namespace, given: Collection[str] = ()) -> Config:
    """Return the config among the options of a command; ``given`` are the flags on the command line. Local."""
    config = Config(**{field.name: options[field.name] for field in fields(Config)})
    if "--data.shards" in given:  # the script and the dataset of the config file do not belong to these shards
        config.data.prepare = config.data.prepare if "--data.prepare" in given else None
        config.data.dataset = config.data.dataset if "--data.dataset" in given else None
    return config


def config_of_words(words: Sequence[str]) -> Config:
    """Return the config of a command line such as ``["train", "--config", FILE]``. Local."""
    parser = build_parser(words)
    return config_of(parser.instantiate(parser.parse_args(list(words)))[words[0]])


def _choose_grid(config: Config) -> None:
    from ..plan import plan_here

    sizes, wanted = grids(comm.world_size(), config.num_samples, config.global_batch_size), config.grid.sample_size
    config.grid.sample_size = sizes[-1]
    if len(sizes) > 1 and wanted == "auto":
        plan = plan_here(config)
        config.grid.sample_size = plan.best.sample_size
        logger.info("--grid.sample_size auto: the grid %s: %s", plan.best, plan.why)


def _plan(options: jsonargparse.Namespace, given: set[str]) -> int:
    from ..comm.timing import Network, read_network
    from ..plan import ASSUMED_BETWEEN, ASSUMED_WITHIN, describe, measure_here, plan_here, write_costs

    config, path = config_of(options, given), None if options.output is None else Path(options.output)
    faults: list[Fault | str] = [
        Fault(f"--{name}", options[name], "must be at least 1", "Leave it out for the ranks of this job")
        for name in ("ranks", "ranks_per_node")
        if options[name] is not None and options[name] < 1
    ]
    sizes: dict[str, float | None] = {}
    for name, quantity in QUANTITIES.items():
        try:
            sizes[name] = None if options[name] is None else quantity.parse(f"--{name}", options[name])
        except ConfigError as error:
            faults += error.faults
    if path and path.is_dir():
        faults.append(Fault("--output", options.output, "it is a directory", "Name a file in it, plan.json"))
    if faults:
        raise ConfigError(*faults)
    if options.measure is not None:
        costs_path = Path(options.measure)
        check_can_write(costs_path, "--measure")
        costs = measure_here(config)
        print(f"{'examples':>9}{'ms per step':>13}{'ms per sample':>15}   on {costs.device}")
        for cost in costs.costs:
            print(f"{cost.examples:>9}{1e3 * cost.step_seconds:>13.3g}{1e3 * cost.sample_seconds:>15.3g}")
        write_costs(costs_path, costs)
        print(costs_path)
        return 0
    measured = None if options.network is None else read_network(options.network)

    def network(prefix: str, assumed: Network) -> Network | None:
        """Return what the flags describe; without flags what the doctor measured, or None."""
        bandwidth, latency, known = sizes[f"{prefix}bandwidth"], sizes[f"{prefix}latency"], measured or assumed
        if bandwidth is None and latency is None:
            return measured
        return Network(bandwidth or known.bandwidth, latency or known.latency)

    plan = plan_here(
        config,
        options.ranks,
        options.ranks_per_node,
        between=network("", ASSUMED_BETWEEN),
        within=network("node_", ASSUMED_WITHIN),
        memory_bytes=sizes["memory"],
        flops=sizes["flops"],
        costs_path=options.measured,
    )
    if comm.launched_rank() == 0:
        print(describe(config, plan))
        if path:
            with comm.GridComm(Grid()).agree(f"writing {path}"):  # this rank alone
                check_can_write(path, "--output")
                write_atomically(path, plan.to_json())
            print(path)
    return 0


def _open_run(options: jsonargparse.Namespace, given: set[str]) -> Experiment:
    """Return the experiment of RUN_DIR with the parameters of a checkpoint. Collective over the world."""
    from ..run import Experiment, connect_grid

    config, num_ranks = config_of(options, given), comm.world_size()
    size, num_samples = config.grid.sample_size, max(config.num_test_samples, 1)
    if isinstance(size, str) or "--grid.sample_size" not in given:  # over as many ranks as there are samples for
        size = max(s for s in sample_sizes(num_ranks) if s <= num_samples)
    config.run_dir, config.grid.sample_size = options.run, size
    check_all(config.check, lambda: Grid(num_ranks, size).check_num_samples(num_samples))
    return Experiment.of_run(config, connect_grid(config, size), options.which)


def _evaluate(options: jsonargparse.Namespace, given: set[str]) -> int:
    from ..predictive import check_references, out_of_distribution_metrics, parse_regions
    from ..run import read_calibration, read_or_prepare

    experiment, calibration, ood = _open_run(options, given), None, {}
    if options.calibration:
        num_samples, split = experiment.config.num_test_samples, experiment.config.data.test_split
        calibration = read_calibration(experiment, num_samples, split)
    path = Path(options.output or experiment.run_dir / "evaluation.json")
    with experiment.comm.agree(f"writing {path}"):
        if experiment.is_writer:
            check_can_write(path, "--output")
    read_or_prepare(experiment.config.data, experiment.comm)
    by, references = ([w.strip() for w in options[flag].split(",") if w.strip()] for flag in ("by", "references"))
    with experiment.comm.agree("reading --regions"):
        regions = parse_regions([text.strip() for text in options.regions.split(";") if text.strip()])
        check_references(references)
    with experiment.watch:
        dataset = experiment.open(experiment.config.data.test_split)
        tested = experiment.evaluate(dataset, by, regions, references, calibration)
        posterior = experiment.check_up(dataset)
        if options.ood_shards is not None:
            foreign = experiment.uncertainties(experiment.open(options.ood_split, options.ood_shards), calibration)
            ood = out_of_distribution_metrics(tested.evaluation.uncertainties, foreign)
    with experiment.comm.agree(f"writing {path}"):
        if experiment.is_writer:
            print("\n".join(f"{name} {value:.6g}" for name, value in (tested.evaluation.metrics | ood).items()))
            foreign = f"{options.ood_shards}, {options.ood_split}" if ood else None
            of_run = experiment.num_steps, options.which
            experiment.write_evaluation(path, tested, *of_run, ood, foreign, posterior, options.calibration)
            print(path)
    return 0


def _calibrate(options: jsonargparse.Namespace, given: set[str]) -> int:
    from ..run import calibrate_run

    experiment = _open_run(options, given)
    found = calibrate_run(
        experiment,
        options.split,
        level=options.level,
        scaling=options.scaling,
        sets=options.sets,
        raps=(options.raps_penalty, options.raps_rank),
        half=options.half,
        which=options.which,
    )
    if experiment.is_writer:
        print(f"{found.method}: level {found.level:g}, {found.num_examples} examples")
        if found.temperature is not None:
            print(f"temperature {found.temperature:.4g}")
        if found.noise_factors is not None:
            print("noise scale times", " ".join(f"{factor:.4g}" for factor in found.noise_factors.tolist()))
        print(experiment.run_dir / "calibration.json")
    return 0


def _predict(options: jsonargparse.Namespace, given: set[str]) -> int:
    from ..run import predict_run

    if options.shards is not None:
        options.data.shards, given = options.shards or options.data.shards, given | {"--data.shards"}
    experiment = _open_run(options, given)
    path = predict_run(
        experiment,
        options.split or experiment.config.data.test_split,
        options.output,
        quantiles=options.quantiles,
        with_members=options.members,
        with_truth=options.truth,
        calibrated=options.calibration,
    )
    if experiment.is_writer:
        print(path)
    return 0


def _export(options: jsonargparse.Namespace, given: set[str]) -> int:
    from ..run import load

    if comm.launched_rank() == 0:  # one process has all samples
        predictor = load(options.run, options.which, device="cpu")
        print(predictor.export(options.output, options.what, sample=options.sample, num_samples=options.num_samples))
    return 0


def _report(options: jsonargparse.Namespace, given: set[str]) -> int:
    from ..run import write_report

    if comm.launched_rank() == 0:
        print(write_report(options.runs, options.output))
    return 0


def _verify(options: jsonargparse.Namespace, given: set[str]) -> int:
    from tqdm import tqdm

    from ..data import Manifest, verify_shards

    if comm.launched_rank() != 0:  # one process reads for all
        return 0
    if Path(options.shards).is_file():
        from ..run import verify_predictions

        if problems := verify_predictions(options.shards):
            raise DataError("\n".join(problems))
        print(f"{options.shards}: predictions, complete")
        return 0
    problems = verify_shards(options.shards, lambda files: tqdm(files, unit="file", disable=None))
    if problems:
        raise DataError("\n".join(problems))
    for split, shards in Manifest.read(options.shards).splits.items():
        print(f"{options.shards}: {split}, {sum(s.num_examples for s in shards)} examples in {len(shards)} files")
    return 0


def _stage(options: jsonargparse.Namespace, given: set[str]) -> int:
    from tqdm import tqdm

    from ..data import stage_shards, unstage_shards

    ranks = comm.connect_for_files()
    is_first, host = ranks.grid.is_first("world"), socket.gethostname()
    if options.clean:
        stays = unstage_shards(options.destination, ranks)
        if ranks.local_rank == 0:
            kept = f"; kept, as not of it: {', '.join(stays)}" if stays else ""
            print(f"{host}: nothing that was staged is left in {options.destination}{kept}")
        return 0
    staged = stage_shards(
        options.source,
        options.destination,
        ranks,
        verify=options.verify,
        progress=lambda files: tqdm(files, unit="file", desc="staging", disable=None if is_first else True),
    )
    if ranks.local_rank == 0:
        copied = f"{staged.num_copied} files copied ({staged.num_bytes_read / 1e6:.1f} MB)"
        print(f"{host}: {options.destination}, {copied}, {staged.num_kept} kept")
    return 0


def _doctor(options: jsonargparse.Namespace, given: set[str]) -> int:
    from ..doctor import examine

    return examine(options.grid.sample_size, options.device, options.json, options.seconds, options.backend)


# --- the table of commands -----------------------------------------------------------------------------


def _argument(type_: Any, text: str, **options: Any) -> dict[str, Any]:
    return {"type": type_, "help": text, **options}


class Quantity(NamedTuple):
    """A number with a unit on the command line, such as 40GB or 40GiB."""

    unit: str
    """What may stand behind a prefix: a pattern."""
    least: float
    most: float
    example: str

    def parse(self, flag: str, text: str) -> float:
        """Return a number without prefix; `ConfigError` for another unit, or a size that nothing has."""
        number, powers = r"((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", {p: 3 * k for k, p in enumerate("num kMGTP", -3)}
        match = re.fullmatch(rf"\s*{number}\s*(?:(?:([numkKMGTP])(i)?)?{self.unit})?\s*", text)
        value = math.nan
        if match:
            power = powers[(match[2] or " ").replace("K", "k")]
            value = float(match[1]) * (1024.0 ** (power / 3) if match[3] else 10.0**power)
        if not self.least <= value <= self.most:
            rule = f"must be a number from {self.least:g} to {self.most:g}, with a unit or without"
            raise ConfigError(Fault(flag, text, rule, f"Write it as {self.example}"))
        return value


_BANDWIDTH, _LATENCY = Quantity("B?(?:/s)?", 1e6, 1e14, "12.5GB/s"), Quantity("s", 1e-9, 1.0, "2us")
QUANTITIES = {
    "memory": Quantity("B?", 2.0**20, 1e15, "40GB"),
    "flops": Quantity("(?:FLOPS|FLOP/s)?", 1e6, 1e18, "5T"),
    "bandwidth": _BANDWIDTH,
    "latency": _LATENCY,
    "node_bandwidth": _BANDWIDTH,
    "node_latency": _LATENCY,
}
"""Flags of ``hpc-bnn plan`` that are sizes."""

_RUN = {
    "run": _argument(str, "Directory of the run; flags override its config.", metavar="RUN_DIR"),
    "--which": _argument(Literal["newest", "best"], "Checkpoint (default: newest).", default="newest"),
}
_OOD = "Foreign examples: how well does the uncertainty tell them (AUROC, average precision, FPR at 95 % TPR)?"
_BY = "Metrics of each season, month, hour, step of the horizon, value of a coordinate: hour,station."
_REGIONS = "Metrics of boxes and masks: 'alps=44,48,5,16; land=MASK.npy' (south, north, west, east)."
_EVALUATE = _RUN | {
    "--ood_shards": _argument(str | None, _OOD),
    "--ood_split": _argument(str, "Split of the foreign examples.", default="test"),
    "--by": _argument(str, _BY, default=""),
    "--regions": _argument(str, _REGIONS, default=""),
    "--references": _argument(str, "Forecasts that skill is measured against: persistence,climatology.", default=""),
    "--calibration": _argument(bool, "Evaluate what hpc-bnn calibrate makes of the predictions.", default=False),
    "--output": _argument(str | None, "JSON file to write (default: evaluation.json with the run)."),
}
_SCALING = "Probabilities of classes: one temperature, or a factor and a summand of each class."
_SETS = "Sets of classes: the smallest ones, or ones that adapt to the example."
_CALIBRATE = _RUN | {
    "--split": _argument(str, "Split that is new to the run (default: calibration).", default="calibration"),
    "--level": _argument(float, "Probability that a set or interval holds the target.", default=0.9),
    "--scaling": _argument(Scaling, _SCALING, default="temperature"),
    "--sets": _argument(SetScore, _SETS, default="threshold"),
    "--raps_penalty": _argument(float, "Of --sets raps: penalty of each rank.", default=0.01),
    "--raps_rank": _argument(int, "Of --sets raps: ranks that are free.", default=5),
    "--half": _argument(bool, "Use half of the split; so it may be one that judged checkpoints.", default=False),
}
_PREDICT = _RUN | {
    "--shards": _argument(str | None, "Shard directory (default: that of the run)."),
    "--split": _argument(str | None, "Split of it (default: the test split of the run)."),
    "--output": _argument(str, "HDF5 file to write; or .csv, for targets that are no fields.", required=True),
    "--quantiles": _argument(list[float], "Levels; [] for none.", default=[0.05, 0.25, 0.5, 0.75, 0.95]),
    "--members": _argument(bool, "Write every sample as well.", default=False),
    "--truth": _argument(bool, "Write the targets as well.", default=True),
    "--calibration": _argument(bool, "Apply what hpc-bnn calibrate has found.", default=False),
}
_FILE = "File to write: .safetensors (all, for hpc_bnn.load), .onnx, or .pt (state_dict)."
_WHAT = "Plain network in an .onnx or .pt file: with the mean of the weights, ..."
_EXPORT = {
    "run": _argument(str, "Directory of the run.", metavar="RUN_DIR"),
    "--output": _argument(str, _FILE, required=True),
    "--which": _argument(Literal["best", "newest"], "Checkpoint (default: best, as hpc_bnn.load).", default="best"),
    "--what": _argument(Literal["mean", "sample", "samples"] | None, _WHAT),
    "--sample": _argument(int | None, "Number of the sample (default: 0)."),
    "--num_samples": _argument(int | None, "Number of samples (default: those of the run's evaluation)."),
}
_REPORT = {
    "runs": _argument(str, "Directories of runs.", nargs="+", metavar="RUN_DIR"),
    "--output": _argument(str | None, "HTML file (default: report.html with the run or runs)."),
}
_DEFAULT = "(default: measured, where this job has several ranks; otherwise assumed)."
_NODE = "Ranks of a node (default: as here, or the GPUs or cores of this machine)."
_FLOPS = "FLOP/s of a rank that it reaches, not its peak, such as 5T (default: measured here)."
_MEASURE = "Measure what a sample costs on this one device, and write it to a JSON file; no plan."
_PLAN = {
    "--ranks": _argument(int | None, "Ranks to plan for (default: those of this job)."),
    "--ranks_per_node": _argument(int | None, _NODE),
    "--memory": _argument(str | None, "What a rank may take, such as 40GB or 40GiB (default: that of its device)."),
    "--flops": _argument(str | None, _FLOPS),
    "--measure": _argument(str | None, _MEASURE),
    "--measured": _argument(str | None, "JSON of --measure: its costs, in place of a measurement here."),
    "--bandwidth": _argument(str | None, f"Of a rank, such as 12.5GB/s, between nodes {_DEFAULT}"),
    "--latency": _argument(str | None, f"Of a message, such as 2us, between nodes {_DEFAULT}"),
    "--node_bandwidth": _argument(str | None, f"Of a rank, such as 200GB/s, within a node {_DEFAULT}"),
    "--node_latency": _argument(str | None, f"Of a message, such as 1us, within a node {_DEFAULT}"),
    "--network": _argument(str | None, "JSON of hpc-bnn doctor: its network, for both."),
    "--output": _argument(str | None, "JSON file to write as well."),
}
_VERIFY = {"shards": _argument(str, "Directory with a manifest.json, or file of hpc-bnn predict.", metavar="SHARD_DIR")}
_STAGE = {
    "source": _argument(str, "Shard directory that all nodes see.", metavar="SRC"),
    "destination": _argument(str, "Directory on storage of the node.", metavar="DST"),
    "--verify": _argument(bool, "Compare SHA-256, not only sizes (default: true).", default=True),
    "--clean": {"action": "store_true", "help": "Remove DST from every node instead."},
}
_DOCTOR = {
    "--grid.sample_size": _argument(int | None, "Extent of the sample axis (default: one that suits the job)."),
    "--device": _argument(str, "As for train (default: auto).", default="auto"),
    "--backend": _argument(Backend, "As for train (default: auto).", default="auto"),
    "--json": _argument(str | None, "File for all facts and measurements."),
    "--seconds": _argument(float, "Longest time of one step, before the job is ended.", default=120.0),
}
_OF_RUN, _OF_FILE = "By default RUN_DIR/config.yaml.", "YAML file; flags given after it override it."
COMMANDS = {
    "train": Command("Train a Bayesian network on the process grid.", _train, {}, _OF_FILE),
    "evaluate": Command("Evaluate a trained network with all samples of all ranks.", _evaluate, _EVALUATE, _OF_RUN),
    "calibrate": Command(
        "Calibrate a trained network: temperature, and sets or intervals of a level.", _calibrate, _CALIBRATE, _OF_RUN
    ),
    "predict": Command(
        "Write the predictive of a trained network to an HDF5 file, or a table as CSV.", _predict, _PREDICT, _OF_RUN
    ),
    "export": Command("Write a trained network to one file, for hpc_bnn.load, ONNX or torch.", _export, _EXPORT),
    "report": Command("Write one self-contained HTML page about a run, or several side by side.", _report, _REPORT),
    "verify": Command(
        "Compare the files of a shard directory with its manifest, or predictions with their parts.", _verify, _VERIFY
    ),
    "plan": Command("Predict memory, time and communication of every grid, and recommend one.", _plan, _PLAN, _OF_FILE),
    "stage": Command("Copy a shard directory to local storage, once per node of the job.", _stage, _STAGE),
    "doctor": Command(
        "Look at the ranks of this job, test its sums, and name problems and remedies.", _doctor, _DOCTOR
    ),
}
