"""A plain network of a trained posterior: its mean, one sample, or fixed samples; inputs and outputs in units of the user."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..data.dataset import scale_of
from ..data.manifest import Manifest, inputs_of, torch_dtype
from ..errors import ConfigError, Fault, at_least
from ..likelihoods.numbers import LearnedScale
from ..posteriors.network import picked
from ..predictive import is_of_classes, member_outputs
from ..trees import Inputs, as_arguments, map_tensors
from .experiment import Experiment

What = Literal["mean", "sample", "samples"]
"""The mean of the weights; one sample of them; several samples."""


class PlainNetwork(nn.Module):
    """Networks with fixed weights, in evaluation mode, between a normalisation and what the likelihood makes of outputs.

    Nothing in it draws, and it shares no memory with a posterior: it can be copied, pickled, traced and exported.

    It takes normalisation and likelihood of an experiment, and keeps a network for each sample: they take normalised
    inputs and give what the likelihood takes. ``has_std`` says that the standard deviation is returned, too.
    """

    def __init__(self, experiment: Experiment, networks: list[nn.Module], has_std: bool):
        super().__init__()
        manifest = experiment.manifest
        self.networks, self.has_std = nn.ModuleList(networks), has_std
        self.likelihood, self._output = copy.deepcopy(experiment.likelihood), experiment.posterior.network.output
        self._names = list(manifest.inputs)
        self._dtype, self._result = experiment.dtype, torch.float64 if experiment.is_wide else torch.float32
        normalise = experiment.normalisation
        for name, numbers in (normalise.working | {"y": normalise.scales.get("y", ())}).items():
            for kind, number in zip(("mean", "std"), numbers):
                self.register_buffer(f"{name}_{kind}", number.clone())
        self.eval().requires_grad_(False)

    @property
    def output_names(self) -> list[str]:
        """Names of what `forward` returns, as in `Predictor.predict`."""
        return ["mean" if self.likelihood.num_classes is None else "probabilities"] + ["std"] * self.has_std

    def forward(self, x: Inputs) -> Tensor | tuple[Tensor, Tensor]:
        """Return the prediction for inputs.

        Parameters
        ----------
        x : Tensor [B, ...], or dict of them
            Inputs as they are in the shards, not normalised; a dict where the network has several.

        Returns
        -------
        Tensor, or tuple of two
            Class probabilities [B, C, ...], or the mean [B, targets, ...] in units of y. Of samples the mean over them and
            the standard deviation: that of the probabilities over the samples, or the total one of y.
        """
        inputs = self.normalised(x)
        predictions = [self._prediction(self.outputs(network, inputs)) for network in self.networks]
        if not self.has_std:
            return predictions[0][0].to(self._result)
        members = torch.stack([members for members, _ in predictions])
        mean = members.mean(0)
        variance = (members - mean).square().mean(0)
        if not is_of_classes(self.likelihood):
            variance = variance + torch.stack([aleatoric for _, aleatoric in predictions]).mean(0)
        return mean.to(self._result), variance.sqrt().to(self._result)

    def normalised(self, x: Inputs) -> Inputs:
        """Return the inputs as the networks take them."""
        arrays = x if isinstance(x, dict) else {"x": x}
        return inputs_of({name: self._normalised(name, arrays[name]) for name in self._names})

    def _normalised(self, name: str, values: Tensor) -> Tensor:  # as `Normalisation`, without a change in place
        if (scale := self._scale(name)) is not None:
            values = (values.to(scale[0].dtype) - scale[0]) / scale[1]
        if scale is not None or values.is_floating_point():
            return values.to(self._dtype)
        return values if values.dtype in (torch.bool, torch.int32) else values.long()

    def _scale(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return the mean and standard deviation of an array that is normalised."""
        found = [self._buffers.get(f"{name}_{kind}") for kind in ("mean", "std")]
        return None if found[0] is None or found[1] is None else (found[0], found[1])

    def outputs(self, network: nn.Module, inputs: Inputs) -> Tensor:
        """Return what a network gives [B, num_outputs, ...] for normalised inputs, which it may change."""
        arguments, named = as_arguments(map_tensors(Tensor.clone, inputs))
        return picked(network(*arguments, **named), self._output, type(network).__name__).to(self._dtype)

    def _prediction(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prediction of a network, and its aleatoric variance where samples of numbers need it."""
        likelihood, wide = self.likelihood, self.has_std or self._result == torch.float64
        outputs = outputs.double() if wide else outputs  # small differences of members, or of a large mean
        if is_of_classes(likelihood):
            return likelihood.probabilities(outputs), outputs
        mean = likelihood.mean(outputs)
        variance = likelihood.variance(outputs) if self.has_std else mean
        if (scale_of_y := self._scale("y")) is None:
            return mean, variance
        shift, scale = (number.to(mean.dtype) for number in scale_of_y)
        return mean * scale + shift, variance * scale.square()


def plain_network(
    experiment: Experiment, what: What, *, sample: int | None = None, num_samples: int | None = None
) -> PlainNetwork:
    """Return a plain network of the posterior of an experiment (`Predictor.as_module`). Local: an experiment of one process.

    Each sample has proven that it gives what the posterior gives, for two made-up examples.
    """
    posterior, few = experiment.posterior, example_inputs(experiment.manifest)
    if what not in get_args(What):
        raise ConfigError(Fault("--what", what, f"there are {', '.join(get_args(What))}", "Name one of them", "what"))
    for name, value, fits in (("sample", sample, "sample"), ("num_samples", num_samples, "samples")):
        if value is not None:
            if what != fits:
                raise ConfigError(Fault(f"--{name}", value, f"it is for --what {fits}", "Leave it out", name))
            at_least(int(what == "samples"), "Leave it out").check(f"--{name}", value, name)
    if what == "mean":
        try:
            mean = copy.deepcopy(posterior.use_mean_())
        except NotImplementedError as error:
            rule, remedy = str(error), "Use --what samples"
            raise ConfigError(Fault("--what", what, rule, remedy, "what")) from error
        return PlainNetwork(experiment, [mean], has_std=False)
    test = experiment.test_samples
    total = num_samples or max(test["num_samples"], (sample or 0) + 1)
    wanted = range(total) if what == "samples" else [sample or 0]
    arrays = {name: values.to(experiment.comm.device, copy=True) for name, values in few.items()}
    inputs = inputs_of(experiment.normalisation(arrays))
    found, walk = [], member_outputs(posterior, experiment.comm, inputs, total, test["seed"], batch_size=2)
    with contextlib.closing(walk):
        for (number, *_), outputs in walk:
            if number in wanted:
                found.append((_copied(experiment), outputs[0]))
            if number == wanted[-1]:
                break
    plain = PlainNetwork(experiment, [network for network, _ in found], has_std=what == "samples")
    tolerance = 1e-10 if experiment.dtype == torch.float64 else 1e-4
    with torch.no_grad():
        normalised = plain.normalised({name: values.to(experiment.comm.device) for name, values in few.items()})
        for network, outputs in found:
            own = plain.outputs(network, normalised).double()
            if not torch.allclose(own, outputs, tolerance, tolerance * outputs.abs().max().item(), equal_nan=True):
                rule = (
                    "a copy of it with the weights and masks of a sample gives other numbers than the posterior: it drops in a "
                    "fused layer (nn.TransformerEncoderLayer), or its forward changes or draws something"
                )
                raise ConfigError(Fault("model", type(network).__name__, rule, "Use the predictor"))
    return plain


class FixedMask(nn.Module):
    """Multiplies by the mask of one sample, in the place of a dropout layer."""

    mask: Tensor

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return the numbers that the mask keeps, scaled."""
        return x * self.mask.to(x.dtype)


def own_network(plain: PlainNetwork) -> nn.Module:
    """Return the only network of a plain one, as the class of the user made it; `ConfigError` where it is not such. Local."""
    (network,) = plain.networks
    if any(isinstance(layer, FixedMask) for layer in network.modules()):
        rule = "a sample of MC dropout is a mask, for which the class of the network has no place"
        raise ConfigError(Fault("--what", "sample", rule, "Write an .onnx file, or use --what mean", "what"))
    return network.network if isinstance(network, LearnedScale) else network


def example_inputs(manifest: Manifest) -> dict[str, Tensor]:
    """Return inputs [2, ...] of two made-up examples, by name, as they would be in the shards. Local."""
    found = {}
    for name, spec in manifest.inputs.items():
        dtype, ramp = torch_dtype(spec.dtype), torch.linspace(-1, 1, 2 * math.prod(spec.shape), dtype=torch.float64)
        ramp = ramp.view(2, *spec.shape)
        if name in manifest.statistics:
            mean, std = scale_of(manifest, name, "cpu")
            ramp = mean + std * ramp
        elif not dtype.is_floating_point:
            ramp = torch.zeros_like(ramp)  # an id that each embedding has
        if not (dtype.is_floating_point or dtype == torch.bool):
            limits = torch.iinfo(dtype)
            ramp = ramp.clamp(limits.min, limits.max)
        found[name] = ramp.to(dtype)
    return found


def _copied(experiment: Experiment) -> nn.Module:
    """Return a copy of the network as it is now, with the masks of the sample drawn last in the place of its dropout."""
    posterior = experiment.posterior
    dropout, twin = posterior.network.dropout, copy.deepcopy(posterior.module)
    masks = dropout.drawn() if dropout.always else {}
    for name, layer in posterior.module.named_modules(remove_duplicate=False):
        if layer in masks:
            parent, _, child = name.rpartition(".")
            twin.get_submodule(parent)._modules[child] = FixedMask(masks[layer])
    return twin
