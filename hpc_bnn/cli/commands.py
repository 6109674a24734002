"""The command line: parsing and calling, nothing else."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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


def build_parser(words: Sequence[str] | None = None) -> jsonargparse.ArgumentParser:
    """Return the parser of ``hpc-bnn``; with all commands, or only those among the words, as it takes long.

    The sentences of the fields, whose source must be read and parsed, are there only for help.
    """
    with_help = words is None or not {"-h", "--help"}.isdisjoint(words)
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=with_help)
    parser = Parser(prog="hpc-bnn", description="Bayesian neural networks by sampling parallelism.")
    parser.add_argument("--version", action="version", version=f"hpc_bnn {__version__}")
    commands = parser.add_subcommands()
    for name, (description, add_arguments) in COMMANDS.items():
        command = Parser(description=description)
        if words is None or name in words:
            add_arguments(command)
        commands.add_subcommand(name, command)
    return parser


def _add_train(train: Parser) -> None:
    train.add_argument("--config", action="config", help="YAML file; flags given after it override it.")
    train.add_class_arguments(Config, fail_untyped=True)


def _add_run(parser: Parser) -> None:
    """Add what the commands that work on an existing run have in common."""
    parser.add_argument("run", type=str, metavar="RUN_DIR", help="Directory of the run; flags override its config.")
    parser.add_argument("--config", action="config", help="By default RUN_DIR/config.yaml.")
    parser.add_argument(
        "--which", type=Literal["newest", "best"], default="newest", help="Checkpoint (default: newest)."
    )


def _add_evaluate(evaluate: Parser) -> None:
    _add_run(evaluate)
    evaluate.add_argument(
        "--ood_shards", type=str | None, help="Foreign examples: how well does the uncertainty tell them (AUROC)?"
    )
    evaluate.add_argument("--ood_split", type=str, default="test", help="Split of the foreign examples.")
    evaluate.add_class_arguments(Config, fail_untyped=True)


def _add_predict(predict: Parser) -> None:
    _add_run(predict)
    predict.add_argument("--shards", type=str | None, help="Shard directory (default: that of the run).")
    predict.add_argument("--split", type=str | None, help="Split of it (default: the test split of the run).")
    predict.add_argument("--output", type=str, required=True, help="HDF5 file to write.")
    predict.add_argument(
        "--quantiles", type=list[float], default=[0.05, 0.25, 0.5, 0.75, 0.95], help="Levels; [] for none."
    )
    predict.add_argument("--members", type=bool, default=False, help="Write every sample as well.")
    predict.add_class_arguments(Config, fail_untyped=True)


def _add_report(report: Parser) -> None:
    report.add_argument("runs", type=str, nargs="+", metavar="RUN_DIR", help="Directories of runs.")
    report.add_argument("--output", type=str | None, help="HTML file (default: report.html with the run or runs).")


def _add_verify(verify: Parser) -> None:
    verify.add_argument("shards", type=str, metavar="SHARD_DIR", help="Directory with a manifest.json.")


def _add_plan(plan: Parser) -> None:
    plan.add_argument("--config", action="config", help="YAML file; flags given after it override it.")
    plan.add_argument("--ranks", type=int | None, help="Ranks to plan for (default: those of this job).")
    plan.add_argument(
        "--ranks_per_node",
        type=int | None,
        help="Ranks of a node (default: as here, or the GPUs or cores of this machine).",
    )
    plan.add_argument("--memory", type=float | None, help="Bytes that a rank may take (default: those of its device).")
    plan.add_argument("--flops", type=float | None, help="FLOP/s of a rank (default: measure its share here).")
    for name, where in (("", "between nodes"), ("node_", "within a node")):
        text = f"{where} (default: measured, where this job has several ranks; otherwise assumed)."
        plan.add_argument(f"--{name}bandwidth", type=float | None, help=f"Bytes per second of a rank {text}")
        plan.add_argument(f"--{name}latency", type=float | None, help=f"Seconds of a message {text}")
    plan.add_argument("--network", type=str | None, help="JSON of hpc-bnn doctor: its network, for both.")
    plan.add_argument("--output", type=str | None, help="JSON file to write as well.")
    plan.add_class_arguments(Config, fail_untyped=True)


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


COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "train": ("Train a Bayesian network on the process grid.", _add_train),
    "evaluate": ("Evaluate a trained network with all samples of all ranks.", _add_evaluate),
    "predict": ("Write the predictive of a trained network to an HDF5 file.", _add_predict),
    "report": ("Write one self-contained HTML page about a run, or several side by side.", _add_report),
    "verify": ("Compare the files of a shard directory with its manifest.", _add_verify),
    "plan": ("Predict memory, time and communication of every grid, and recommend one.", _add_plan),
    "stage": ("Copy a shard directory to local storage, once per node of the job.", _add_stage),
    "doctor": ("Look at the ranks of this job, test its sums, and name problems and remedies.", _add_doctor),
}
"""Description of each command, and what adds its arguments."""


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
            _say_all_faults(parser, words)
            raise
        command = parsed.subcommand
        options = parser.instantiate(parsed)[command]
        commands = {"train": _train, "evaluate": _evaluate, "predict": _predict}
        commands |= {"report": _report, "verify": _verify, "stage": _stage, "plan": _plan, "doctor": _doctor}
        return commands[command](options, given)

    return run_and_report("hpc-bnn", work)


def _say_all_faults(parser: Parser, words: list[str]) -> None:
    """Raise one error with all faults, if the command takes a config. Local."""
    from ..run import check

    command = words[0] if words else None
    if command in ("train", "evaluate", "predict", "plan"):
        known = set(parser._subcommands_action.choices[command]._option_string_actions)
        on_ranks = comm.world_size()
        verify = (lambda config: check(config, on_ranks)) if command == "train" else Config.check
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
    from ..run import Run, StopRequest, check, write_plots

    stop = StopRequest()
    with stop.watching_signals():  # a signal during the start counts
        config = _make_config(options, given)
        check(config, comm.world_size())  # before the first collective
        if config.grid.sample_size == "auto":
            _choose_grid(config)
        grid_comm = _connect(config)
        run = Run(config, grid_comm, stop)
        summary, examples = run.train()
    with grid_comm.agree("drawing plots"):
        if run.is_writer:
            plots = write_plots(run.run_dir, examples)
            metrics = [
                f"{name.replace('/', ' ')} {value:.4f}" for name, value in summary.items() if name.startswith("test/")
            ]
            print(f"{', '.join(metrics)}, {summary['seconds']:.1f} s\n{run.run_dir}/summary.json")
            for path in plots:
                print(path)
    return 0


def config_of(options: jsonargparse.Namespace) -> Config:
    """Return the config among the options of a command. Local."""
    values = options.as_dict()
    return Config(**{name: values[name] for name in (field.name for field in fields(Config))})


def config_of_words(words: Sequence[str]) -> Config:
    """Return the config of a command line such as ``["train", "--config", FILE]``. Local."""
    parser = build_parser(words)
    return config_of(parser.instantiate(parser.parse_args(list(words)))[words[0]])


def _make_config(options: jsonargparse.Namespace, given: set[str]) -> Config:
    config = config_of(options)
    if "--data.shards" in given and "--data.prepare" not in given:
        config.data.prepare = None  # the script of the config file belongs to the shards of the config file
    return config


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

    config = _make_config(options, given)
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


def _connect(config: Config) -> comm.GridComm:
    from ..run import connect_grid

    return connect_grid(config, config.grid.sample_size)


def _open_run(options: jsonargparse.Namespace, given: set[str]) -> Experiment:
    """Return the experiment of RUN_DIR with the parameters of a checkpoint. Collective over the world."""
    from ..run import Experiment

    config = _make_config(options, given)
    config.run_dir, num_ranks, num_samples = options.run, comm.world_size(), max(config.num_test_samples, 1)
    if "--grid.sample_size" not in given:  # the samples over as many ranks as there are samples for
        config.grid.sample_size = max(size for size in sample_sizes(num_ranks) if size <= num_samples)
    check_all(config.check, lambda: Grid(num_ranks, config.grid.sample_size).check_num_samples(num_samples))
    return Experiment.of_run(config, _connect(config), options.which)


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

    options.data.shards = options.shards or options.data.shards
    if options.shards is not None:
        given = given | {"--data.shards"}
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
