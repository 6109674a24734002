"""A trained network in one file: its whole posterior, a plain network as ONNX, or the weights of a plain one."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import __version__
from ..comm import GridComm
from ..config import Config
from ..data import Manifest
from ..data.manifest import sha256_of_json
from ..errors import ConfigError, DataError, Fault
from ..safe_files import check_can_write, refuse_world_writable, replacing
from .calibrate import kept_calibration
from .experiment import Experiment
from .export import check_is_free, is_there
from .plain_network import PlainNetwork, What, example_inputs, own_network, plain_network

FORMAT, VERSION = "hpc_bnn posterior", 1
"""Of a .safetensors file; the name is the only key of its metadata, which are JSON."""
POSTERIOR, ONNX, WEIGHTS = ".safetensors", ".onnx", ".pt"
"""Suffixes."""
ONNX_BYTES = 2**31 - 2**20
"""An ONNX file of one piece is a message of less than 2 GiB."""


def export_model(
    experiment: Experiment,
    output: str | os.PathLike,
    *,
    what: What | None = None,
    sample: int | None = None,
    num_samples: int | None = None,
) -> Path:
    """Write a trained network to one file (`Predictor.export`). Local: an experiment of one process."""
    path = Path(output)
    _check_form(path, what, sample, num_samples)
    check_is_free(path)
    check_can_write(path, "--output")
    try:
        with replacing(path, overwrites=False) as temporary:
            if what is None:
                _write_posterior(experiment, temporary)
                return path
            plain = plain_network(experiment, what, sample=sample, num_samples=num_samples)
            if path.suffix == ONNX:
                _write_onnx(plain.cpu(), example_inputs(experiment.manifest), temporary)
            else:
                torch.save(_on_cpu(own_network(plain).state_dict()), temporary)
    except FileExistsError as error:
        raise is_there(path) from error
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error}). Look at the disk and the rights") from error
    return path


def read_posterior(path: Path, comm: GridComm) -> Experiment:
    """Return the experiment of a .safetensors file, without the run that it is of. Local: a grid of one process.

    It raises `DataError` where the file is missing, damaged, of another kind or a newer version; `ConfigError` without
    safetensors, or where the config names what this hpc_bnn or this machine does not have.
    """
    safetensors = _package("safetensors", path)
    if not path.is_file():
        raise DataError(f"{path} is not there, or no file. Name what hpc-bnn export has written")
    refuse_world_writable(path, "the file")
    try:
        with safetensors.safe_open(path, "pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} cannot be read, or is damaged ({error}). Export it again, or copy it again") from error
    if FORMAT not in metadata:
        raise DataError(
            f"{path} is no posterior of hpc_bnn: it has no metadata '{FORMAT}'. Use what hpc-bnn export writes"
        )
    content: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(metadata[FORMAT])
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest(content, tensors):
        raise DataError(f"{path} was changed after it was written (SHA-256). Export it again, or copy it again")
    if content["version"] != VERSION:
        raise DataError(
            f"{path} is of version {content['version']}, which hpc_bnn {__version__} does not know. hpc_bnn "
            f"{content['versions']['hpc_bnn']} wrote it: use that version, or a newer one"
        )
    config = Config.from_dict(content["config"])
    manifest = Manifest.parse(content["manifest"].encode(), path, has_files=False)
    # Its weights are in the file: those that the training began with are not needed
    experiment = Experiment(replace(config, model=replace(config.model, pretrained=None)), comm, manifest)
    experiment.config, experiment.file, experiment.calibration = config, path, content["calibration"]
    experiment.checkpoints.identity = content["run"]
    experiment.restore(tensors, content["num_steps"])
    return experiment


def _check_form(path: Path, what: str | None, sample: int | None, num_samples: int | None) -> None:
    """Raise `ConfigError` where a file cannot hold what is asked for. Local."""
    fault = None
    if path.suffix not in (POSTERIOR, ONNX, WEIGHTS):
        rule = "its suffix says what to write"
        remedy = f"Use {POSTERIOR} (the whole posterior), {ONNX} or {WEIGHTS} (state_dict)"
        fault = Fault("--output", path, rule, remedy, "output")
    elif path.suffix == POSTERIOR and (what, sample, num_samples) != (None, None, None):
        rule = f"a {POSTERIOR} file holds the whole posterior"
        fault = Fault("--what", what, rule, "Leave out --what, --sample and --num_samples", "what")
    elif path.suffix != POSTERIOR and what is None:
        rule = f"a {path.suffix} file holds a plain network"
        fault = Fault("--what", what, rule, "Use --what mean, sample or samples", "what")
    elif path.suffix == WEIGHTS and what == "samples":
        rule = f"a {WEIGHTS} file holds the weights of one network"
        fault = Fault("--what", what, rule, f"Use --what sample, or an {ONNX} file", "what")
    if fault is not None:
        raise ConfigError(fault)


def _package(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        rule = f"it needs {name} ({error})"
        remedy = "Install the extra: pip install 'hpc_bnn[export]'"
        raise ConfigError(Fault("--output", path, rule, remedy, "file")) from error


def _write_posterior(experiment: Experiment, path: Path) -> None:
    save = _package("safetensors.torch", path).save_file
    tensors = _on_cpu(experiment.posterior.state_dict())
    content = {
        "version": VERSION,
        "config": experiment.config.to_dict(),
        "manifest": experiment.manifest.to_json(),
        "run": experiment.checkpoints.identity,
        "num_steps": experiment.num_steps,
        "calibration": kept_calibration(experiment),
        "versions": {"hpc_bnn": __version__, "torch": torch.__version__},
    }
    mode = path.stat().st_mode
    # One key: safetensors writes several in any order, and equal models give equal files
    save(tensors, path, {FORMAT: json.dumps(content | {"sha256": _digest(content, tensors)})})
    path.chmod(mode)  # safetensors makes a file that nobody else may read, and this is made to be given away


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def _digest(content: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of what a file says and of its tensors."""
    digest = hashlib.sha256(sha256_of_json(content).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_onnx(plain: PlainNetwork, example: dict[str, Tensor], path: Path) -> None:
    onnx, _ = (_package(name, path) for name in ("onnx", "onnxscript"))
    num_bytes = sum(tensor.nbytes for tensor in plain.state_dict().values())
    if num_bytes > ONNX_BYTES:
        rule = f"its weights are {num_bytes / 2**30:.1f} GiB, and an ONNX file of one piece holds 2 GiB"
        raise ConfigError(Fault("--num_samples", len(plain.networks), rule, "Use fewer, or --what mean", "num_samples"))
    batch, is_one = {0: torch.export.Dim("batch")}, list(example) == ["x"]
    inputs = {"x": example["x"] if is_one else example}
    shapes = {"x": batch if is_one else dict.fromkeys(example, batch)}
    names: dict[str, Any] = {"input_names": list(example), "output_names": plain.output_names}
    try:
        with torch.no_grad():
            # Given the module itself, torch.onnx would turn what depends on the numbers of an input into a constant
            exported = torch.export.export(plain, (), inputs, dynamic_shapes=shapes)
            if any(map(_is_wide_attention, exported.graph.nodes)):
                with sdpa_kernel(SDPBackend.MATH):
                    exported = exported.run_decompositions()
            program = torch.onnx.export(exported, dynamo=True, verbose=False, **names)
        assert program is not None, "dynamo=True returns one"
        for node in program.model.graph:
            node.metadata_props.clear()  # stack traces: paths and lines of code of this machine, most of the file
            for value in node.outputs:  # a network may have a `mean` of its own
                if value.name in plain.output_names and not value.is_graph_output():
                    value.name = f"inner_{value.name}"
        program.save(path, external_data=False)  # one file
        onnx.checker.check_model(path, full_check=True)
    except OSError:
        raise
    except Exception as error:  # of torch.export, of the translation, of onnx: each has errors of its own
        cause = error.__cause__ or error
        rule = f"torch.onnx cannot write this network ({type(cause).__name__}: {str(cause).strip()[:500]})"
        remedy = "Change what it names, or use predictor.as_module and an exporter of your own"
        raise ConfigError(Fault("model", type(plain.networks[0]).__name__, rule, remedy)) from error


def _is_wide_attention(node: torch.fx.Node) -> bool:
    """Whether it is attention of other than 4 dims, such as that of windows, which torch.onnx does not translate."""
    is_attention = node.target is torch.ops.aten.scaled_dot_product_attention.default
    return is_attention and isinstance(node.args[0], torch.fx.Node) and node.args[0].meta["val"].ndim != 4
