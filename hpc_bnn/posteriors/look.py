"""A look at how a module treats its inputs, its weights and noise, before it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..errors import ConfigError, Fault
from ..trees import Inputs, map_tensors, num_rows, tensors_of
from .batch_norm import of_one_rank
from .interception import Shapes, batch_dims
from .layout import take_gradients
from .select import shortened

if TYPE_CHECKING:
    from .network import Network


class _Pass(NamedTuple):
    """What a pass of a look has given, and what it had changed."""

    of_draw: list[str]  # global generators that the draw of the weights has used
    outputs: Tensor
    changed: dict[str, list[str]]
    written: list[str]  # drawn weights that the forward pass has written itself
    moved: list[str]  # weights to which it has given other memory
    unreached: list[str]  # drawn weights that no gradient reaches, where it was asked for
    normalised: Shapes
    dropped: Shapes
    graph: set  # nodes of the graph of its outputs, if it stays


_IN_BOTH_MODES = (
    "Call nn.Dropout or torch.nn.functional.dropout in both modes (hpc_bnn drops in both), and give "
    "scaled_dot_product_attention its dropout_p in both"
)


@dataclass(frozen=True)
class Look:
    """What a look at a module has found."""

    name: str  # class of the module
    of_draw: Sequence[str]  # global generators of random numbers that the family itself draws from
    generators: Sequence[str]  # global generators of random numbers that its forward pass draws from
    is_repeatable: bool  # whether two passes with the same sample gave the same outputs
    buffers: Sequence[str]  # that its forward pass changes by itself
    changes_input: bool  # in place
    changes_attributes: bool  # whether it leaves something in attributes or buffers
    carried: Sequence[str]  # attributes and buffers by which one sample changes the outputs of the next
    unreached: Sequence[str]  # random weights that no gradient reaches
    unused: Sequence[str]  # those of them on which the outputs do not depend either
    undropped: Sequence[str]  # layers that ask for dropout in training, and not where it should drop in a predictive
    is_of_batch: bool  # whether the outputs of an example depend on the examples beside it
    is_replayable: bool  # whether its operations alone do what it does: it leaves nothing, and draws nothing

    def warnings(self, world_size: int) -> list[str]:
        """Return what a user should know, on so many ranks."""
        found = []
        if self.of_draw:
            found.append(
                f"sample_ of the posterior's family draws from {' and '.join(self.of_draw)}; these numbers are not keyed by the "
                "sample, and the result depends on the process grid. Use draw.affine_, draw.noise or draw.normal"
            )
        elif self.generators or not self.is_repeatable:
            source = " and ".join(self.generators) or "generators of its own: two passes of one sample differ"
            found.append(
                f"the forward pass of {self.name} draws from {source}; these numbers are not keyed by the sample, and "
                "the result depends on the process grid. Use nn.Dropout or torch.nn.functional.dropout, and set the "
                "rates of other noise (stochastic depth) to 0"
            )
        if self.carried:
            found.append(
                f"the forward pass of {self.name} keeps something of one sample for the next, in {shortened(self.carried)}: "
                "samples are not independent, and the result depends on their order and on the process grid. Begin each "
                "forward pass anew, or take no part of the state that depends on weights"
            )
        if self.is_of_batch:
            found.append(
                f"the outputs of {self.name} for an example depend on the examples beside it: the result depends on the process grid, "
                "on micro-batches and on the batch size of a prediction. Compute what it computes over the batch (dim 0) of each example "
                "alone, or use nn.BatchNorm1d, whose statistics are those of the global batch"
            )
        if self.undropped:
            found.append(
                f"{shortened(self.undropped)} of {self.name} ask for dropout in training, and not in evaluation mode: it is "
                f"left out of the predictive. {_IN_BOTH_MODES}"
            )
        for names, what in (
            (self.unused, "the outputs do not depend on them"),
            (self.unreached, "detach() cuts them off"),
        ):
            if names:
                found.append(
                    f"no gradient reaches the random weights {shortened(names)} of {self.name}, as {what}: they follow the "
                    "prior alone. Freeze them before the posterior is made (requires_grad_(False)), if they are meant to be "
                    "unused; otherwise look for copies, and for what is computed without gradient"
                )
        if self.buffers and world_size > 1 and not self.carried:
            names = ", ".join(self.buffers[:5]) + (" and more" if self.buffers[5:] else "")
            found.append(
                f"the forward pass of {self.name} changes the buffers {names}, once for each sample and rank: they, and "
                "what depends on them, differ by the process grid"
            )
        return found


class Looker:
    """Makes a few passes of a module that leave no trace; ``draw`` puts the weights of a global sample into the module."""

    def __init__(self, network: Network, draw: Callable[[int], None], autocast_dtype: torch.dtype | None = None):
        self._network, self._draw, self._autocast_dtype = network, draw, autocast_dtype

    def look(self, x: Inputs, samples: Sequence[int]) -> Look:
        """See how the module treats inputs [B, ...] like x, B > 0, by one sample or two. Local.

        `ConfigError` where a posterior cannot train it: statistics or masks cannot be intercepted, or weights do not
        reach the outputs: those of two samples are equal.
        """
        network = self._network
        norms, dropout = network.batch_norms, network.dropout
        sum_over_data, norms.sum_over_data = norms.sum_over_data, of_one_rank  # a look: no collective
        with network.nothing_derived():
            self._before = network.traces()
        try:
            with network.interception.watching(set(network.layers)) as unseen:
                norms.begin()
                inputs = map_tensors(Tensor.clone, x)
                with self._subclasses_that_run() as ran:
                    first = self._one(samples[0], inputs, wants_gradient=torch.is_grad_enabled())
                self._refuse_what_is_not_intercepted(unseen, ran, first)
                changes_input = any(map(_is_written, tensors_of(inputs), tensors_of(x)))
                again = self._one(samples[0], map_tensors(Tensor.clone, x))
                if network.drawn and len(samples) > 1 and first.outputs.isfinite().all():
                    self._check_that_weights_matter(x, first.outputs, samples[1])
                if len(first.unreached) == len(network.parameters):
                    rule = (
                        "no gradient reaches any of its weights: its forward pass calls no_grad(), detach() or the like"
                    )
                    remedy = "Leave these calls out in training mode"
                    raise ConfigError(Fault("model", type(network.module).__name__, rule, remedy))
                carried = self._carried(x, first, samples) if not norms.is_evaluating else []
                unused = self._unused(x, first, samples[0])
                if first.normalised or first.dropped:
                    with contextlib.suppress(Exception):  # some modules want all of their examples
                        part = self._one(samples[0], other_number(x))
                        norms.batch_dims |= batch_dims(first.normalised, part.normalised)
                        dropout.batch_dims |= batch_dims(first.dropped, part.dropped)
                    norms.check_calls(first.normalised)
                is_of_batch = self._is_of_batch(x, first, samples[0])
        finally:
            self._put_back()
            norms.sum_over_data = sum_over_data
            network.allow_writes()
        tolerance = 1e-6 if first.outputs.device.type == "cpu" else 2e-2  # elsewhere kernels may be chosen anew
        is_repeatable = is_alike(first.outputs, again.outputs, tolerance)
        leaves = first.changed["attribute"] or first.changed["generator"] or self._own_buffers(first)
        return Look(
            type(network.module).__name__,
            first.of_draw,
            first.changed["generator"],
            is_repeatable,
            self._own_buffers(first),
            changes_input,
            bool(first.changed["attribute"] + first.changed["buffer"]),
            carried,
            [name for name in first.unreached if name not in unused],
            unused,
            self._undropped(first),
            is_repeatable and is_of_batch,
            is_repeatable and not leaves,
        )

    def _undropped(self, first: _Pass) -> list[str]:
        """Return the names of layers whose masks of training a predictive leaves out; `ConfigError` if all. Local."""
        network, dropout = self._network, self._network.dropout
        if not network.batch_norms.is_evaluating:
            dropout.in_training |= first.dropped.keys() if network.module.training else set()
            return []
        if dropout.always and not first.dropped:
            rule = "it asks for no dropout in evaluation mode: all samples of the predictive would be equal"
            raise ConfigError(Fault("model", type(network.module).__name__, rule, _IN_BOTH_MODES))
        names = {layer: name or type(layer).__name__ for name, layer in network.module.named_modules()}
        missing = dropout.in_training - first.dropped.keys() if dropout.always else set()
        return list(dict.fromkeys(names[layer] for layer in map(dropout.layer_of, sorted(missing)) if layer in names))

    def _put_back(self) -> dict[str, list[str]]:
        with self._network.nothing_derived():
            return self._before.put_back()

    def _one(
        self,
        sample: int,
        inputs: Inputs,
        scale: float = 1.0,
        only: Sequence[str] | None = None,
        wants_gradient: bool = False,
        stays: bool = False,
    ) -> _Pass:
        """Make one pass with (``only`` some) random weights times ``scale``; put all back unless it ``stays``."""
        network = self._network
        norms, dropout = network.batch_norms, network.dropout
        norms.shapes, dropout.shapes = {}, {}
        try:
            self._draw(sample)
            of_draw = self._before.generators_used()
            for name in (network.drawn if only is None else only) if scale != 1 else ():
                network.parameters[name].detach().mul_(scale).add_(0.01 * (scale - 1))
            versions = network.versions()
            outputs = network(inputs, self._autocast_dtype)
            if wants_gradient:
                self._refuse_foreign(outputs)
            unreached = self._unreached(outputs) if wants_gradient else []
            graph = self._freed_graph(outputs) if stays else set()
            outputs = outputs.detach().clone()
            pairs = zip(network.drawn, versions, network.versions())
            written = [name for name, before, after in pairs if before != after]
            moved = network.put_memory_back()
            changed = {} if stays else self._put_back()
            return _Pass(of_draw, outputs, changed, written, moved, unreached, norms.shapes, dropout.shapes, graph)
        finally:
            network.put_memory_back()
            norms.shapes = dropout.shapes = None

    def _refuse_foreign(self, outputs: Tensor) -> None:
        """Raise `ConfigError` where outputs have a gradient for parameters that the module does not hold. Local."""
        ours = {id(p) for p in self._network.module.parameters()}
        for node in graph_of(outputs):
            leaf = getattr(node, "variable", None)  # of a leaf of the graph
            if isinstance(leaf, nn.Parameter) and leaf.requires_grad and id(leaf) not in ours:
                rule = f"a parameter {list(leaf.shape)} outside of it enters its outputs and wants a gradient: it would not be trained"
                remedy = (
                    "Let the network hold it before the posterior is made (nn.ModuleList for a list, a layer for a head), or call "
                    "requires_grad_(False)"
                )
                raise ConfigError(Fault("model", type(self._network.module).__name__, rule, remedy))

    def _freed_graph(self, outputs: Tensor) -> set:
        """Return the nodes of a graph but for its leaves; their tensors are freed, as after a step. Local."""
        nodes = {node for node in graph_of(outputs) if not hasattr(node, "variable")}
        if nodes:
            with contextlib.suppress(Exception):  # reentrant checkpointing, for example
                torch.autograd.grad(outputs.sum(), self._network.drawn_parameters(), allow_unused=True)
        return nodes

    def _unreached(self, outputs: Tensor) -> list[str]:
        """Return the drawn weights that no gradient reaches, none where autograd cannot tell; all weights if all. Local."""
        network = self._network
        if not outputs.requires_grad:
            return list(network.parameters)
        with contextlib.suppress(Exception):  # reentrant checkpointing, for example
            parameters = network.drawn_parameters()
            gradients = torch.autograd.grad(outputs.sum(), parameters, allow_unused=True, retain_graph=True)
            if any(gradient is None for gradient in gradients):  # reentrant checkpoints show at the backward pass only
                take_gradients(parameters)
                outputs.sum().backward()
                gradients = take_gradients(parameters)
            return [name for name, gradient in zip(network.drawn, gradients) if gradient is None]
        return []

    def _unused(self, x: Inputs, first: _Pass, sample: int) -> list[str]:
        """Return those weights without gradient that do not change the outputs by a large change of theirs. Local."""
        if not first.unreached or not first.outputs.isfinite().all():
            return []
        other = self._one(sample, map_tensors(Tensor.clone, x), scale=-1.5, only=first.unreached)
        return list(first.unreached) if torch.equal(first.outputs, other.outputs) else []

    def _is_of_batch(self, x: Inputs, first: _Pass, sample: int) -> bool:
        """Whether outputs of half of the examples are others than with the rest beside them; False beside BatchNorm. Local."""
        norms = self._network.batch_norms
        if not any(layer.training and norms.has_called(layer) for layer in norms.layers):
            with contextlib.suppress(Exception):  # some modules want all of their examples
                # The first pass did not yet know in which dims of a mask the examples are
                whole = (self._one(sample, map_tensors(Tensor.clone, x)) if first.dropped else first).outputs
                part = self._one(sample, other_number(x)).outputs
                few = min(len(whole), len(part))
                is_rough = self._autocast_dtype or whole.device.type != "cpu" or torch.is_autocast_enabled("cpu")
                tolerance = 5e-2 if is_rough else 1e-9 if whole.dtype == torch.float64 else 1e-3
                return whole.shape[1:] == part.shape[1:] and not is_alike(part[:few], whole[:few], tolerance)
        return False

    def _carried(self, x: Inputs, first: _Pass, samples: Sequence[int]) -> list[str]:
        """Return what a pass leaves that changes the next sample's outputs; `ConfigError` if it stays, or has a graph. Local."""
        left = self._own_buffers(first) + first.changed["attribute"]
        if not left or first.changed["generator"]:
            return []
        alone = self._one(samples[-1], map_tensors(Tensor.clone, x))
        try:
            order = samples[0], samples[-1], samples[0]
            before, behind, again = [self._one(s, map_tensors(Tensor.clone, x), stays=True) for s in order]
        finally:
            self._put_back()
        if is_alike(alone.outputs, behind.outputs, 1e-6):
            return []
        if is_alike(first.outputs, again.outputs, 1e-6):
            rule = "its forward pass keeps it from one sample of the weights for all others"
            remedy = "Compute it in each forward pass in training mode, or freeze the weights that it is made of"
            raise ConfigError(Fault("model", shortened(left), rule, remedy))
        if before.graph & behind.graph:
            rule = "its forward pass keeps it with its graph: the gradient of a sample would go on into the sample before it"
            remedy = "Keep it detached: self.state = state.detach(), or begin each forward pass anew"
            raise ConfigError(Fault("model", shortened(left), rule, remedy))
        return left

    def _own_buffers(self, a_pass: _Pass) -> list[str]:
        """Return the buffers that a pass has changed, but for the counters of BatchNorm layers, which a step mends."""
        counters = {id(getattr(layer, "num_batches_tracked", None)) for layer in self._network.batch_norms.layers}
        buffers = dict(self._network.module.named_buffers(remove_duplicate=False))
        return [name for name in a_pass.changed["buffer"] if id(buffers.get(name)) not in counters]

    @contextlib.contextmanager
    def _subclasses_that_run(self) -> Iterator[list[nn.Module]]:
        """Give a list of those BatchNorm and dropout layers that run with a forward of their own."""
        ran: list[nn.Module] = []
        handles = [
            layer.register_forward_hook(lambda layer, *_: ran.append(layer))
            for layer in self._network.layers
            if isinstance(layer, (_BatchNorm, _DropoutNd)) and not type(layer).forward.__module__.startswith("torch.")
        ]
        try:
            yield ran
        finally:
            for handle in handles:
                handle.remove()

    def _refuse_what_is_not_intercepted(
        self, unseen: Sequence[nn.Module], ran: Sequence[nn.Module], first: _Pass
    ) -> None:
        changed = first.changed
        layers = dict(self._network.module.named_modules())
        names = {layer: f"{name} ({type(layer).__name__})" for name, layer in layers.items()}
        norms, faults = self._network.batch_norms, []
        for layer in dict.fromkeys(unseen):
            rule = "it keeps dropout or batch_norm of torch.nn.functional in a way in which it cannot be replaced"
            remedy = "Call it as torch.nn.functional.dropout, or use the layer nn.Dropout (nn.BatchNorm2d)"
            faults.append(Fault("model", names[layer], rule, remedy))
        moved = {name.removesuffix("running_mean") for name in changed["buffer"] if name.endswith("running_mean")}
        moved = [layers[prefix.rstrip(".")] for prefix in moved]
        ran = [layer for layer in ran if layer.training]
        normalising = [layer for layer in ran if isinstance(layer, _BatchNorm)]
        normalising += [layer for layer in moved if layer in norms.layers]
        for layer in dict.fromkeys(normalising):
            if not norms.has_called(layer):
                rule = "its statistics of the batch are made elsewhere than in torch.nn.functional.batch_norm"
                remedy = "Call that function, use torch's BatchNorm or GroupNorm, or freeze the layer with eval()"
                faults.append(Fault("model", names[layer], rule, remedy))
        if first.moved:
            rule = "its forward pass gives these weights other memory (.data = ...), which no draw reaches"
            remedy = "Write into them: weight.data.copy_(...), or compute another tensor"
            faults.append(Fault("model", shortened(first.moved), rule, remedy))
        if first.written and not norms.is_evaluating and (self._own_buffers(first) or changed["attribute"]):
            rule = "its forward pass writes these weights and notes that it has: the next draw would undo it"
            remedy = "Run the network once on a batch before the posterior is made"
            faults.append(Fault("model", shortened(first.written), rule, remedy))
        dropping = [layer for layer in ran if isinstance(layer, _DropoutNd) and layer.p > 0]
        for layer in dict.fromkeys(dropping) if changed["generator"] else ():
            if not self._network.dropout.asked(layer, first.dropped):
                rule = f"its masks come from {' and '.join(changed['generator'])}, not from torch.nn.functional.dropout"
                remedy = "Call that function, or use nn.Dropout: then they are keyed by the sample"
                faults.append(Fault("model", names[layer], rule, remedy))
        if faults:
            raise ConfigError(*faults)

    def _check_that_weights_matter(self, x: Inputs, outputs: Tensor, other: int) -> None:
        """Raise `ConfigError` where the outputs of two samples are equal, and those of far away weights, too."""
        if not torch.equal(outputs, self._one(other, map_tensors(Tensor.clone, x)).outputs):
            return
        generator = torch.Generator().manual_seed(0)
        noise = map_tensors(
            lambda t: torch.randn(t.shape, generator=generator).to(t) if t.is_floating_point() else t, x
        )
        kept = {name: p.detach().clone() for name, p in self._network.parameters.items()}
        try:  # a last layer of zeros, for example, hides the others: move all weights, and try other inputs
            for number, name in enumerate(kept):
                if name not in self._network.drawn:
                    self._network.parameters[name].detach().add_(0.1 + 0.01 * number)
            for inputs in (x, noise):
                near, far = (self._one(other, map_tensors(Tensor.clone, inputs), scale).outputs for scale in (1.0, 1.5))
                if not torch.equal(near, far):
                    return
        finally:
            for name, former in kept.items():
                self._network.parameters[name].detach().copy_(former)
        rule = f"the outputs do not depend on its {len(self._network.drawn)} random weights: all samples would be equal"
        remedy = "Its forward must read its own parameters: look for copies, caches and weights held elsewhere"
        raise ConfigError(Fault("model", type(self._network.module).__name__, rule, remedy))


def graph_of(outputs: Tensor) -> Iterator:
    """Yield the nodes of the graph of outputs, its leaves among them, each once."""
    seen, nodes = set(), [outputs.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            yield node


def _is_written(clone: Tensor, original: Tensor) -> bool:
    """Whether a clone of inputs was changed in place."""
    return (not clone.is_inference() and clone._version > 0) or not is_alike(clone, original, 0.0)


def other_number(x: Inputs) -> Inputs:
    """Return copies of half of the examples, or of one twice."""
    count = num_rows(x)
    return map_tensors(lambda t: t[: count // 2].clone() if count > 1 else torch.cat([t, t]), x)


def _parts_of(sparse: Tensor) -> tuple[Tensor, ...]:
    if sparse.layout == torch.sparse_coo:
        sparse = sparse.coalesce()
        return sparse.indices(), sparse.values()
    return sparse.crow_indices(), sparse.col_indices(), sparse.values()


def is_alike(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two tensors are equal up to a part of their norm; NaN is like NaN."""
    if a.shape != b.shape or a.layout != b.layout:
        return False
    if a.layout != torch.strided:
        return all(is_alike(*parts, tolerance) for parts in zip(_parts_of(a), _parts_of(b)))
    if torch.equal(a, b):
        return True
    a, b = (t.double().nan_to_num() for t in (a, b))
    return bool((a - b).norm() <= tolerance * b.norm())
