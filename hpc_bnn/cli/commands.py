"""The command line: parsing and calling, nothing else."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import jsonargparse
from tqdm import tqdm

from .. import __version__, comm
from ..comm.timing import Network, read_network
from ..config import Backend, Config, config_of_run
from ..errors import ConfigError, DataError, Fault, HpcBnnError, check_all
from ..grid import Grid, grids, sample_sizes
from ..safe_files import write_atomically
from .all_errors import Parser, check_together

if TYPE_CHECKING:
    from ..run import Experiment


logger = logging.getLogger(__name__)


class Command(NamedTuple):
    """A subcommand of ``hpc-bnn``."""

    description: str
    add_arguments: Callable[[Parser], None]
    """Adds its own arguments, besides those of a config."""
    run: Callable[[jsonargparse.Namespace, set[str]], int]
    """Takes the options, and the flags that the user gave."""
    config_help: str = ""
    """Of ``--config``; empty: the command takes no config."""


def build_parser(words: Sequence[str] | None = None) -> Parser:
    """Return the parser of ``hpc-bnn``; with all commands, or only those among the words, as it takes long.

    The sentences of the fields, whose source must be read and parsed, are there only for help.
    """
    with_help = words is None or not {"-h", "--help"}.isdisjoint(words)
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=with_help)
    parser = Parser(prog="hpc-bnn", description="Bayesian neural networks by sampling parallelism.")
    parser.add_argument("--version", action="version", version=f"hpc_bnn {__version__}")
    commands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        subparser = Parser(description=command.description)
        if words is None or name in words:
            _add_arguments(subparser, command)
        commands.add_subcommand(name, subparser)
    return parser


def _add_arguments(parser: Parser, command: Command) -> None:
    if command.config_help:
        parser.add_argument("--config", action="config", help=command.config_help)
    command.add_arguments(parser)
    if command.config_help:
        parser.add_class_arguments(Config, fail_untyped=True)


def _add_run(parser: Parser) -> None:
    """Add what the commands that work on an existing run have in common."""
    parser.add_argument("run", type=str, metavar="RUN_DIR", help="Directory of the run; flags override its config.")
    parser.add_argument(
        "--which", type=Literal["newest", "best"], default="newest", help="Checkpoint (default: newest)."
    )


def _add_evaluate(evaluate: Parser) -> None:
    _add_run(evaluate)
    evaluate.add_argument(
        "--ood_shards", type=str | None, help="Foreign examples: how well does the uncertainty tell them (AUROC)?"
    )
    evaluate.add_argument("--ood_split", type=str, default="test", help="Split of the foreign examples.")


def _add_predict(predict: Parser) -> None:
    _add_run(predict)
    predict.add_argument("--shards", type=str | None, help="Shard directory (default: that of the run).")
    predict.add_argument("--split", type=str | None, help="Split of it (default: the test split of the run).")
    predict.add_argument("--output", type=str, required=True, help="HDF5 file to write.")
    predict.add_argument(
        "--quantiles", type=list[float], default=[0.05, 0.25, 0.5, 0.75, 0.95], help="Levels; [] for none."
    )
    predict.add_argument("--members", type=bool, default=False, help="Write every sample as well.")


def _add_report(report: Parser) -> None:
    report.add_argument("runs", type=str, nargs="+", metavar="RUN_DIR", help="Directories of runs.")
    report.add_argument("--output", type=str | None, help="HTML file (default: report.html with the run or runs).")


def _add_verify(verify: Parser) -> None:
    verify.add_argument("shards", type=str, metavar="SHARD_DIR", help="Directory with a manifest.json.")


def _add_plan(plan: Parser) -> None:
    plan.add_argument("--ranks", type=int | None, help="Ranks to plan for (default: those of this job).")
    plan.add_argument(
        "--ranks_per_node",
        type=int | None,
        help="Ranks of a node (default: as here, or the GPUs or cores of this machine).",
    )
    plan.add_argument("--memory", type=float | None, help="Bytes that a rank may take (default: those of its device).")
    plan.add_argument("--flops", type=float | None, help="FLOP/s of a rank (default: measure its share here).")
    for prefix, where in (("", "between nodes"), ("node_", "within a node")):
        text = f"{where} (default: measured, where this job has several ranks; otherwise assumed)."
        plan.add_argument(f"--{prefix}bandwidth", type=float | None, help=f"Bytes per second of a rank {text}")
        plan.add_argument(f"--{prefix}latency", type=float | None, help=f"Seconds of a message {text}")
    plan.add_argument("--network", type=str | None, help="JSON of hpc-bnn doctor: its network, for both.")
    plan.add_argument("--output", type=str | None, help="JSON file to write as well.")


def _add_stage(stage: Parser) -> None:
    stage.add_argument("source", type=str, metavar="SRC", help="Shard directory that all nodes see.")
    stage.add_argument("destination", type=str, metavar="DST", help="Directory on storage of the node.")
    stage.add_argument("--verify", type=bool, default=True, help="Compare SHA-256, not only sizes (default: true).")
    stage.add_argument("--clean", action="store_true", help="Remove DST from every node instead.")


def _add_doctor(doctor: Parser) -> None:
    doctor.add_argument(
        "--grid.sample_size", type=int | None, help="Extent of the sample axis (default: one that suits the job)."
    )
    doctor.add_argument("--device", type=str, default="auto", help="As for train (default: auto).")
    doctor.add_argument("--backend", type=Backend, default="auto", help="As for train (default: auto).")
    doctor.add_argument("--json", type=str | None, help="File for all facts and measurements.")
    doctor.add_argument(
        "--seconds", type=float, default=120.0, help="Longest time of one step, before the job is ended."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 for an error, 2 for a request that cannot be fulfilled.

    Collective over the world when launched by ``mpirun`` or ``srun``. Errors on which all ranks agree are
    printed once and end the job in order; any other exception is left to ``python -m mpi4py``, which
    prints it and aborts the job.
    """

    def work() -> int:
        words = list(sys.argv[1:] if arguments is None else arguments)
        given = {word.split("=")[0] for word in words}
        if words[:1] in (["evaluate"], ["predict"]) and len(words) > 1 and not words[1].startswith("-"):
            words[2:2] = ["--config", str(config_of_run(words[1]))]  # flags behind it override it
        parser = build_parser(words)
        try:
            parsed = parser.parse_args(words)
        except ConfigError:
            _say_all_faults(words)
            raise
        return COMMANDS[parsed.subcommand].run(parser.instantiate(parsed)[parsed.subcommand], given)

    return run_and_report("hpc-bnn", work)


def _say_all_faults(words: list[str]) -> None:
    """Raise one error with all faults, if the command takes a config. Local."""
    from ..run import check

    command = COMMANDS.get(words[0]) if words else None
    if command is not None and command.config_help:
        subparser, on_ranks = Parser(), comm.world_size()
        _add_arguments(subparser, command)
        known = set(subparser._option_string_actions)
        verify = (lambda config: check(config, on_ranks)) if words[0] == "train" else Config.check
        check_together(words[1:], known, verify)


def run_and_report(name: str, work: Callable[[], int]) -> int:
    """Run a command on this rank; print an error on which all ranks agree once, and return the exit code.

    Collective over the world. An error of `hpc_bnn.errors` that only this rank sees ends the job; any other
    exception passes through.
    """
    is_first = comm.launched_rank() == 0
    logging.basicConfig(
        level=logging.INFO if is_first else logging.ERROR, format="%(levelname)s: %(message)s", stream=sys.stderr
    )
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
    from ..run import Run, StopRequest, check, connect_grid, write_plots

    stop = StopRequest()
    with stop.watching_signals():  # a signal during the start counts
        config = config_of(options, given)
        check(config, comm.world_size())  # before the first collective
        if config.grid.sample_size == "auto":
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
    if "--data.shards" in given and "--data.prepare" not in given:
        config.data.prepare = None  # the script of the config file belongs to the shards of the config file
    return config


def config_of_words(words: Sequence[str]) -> Config:
    """Return the config of a command line such as ``["train", "--config", FILE]``. Local."""
    parser = build_parser(words)
    return config_of(parser.instantiate(parser.parse_args(list(words)))[words[0]])


def _choose_grid(config: Config) -> None:
    from ..plan import plan_here

    sizes = grids(comm.world_size(), config.num_samples, config.global_batch_size)
    config.grid.sample_size = sizes[0]
    if len(sizes) > 1:
        plan = plan_here(config)
        config.grid.sample_size = plan.best.sample_size
        logger.info("--grid.sample_size auto: the grid %s: %s", plan.best, plan.why)


def _plan(options: jsonargparse.Namespace, given: set[str]) -> int:
    from ..plan import ASSUMED_BETWEEN, ASSUMED_WITHIN, describe, plan_here

    config = config_of(options, given)
    faults = [
        Fault(f"--{name}", getattr(options, name), "must be positive", "Leave it out")
        for name in ("bandwidth", "latency", "node_bandwidth", "node_latency")
        if getattr(options, name) is not None and not getattr(options, name) > 0
    ]
    if options.output is not None and Path(options.output).is_dir():
        faults.append(Fault("--output", options.output, "it is a directory", "Name a file in it, plan.json"))
    if faults:
        raise ConfigError(*faults)
    measured = read_network(options.network) if options.network is not None else None
    plan = plan_here(
        config,
        options.ranks,
        options.ranks_per_node,
        between=_network(options.bandwidth, options.latency, measured, ASSUMED_BETWEEN),
        within=_network(options.node_bandwidth, options.node_latency, measured, ASSUMED_WITHIN),
        memory_bytes=options.memory,
        flops=options.flops,
    )
    if comm.launched_rank() == 0:
        print(describe(config, plan))
        if options.output is not None:
            path = Path(options.output)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, plan.to_json())
            print(path)
    return 0


def _network(
    bandwidth: float | None, latency: float | None, measured: Network | None, assumed: Network
) -> Network | None:
    """Return the network model that the flags describe, or None."""
    if bandwidth is None and latency is None:
        return measured
    assumed = measured or assumed
    return Network(bandwidth or assumed.bandwidth, latency or assumed.latency)


def _open_run(options: jsonargparse.Namespace, given: set[str]) -> Experiment:
    """Return the experiment of RUN_DIR with the parameters of a checkpoint. Collective over the world."""
    from ..run import Experiment, connect_grid

    config, num_ranks = config_of(options, given), comm.world_size()
    size, num_samples = config.grid.sample_size, max(config.num_test_samples, 1)
    if size == "auto" or "--grid.sample_size" not in given:  # over as many ranks as there are samples for
        size = max(s for s in sample_sizes(num_ranks) if s <= num_samples)
    config.run_dir, config.grid.sample_size = options.run, size
    check_all(config.check, lambda: Grid(num_ranks, size).check_num_samples(num_samples))
    return Experiment.of_run(config, connect_grid(config, size), options.which)


def _evaluate(options: jsonargparse.Namespace, given: set[str]) -> int:
    from ..predictive import out_of_distribution_auroc

    experiment = _open_run(options, given)
    tested = experiment.evaluate(experiment.open_to_test())
    ood = {}
    if options.ood_shards is not None:
        foreign = experiment.uncertainties(experiment.open(options.ood_split, options.ood_shards))
        ood = out_of_distribution_auroc(tested.evaluation.uncertainties, foreign)
    with experiment.comm.agree(f"writing {experiment.run_dir}"):
        if experiment.is_writer:
            foreign = f"{options.ood_shards}, {options.ood_split}" if ood else None
            path = experiment.write_evaluation(tested, experiment.num_steps, options.which, ood, foreign)
            print("\n".join(f"{name} {value:.6g}" for name, value in (tested.evaluation.metrics | ood).items()))
            print(path)
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
    )
    if experiment.is_writer:
        print(path)
    return 0


def _report(options: jsonargparse.Namespace, given: set[str]) -> int:
    from ..run import write_report

    if comm.launched_rank() == 0:
        print(write_report(options.runs, options.output))
    return 0


def _verify(options: jsonargparse.Namespace, given: set[str]) -> int:
    from ..data import Manifest, verify_shards

    if comm.launched_rank() != 0:  # one process reads for all
        return 0
    problems = verify_shards(options.shards, lambda files: tqdm(files, unit="file", disable=None))
    if problems:
        raise DataError("\n".join(problems))
    for split, shards in Manifest.read(options.shards).splits.items():
        print(f"{options.shards}: {split}, {sum(s.num_examples for s in shards)} examples in {len(shards)} files")
    return 0


def _stage(options: jsonargparse.Namespace, given: set[str]) -> int:
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
        print(
            f"{host}: {options.destination}, {staged.num_copied} files copied ({staged.num_bytes_read / 1e6:.1f} MB), "
            f"{staged.num_kept} kept"
        )
    return 0


def _doctor(options: jsonargparse.Namespace, given: set[str]) -> int:
    from ..doctor import examine

    return examine(options.grid.sample_size, options.device, options.json, options.seconds, options.backend)


_EXISTING = "By default RUN_DIR/config.yaml."
_NEW = "YAML file; flags given after it override it."
COMMANDS = {
    "train": Command("Train a Bayesian network on the process grid.", lambda parser: None, _train, _NEW),
    "evaluate": Command(
        "Evaluate a trained network with all samples of all ranks.", _add_evaluate, _evaluate, _EXISTING
    ),
    "predict": Command("Write the predictive of a trained network to an HDF5 file.", _add_predict, _predict, _EXISTING),
    "report": Command("Write one self-contained HTML page about a run, or several side by side.", _add_report, _report),
    "verify": Command("Compare the files of a shard directory with its manifest.", _add_verify, _verify),
    "plan": Command("Predict memory, time and communication of every grid, and recommend one.", _add_plan, _plan, _NEW),
    "stage": Command("Copy a shard directory to local storage, once per node of the job.", _add_stage, _stage),
    "doctor": Command(
        "Look at the ranks of this job, test its sums, and name problems and remedies.", _add_doctor, _doctor
    ),
}
"""The subcommands."""
