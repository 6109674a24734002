"""Batch normalisation whose statistics do not depend on the grid or on the order of the samples.

In training, a BatchNorm layer of an ordinary module would normalise by the examples of its rank and
update its running statistics once per sample, in an order that the grid decides. Here it normalises each
weight sample by the statistics of the *global* batch, and the running statistics take one step per
optimizer step, towards the mean over all samples of the job in which the layer ran.

The layers stay as they are: their calls of ``F.batch_norm`` are intercepted (`hpc_bnn.posteriors.interception`).
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..errors import ConfigError, Fault
from ..noise import from_host
from .interception import BatchDims, Shapes, calling_layer

SumOverData = Callable[[Tensor], None]
"""Replaces a tensor, in place, by its sum over the ranks with the same samples and other examples."""


class BatchNorms:
    """The layers of a module that keep running statistics of batches.

    Attributes
    ----------
    layers, sum_over_data : list of nn.Module, callable
        Those that have ``running_mean`` and ``running_var``: torch's, subclasses of them, and any others; and what sums
        the statistics of a layer over the data axis (one process: the identity).
    is_evaluating, is_batched : bool
        Whether a predictive is drawn, in which nothing may depend on the other examples; and whether several samples are
        evaluated at once, which would share their statistics.
    reads_counts : bool
        Whether a batch of one value per channel is refused: not where there are no numbers (`hpc-bnn plan`).
    shapes, batch_dims : dict or None, dict
        During a look: shapes of the inputs that were normalised without statistics of ours, by (layer, line) of the call;
        and dims of these inputs that belong to the batch, by the call and the number of dims.
    """

    def __init__(self, module: nn.Module):
        self.layers: list[Any] = []
        self._modules = dict.fromkeys(module.modules())
        for name, layer in module.named_modules():
            if isinstance(layer, _BatchNorm):
                _check(layer)
            if isinstance(layer, nn.SyncBatchNorm):
                _do_not_sync(name, layer)
            statistics = [getattr(layer, name, None) for name in ("running_mean", "running_var")]
            are_kept = all(isinstance(value, Tensor) and value.ndim == 1 for value in statistics)
            if are_kept and not isinstance(layer, _InstanceNorm):
                self.layers.append(layer)
        self.sum_over_data: SumOverData = of_one_rank
        self.is_evaluating = self.is_batched = False
        self.reads_counts = True
        self.shapes: Shapes | None = None
        self.batch_dims: BatchDims = {}
        self._numbers: dict[int, int] = {}  # of layers, by the identity of their running means
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[nn.Module, Tensor] = {}  # 1 for a layer that counts its batches itself
        self.begin()

    @property
    def num_statistics(self) -> int:
        """Floats that `write_statistics_` writes: mean and variance per channel, and numbers of layers and samples."""
        return sum(self._lengths) + 3 * len(self.layers) + 1 if self.layers else 0

    @property
    def _lengths(self) -> list[int]:
        return [2 * len(layer.running_mean) for layer in self.layers]

    def begin(self, again: bool = False) -> None:
        """Begin a step or predictive, or again a step's second pass; `ConfigError` where statistics are gone. Local."""
        for layer in self.layers:
            _check(layer)
        if again:
            self._put_counters_back()
        self._saved = {layer: counter.clone() for layer, counter in self._counters().items()}
        self._num_samples = 0
        self._callers: set[int | None] = set()
        self._uses = [0] * len(self.layers)
        self._samples = [0] * len(self.layers)
        self._last_sample = [0] * len(self.layers)
        self._momenta = [0.0] * len(self.layers)
        for number, layer in enumerate(self.layers):
            like, kept = layer.running_mean, self._sums.get(number)
            if kept is not None and (kept.shape[1], kept.dtype, kept.device) == (len(like), like.dtype, like.device):
                kept.zero_()  # it stays where it is: what is captured adds to it
            else:
                self._sums[number] = torch.zeros(2, len(like), dtype=like.dtype, device=like.device)

    def begin_sample(self) -> None:
        """Begin a sample. Local."""
        self._num_samples += 1

    @torch.no_grad()
    def write_statistics_(self, out: Tensor, share: float) -> None:
        """Write this rank's sums over samples of mean and variance, times a share, and its counts. Local.

        To ``out`` [num_statistics]; the share is 1 / num_samples on one rank of each data group, 0 on the others.
        """
        if not self.layers:
            return
        self._put_counters_back()
        # A layer that a forward uses several times counts with the mean over its uses.
        shares = [share * samples / max(uses, 1) for samples, uses in zip(self._samples, self._uses)]
        parts = [own * sums.reshape(-1).to(out.dtype) for sums, own in zip(self._sums.values(), shares)]
        samples = self._samples if share else [0] * len(self.layers)
        momenta = [count * momentum for count, momentum in zip(samples, self._momenta)]
        counters = [count * self._counts.get(layer, out.new_zeros(())) for layer, count in zip(self.layers, samples)]
        numbers = [*samples, *momenta, self._num_samples if share else 0]
        torch.cat([*parts, torch.stack(counters).to(out.dtype), from_host(numbers, out.device, out.dtype)], out=out)

    @torch.no_grad()
    def update_running_(self, statistics: Tensor) -> None:
        """Move running statistics towards the mean over all samples of the job in which their layer ran. Local."""
        number = len(self.layers)
        *parts, counters, counts, momenta, total = statistics.split([*self._lengths, number, number, number, 1])
        for n, (layer, part) in enumerate(zip(self.layers, parts)):
            momentum = self._momenta[n]
            if not self._samples[n]:  # it may have run on other ranks
                if not layer.training:
                    continue
                momentum = _snapped(float(momenta[n] / counts[n]), layer)
            ran, factor = counts[n] > 0, total / counts[n]  # exactly 1 where all samples ran
            moved = [(layer.running_mean, layer.running_var), (part * factor).view(2, -1)]
            for running, mean in zip(*moved):
                running.copy_(torch.where(ran, running.lerp(mean.to(running.dtype), momentum), running))
            if layer in self._counts:
                layer.num_batches_tracked += counters[n] > 0

    # --- what is captured: Python counts when it runs, and a replay counts as much -----------------------------

    def counted(self) -> tuple[list[int], list[float]]:
        """Return numbers of samples, uses and samples of each layer; and their momenta. Local."""
        return [self._num_samples, *self._uses, *self._samples], self._momenta.copy()

    def count_(self, counts: Sequence[int], momenta: Sequence[float]) -> None:
        """Set what `counted` returns. Local."""
        number = len(self.layers)
        self._num_samples, uses, samples = counts[0], counts[1 : number + 1], counts[number + 1 :]
        self._uses, self._samples, self._momenta = list(uses), list(samples), list(momenta)
        self._last_sample = [0] * number

    def state(self) -> list[Tensor]:
        """Return what a forward pass in training changes. Local."""
        return [*self._sums.values(), *self._counters().values()]

    def running(self) -> list[Tensor]:
        """Return what `update_running_` changes. Local."""
        statistics = [statistic for layer in self.layers for statistic in (layer.running_mean, layer.running_var)]
        return [*statistics, *self._counters().values()]

    def fixed(self) -> list[object]:
        """Return what a capture of `update_running_` fixes. Local."""
        return [*self._momenta, *(count > 0 for count in self._samples), *self._counts]

    def _counters(self) -> dict[nn.Module, Tensor]:
        counters = {layer: getattr(layer, "num_batches_tracked", None) for layer in self.layers}
        return {layer: counter for layer, counter in counters.items() if isinstance(counter, Tensor)}

    def _put_counters_back(self) -> None:
        """Undo what the layers' own forwards count: once per sample, and a step counts once."""
        for layer, counter in self._counters().items():
            self._counts[layer] = (counter - self._saved[layer]).clamp(max=1)
            counter.copy_(self._saved[layer])

    def handle(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Take the place of ``F.batch_norm``. Collective over the data group in training: two sums."""
        number = self._number_of(running_mean)
        self._callers.add(number)
        if not training or (number is None and self._is_free(input)):
            return NotImplemented
        if number is None or self.is_batched:
            raise NotImplementedError("BatchNorm in training mode")
        if self.is_evaluating:
            raise self._fault_of(self.layers[number], "it normalises by the batch in evaluation mode, too")
        y, mean, variance, count, _ = _Normalise.apply(input, eps, self.sum_over_data)
        # Read only where this rank has at most one value, and not in a look, which sums over no ranks
        if self.reads_counts and self.shapes is None and input.numel() <= input.shape[1] and count <= 1:
            self._put_counters_back()
            rule = "the batch has one value per channel in the whole job, whose variance is 0"
            remedy = "Leave out a last batch of one example (<data.drop_last> true), or use another <global_batch_size>"
            raise ConfigError(Fault("model", type(self.layers[number]).__name__, rule, remedy))
        self._uses[number] += 1
        if self._last_sample[number] != self._num_samples:
            self._last_sample[number] = self._num_samples
            self._samples[number] += 1
        self._momenta[number] = momentum
        with torch.no_grad():  # unbiased, as torch keeps it
            self._sums[number][0] += mean
            self._sums[number][1] += variance * (count / (count - 1).clamp_min(1))
        form = (1, -1) + (1,) * (input.ndim - 2)
        if weight is not None:
            y = y * weight.view(form).to(y.dtype)
        if bias is not None:
            y = y + bias.view(form).to(y.dtype)
        return y

    def _is_free(self, input: Tensor) -> bool:
        """Whether a call without running statistics of ours has nothing to do with the other examples of the batch.

        Such as one that standardises a weight, or each example by itself with the batch folded into the channels (dim 1).
        Others raise `ConfigError`, unless several samples are evaluated at once: a walk will raise it.
        """
        call = calling_layer(self._modules)
        if call is None:
            return True  # of another network
        if self.shapes is not None:
            self.shapes.setdefault(call, []).append(input.shape)
            return True
        if not self._spans_batch(call, input.shape):
            return True
        if not self.is_batched:
            raise self._fault_of(call[0], "it has no running statistics")
        return False

    def _spans_batch(self, call: Any, shape: torch.Size) -> bool:
        """Whether a call reduces over examples: a dim of the batch is another one than the channels' (dim 1)."""
        unknown = () if shape[0] == 1 else (0,)
        return not set(self.batch_dims.get((call, len(shape)), unknown)) <= {1}

    def check_calls(self, shapes: Shapes) -> None:
        """Raise `ConfigError` where one of the calls of a look normalises over the batch without statistics of ours. Local."""
        for call, inputs in shapes.items():
            for shape in inputs:
                if self._spans_batch(call, shape):
                    raise self._fault_of(call[0], "it has no running statistics")

    @staticmethod
    def _fault_of(layer: nn.Module, rule: str) -> ConfigError:
        rule += ": a prediction would depend on the examples beside it"
        remedy = "Keep buffers running_mean and running_var in the layer, for evaluation mode; or use GroupNorm"
        return ConfigError(Fault("model", type(layer).__name__, rule, remedy))

    def has_called(self, layer: nn.Module) -> bool:
        """Whether a layer has called ``F.batch_norm`` since `begin`, in either mode."""
        return layer in self.layers and self.layers.index(layer) in self._callers

    def _number_of(self, running_mean: Tensor | None) -> int | None:
        """Return the number of the layer that keeps a running mean, which may have been replaced since."""
        if running_mean is None:
            return None
        number = self._numbers.get(id(running_mean))
        if number is None or self.layers[number].running_mean is not running_mean:
            self._numbers = {id(layer.running_mean): n for n, layer in enumerate(self.layers)}
            number = self._numbers.get(id(running_mean))
        return number

    def __getstate__(self):
        return self.__dict__ | {"sum_over_data": of_one_rank, "_numbers": {}}


def _snapped(momentum: float, layer: nn.Module) -> float:
    """Return a momentum that came with a sum, as the ranks have it on which the layer ran."""
    if not math.isfinite(momentum):
        return 0.0  # it ran nowhere
    own = getattr(layer, "momentum", None)
    return own if isinstance(own, float) and math.isclose(own, momentum, rel_tol=1e-5) else momentum


def of_one_rank(tensor: Tensor) -> None:
    """Leave a tensor: the sum over one rank."""


def _check(layer: Any) -> None:
    """Raise `ConfigError` for a layer whose running statistics cannot be exact."""
    if not getattr(layer, "track_running_stats", True) or layer.running_var is None or layer.running_mean is None:
        rule = "it normalises by the batch and keeps no running statistics (track_running_stats=False)"
        raise ConfigError(Fault("model", type(layer).__name__, rule, "Keep them, or use GroupNorm"))
    if getattr(layer, "momentum", 0.1) is None:
        rule = "momentum=None gives each batch a weight that depends on how many samples came before"
        raise ConfigError(Fault("model", type(layer).__name__, rule, "Use momentum=0.1, or GroupNorm"))


def _do_not_sync(name: str, layer: nn.SyncBatchNorm) -> None:
    """Let SyncBatchNorm call ``F.batch_norm``; `ConfigError` where it has another forward."""
    forward = getattr(layer.forward, "__func__", None)
    if type(layer) is not nn.SyncBatchNorm or forward not in (nn.SyncBatchNorm.forward, _BatchNorm.forward):
        rule, what = "it sums over all ranks by itself, over those of other samples as well", type(layer).__name__
        raise ConfigError(Fault("model", f"{name} ({what})", rule, "Use the class without Sync: hpc_bnn sums"))
    layer.forward = types.MethodType(_BatchNorm.forward, layer)


def _moments(channels: Tensor, sum_over_data: SumOverData) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean [C] and variance [C] of channels [C, n], and their count [], over the global batch: two sums."""
    # Shifted by the first sum's mean: two passes, as E[x^2] - E[x]^2 loses digits.
    first = torch.cat([channels.sum(1), channels.new_full((1,), channels.shape[1])])
    sum_over_data(first)
    count = first[-1]
    mean = first[:-1] / count
    variance = (channels - mean[:, None]).square().sum(1)
    sum_over_data(variance)
    return mean, variance / count, count


def _moments_in_one_sum(channels: Tensor, sum_over_data: SumOverData) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same by one sum, of float32: each rank goes around its own mean, and float64 has the digits of the rest."""
    count = channels.shape[1]
    own = channels.sum(1) / max(count, 1)
    squares, own = (channels - own[:, None]).square().sum(1).double(), own.double()
    sums = torch.cat([count * own, squares + count * own.square(), own.new_full((1,), count)])
    sum_over_data(sums)
    total, squares, number = sums.split([len(own), len(own), 1])
    mean = total / number
    variance = (squares / number - mean.square()).clamp_min(0)
    return mean.to(channels), variance.to(channels), number[0].to(channels)


class _Normalise(torch.autograd.Function):
    """(x - mean) / std over the global batch, with its exact adjoint.

    Ioffe and Szegedy, Batch Normalization, 2015. Both directions sum over the data axis themselves; no
    library's backward of a collective is involved. The backward pass is made of outputs, so that autograd differentiates
    it once more on one rank.
    """

    @staticmethod
    def forward(ctx, x: Tensor, eps: float, sum_over_data: SumOverData):
        channels = x.transpose(0, 1).reshape(x.shape[1], -1)  # [C, n]
        if channels.dtype in (torch.float16, torch.bfloat16):
            channels = channels.float()
        is_exact = sum_over_data is of_one_rank or channels.dtype == torch.float64
        mean, variance, count = (_moments if is_exact else _moments_in_one_sum)(channels, sum_over_data)
        inverse_std = (variance + eps).rsqrt()
        form = (1, -1) + (1,) * (x.ndim - 2)
        wide = x.to(channels.dtype)  # 16 bits are too few for a difference
        y = ((wide - mean.view(form)) * inverse_std.view(form)).to(x.dtype)
        ctx.save_for_backward(y, inverse_std, count)
        ctx.sum_over_data = sum_over_data
        ctx.mark_non_differentiable(mean, variance, count)
        ctx.set_materialize_grads(False)
        return y, mean, variance, count, inverse_std

    @staticmethod
    def backward(ctx, grad: Tensor | None, *others: Tensor | None):
        y, inverse_std, count = ctx.saved_tensors
        if torch.is_grad_enabled() and ctx.sum_over_data is not of_one_rank:
            rule = "the network differentiates through it (create_graph=True), and its sums over the data axis have no slope"
            remedy = "Make <grid.sample_size> the number of ranks, or use GroupNorm"
            raise ConfigError(Fault("model", "BatchNorm", rule, remedy))
        grad = torch.zeros_like(y) if grad is None else grad
        over = [dim for dim in range(y.ndim) if dim != 1]
        wide = grad.to(inverse_std.dtype)
        sums = torch.stack([wide.sum(over), (wide * y).sum(over)])  # [2, C]
        ctx.sum_over_data(sums)
        form = (1, -1) + (1,) * (y.ndim - 2)
        mean_grad, mean_grad_y = ((s / count).view(form).to(y.dtype) for s in sums)
        x_grad = (grad - mean_grad - y * mean_grad_y) * inverse_std.view(form).to(y.dtype)
        if (std_grad := others[-1]) is not None:  # of a second derivative
            x_grad = x_grad - y * (std_grad * inverse_std.square() / count).view(form).to(y.dtype)
        return x_grad, None, None
