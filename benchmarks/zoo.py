#!/usr/bin/env python3
"""Public networks through hpc_bnn, each compared with the plain module.

    python benchmarks/zoo.py --json rows.jsonl [--timm] [--only 'timm/res*' ...] [--limit 300] [--chunk-size 2]

The networks: the smallest of each family of timm, of torchvision's classifiers, and some of transformers,
segmentation_models_pytorch, MONAI, x-transformers, neuraloperator, torch_geometric and peft; what is not installed is left out
(benchmarks/requirements.txt). Weights are random, nothing is downloaded. Each network makes a predictive, a
training step and a predictive again, in float64 where it can, on one process. The plain module is a fresh copy without hpc_bnn that
is given the weights that were drawn; its dropout rates and stochastic depths are 0, its BatchNorm is in training mode.
Compared are

- loss and gradient (means, scales and points) with those of an ordinary backward pass,
- each member of the predictive with a copy of its own in evaluation mode,
- buffers after the step; running statistics make one step towards the mean over samples and uses (docs/posteriors.md),
- the input, which must stay as it is unless the plain module changes it, and the modes of all layers,
- the bits of the step in a second run, without a predictive before it and from another state of the global generators.

Where a number differs by more than 1e-9, the plain module is run again with weights moved by one rounding: a network
that amplifies rounding may differ by 100 times as much. Verdicts: ``exact``; ``refused`` (an error of hpc_bnn that says
why); ``WRONG``; ``crash`` (any other error); ``undecided`` (random numbers of the module's own, too much amplification,
or no time); ``skipped`` (the plain module does not run). One row of JSON per network as it comes; networks that have
a row are not run again. About half an hour for timm on one core. ``--list`` shows the names.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import hashlib
import json
import logging
import math
import multiprocessing
import random
import resource
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import hpc_bnn
from hpc_bnn.errors import HpcBnnError, NonFiniteError
from hpc_bnn.noise import Key, Stream

NUM_EXAMPLES, NUM_CLASSES = 3, 5
NUM_SAMPLES, NUM_MEMBERS = 2, 2
SEED = 3
Named = dict[str, Tensor]
Candidates = Iterator[tuple[nn.Module, Tensor]]
"""Networks with inputs to try; the first that runs by itself is taken."""


# --- what is asked of hpc_bnn: only here -----------------------------------------------------------------


class Bnn:
    """A module wrapped by hpc_bnn, with a step and a predictive."""

    def __init__(self, module: nn.Module, num_outputs: int, chunk_size: int):
        self.posterior = hpc_bnn.MeanFieldGaussian(module, init_std=0.01)
        self.likelihood = hpc_bnn.Gaussian(num_outputs, scale=1.0)
        self.comm = hpc_bnn.GridComm(hpc_bnn.Grid())
        optimizer = torch.optim.Adagrad(self.posterior.parameters(), lr=1e-3)
        self.step = hpc_bnn.VariationalStep(
            self.posterior, self.likelihood, optimizer, self.comm, num_samples=NUM_SAMPLES,
            num_train_examples=1, seed=SEED, kl_weight=0.0, chunk_size=chunk_size,
        )  # fmt: skip

    def train(self, x: Tensor, y: Tensor) -> float:
        """Make a step and return its data term."""
        return self.step(x, y, len(x)).data_term

    def gradients(self) -> Named:
        """Return the gradients of the last step, named as in the state: NAME.loc, NAME.log_scale, NAME of a point."""
        return self.posterior.buffer.named(self.posterior.buffer.grads)

    def means(self) -> Named:
        """Return the means of the random weights, by the names of the module."""
        state = self.posterior.state_dict()
        return {name: state[f"{name}.loc"] for name in self.posterior.random}

    def predict(self, x: Tensor) -> Tensor:
        """Return the members of the predictive, [B, M, ...]."""
        return hpc_bnn.predict_values(
            self.posterior, self.likelihood, self.comm, x, num_samples=NUM_MEMBERS, seed=SEED, keep_members=True
        ).members

    def drawn_for_step(self, sample: int) -> Named:
        """Draw a sample of the next step again and return the module's weights."""
        self.posterior.begin_()
        return self._drawn(sample, Stream.NOISE, self.step.num_steps)

    def drawn_for_member(self, sample: int) -> Named:
        """Draw a member of the predictive again and return the module's weights."""
        with self.posterior.evaluating():
            return self._drawn(sample, Stream.PREDICTION, 0)

    def _drawn(self, sample: int, stream: Stream, num: int) -> Named:
        self.posterior.draw_(Key(SEED, stream, step=num, sample=sample))
        return {name: p.detach().clone() for name, p in self.posterior.module.named_parameters()}


# --- the plain module ------------------------------------------------------------------------------------


def buffers_of(module: nn.Module) -> Named:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@torch.no_grad()
def load_(module: nn.Module, weights: Named, buffers: Named) -> nn.Module:
    for name, parameter in module.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])
    for name, buffer in list(module.named_buffers()):
        if buffer.shape != buffers[name].shape:  # a table that grows with the input
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, buffers[name].clone())
        elif not torch.equal(buffer, buffers[name]):  # some are expanded and cannot be written
            buffer.copy_(buffers[name])
    return module


def as_real(tensor: Tensor) -> Tensor:
    """Return a tensor, or the real and imaginary parts of a complex one, [..., 2], as a posterior names them."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class RunningStatistics:
    """What the running statistics of a module's BatchNorm layers should be after a step."""

    def __init__(self, module: nn.Module):
        self.samples: dict[str, list[list[Tensor]]] = {}
        self.layers = {
            name: layer
            for name, layer in module.named_modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
            and layer.training and layer.track_running_stats and layer.momentum is not None
        }  # fmt: skip
        for name, layer in self.layers.items():
            layer.register_forward_hook(self._look(name), with_kwargs=True)

    def begin_sample(self) -> None:
        for samples in self.samples.values():
            samples.append([])

    def _look(self, name: str):
        def hook(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            over = [dim for dim in range(x.ndim) if dim != 1]
            use = torch.stack([x.detach().mean(over), x.detach().var(over, unbiased=True)])
            self.samples.setdefault(name, [[]])[-1].append(use)

        return hook

    def after(self, before: Named) -> Named:
        found = {}
        for name, samples in self.samples.items():
            uses = [torch.stack(use).mean(0) for use in samples if use]
            mean, variance = torch.stack(uses).mean(0)
            for leaf, value in (("running_mean", mean), ("running_var", variance)):
                old = before[f"{name}.{leaf}"]
                found[f"{name}.{leaf}"] = old.lerp(value.to(old.dtype), self.layers[name].momentum)
            found[f"{name}.num_batches_tracked"] = before[f"{name}.num_batches_tracked"] + 1
        return found


class PlainStep:
    """Loss, gradients and buffers of a step of the plain module, by one ordinary backward pass per sample."""

    def __init__(self, plain: nn.Module, drawn: list[Named], means: Named, buffers: Named, x: Tensor, y: Tensor):
        net = load_(copy.deepcopy(plain), drawn[0], buffers)
        statistics = RunningStatistics(net)
        self.losses, self.gradients = {"": torch.zeros(())}, {}
        trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
        for weights in drawn:
            # Its own buffers, and frozen weights that it changes, go on from sample to sample
            load_(net, {name: weights[name] for name in trained}, buffers_of(net))
            net.zero_grad()
            statistics.begin_sample()
            outputs = net(x.clone()).to(y.dtype)
            loss = (0.5 * (outputs - y).square() + 0.5 * math.log(2 * math.pi)).sum() / len(x) / len(drawn)
            loss.backward()
            self.losses[""] = self.losses[""] + loss.detach().double()
            for name, parameter in net.named_parameters():
                if not parameter.requires_grad:
                    continue
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradient = as_real(gradient.to_dense())
                if name in means:
                    self._add(f"{name}.loc", gradient)
                    self._add(f"{name}.log_scale", gradient * (as_real(weights[name]) - means[name]))
                else:
                    self._add(name, gradient)
        self.buffers = buffers_of(net) | statistics.after(buffers)

    def _add(self, name: str, gradient: Tensor) -> None:
        self.gradients[name] = self.gradients.get(name, 0) + gradient


@torch.no_grad()
def plain_members(plain: nn.Module, drawn: list[Named], buffers: Named, x: Tensor) -> Tensor:
    outputs = [load_(copy.deepcopy(plain), weights, buffers).eval()(x.clone()) for weights in drawn]
    return torch.stack(outputs, 1).double()


def moved(drawn: list[Named]) -> list[Named]:
    """Return weights moved by about one rounding."""
    generator = torch.Generator().manual_seed(SEED)
    return [
        {n: w + w * torch.finfo(w.dtype).eps * torch.randn(w.shape, generator=generator, dtype=w.dtype)
         for n, w in weights.items()} for weights in drawn
    ]  # fmt: skip


# --- comparison ------------------------------------------------------------------------------------------


def distance(got: Named, want: Named, floor: float = 1e-4) -> tuple[float, str]:
    """Return the largest relative difference of a tensor, and its name.

    Relative to the tensor's norm, or to ``floor`` times the norm of all where that is larger.
    """
    if got.keys() != want.keys():
        return math.inf, ", ".join(sorted(got.keys() ^ want.keys())[:3])
    norm = math.hypot(*(w.double().norm().item() for w in want.values()))
    worst = (0.0, "")
    for name, w in want.items():
        g = got[name]
        if g.shape != w.shape:
            return math.inf, name
        difference = (g.double() - w.double()).norm().item()
        relative = difference / max(w.double().norm().item(), floor * norm, 1e-300)
        if not relative <= worst[0]:  # NaN is worst
            worst = (relative, name)
    return worst


class Comparison:
    """What one network does, row by row."""

    def __init__(self, dtype: torch.dtype):
        self.tolerance = 1e-9 if dtype == torch.float64 else 1e-5
        self.wrong: list[str] = []
        self.undecided: list[str] = []
        self.differences: dict[str, float] = {}

    def numbers(self, what: str, got: Named, want: Named, again: Callable[[], Named]) -> None:
        """Compare numbers; ``again`` gives them for weights moved by a rounding."""
        difference, name = distance(got, want)
        self.differences[what] = max(difference, self.differences.get(what, 0.0))
        if difference <= self.tolerance:
            return
        amplified = 100 * distance(again(), want)[0]
        said = f"{what} ({difference:.1e}" + (f" at {name})" if name else ")")
        if amplified > 1e-2:
            self.undecided.append(f"{said}; it amplifies a rounding to {amplified / 100:.0e}")
        elif not difference <= amplified:
            self.wrong.append(said)

    def buffers(
        self, got: Named, step: PlainStep, alone: Callable[[], list[PlainStep]], again: Callable[[], Named]
    ) -> None:
        """Compare buffers; ``alone`` gives a step of each sample from the buffers at the start, ``again`` as for `numbers`."""
        want = step.buffers
        if got.keys() != want.keys():
            self.wrong.append("names of buffers")
            return
        off = [name for name in want if not self._close(got[name], want[name])]
        if off and all(got[name].is_floating_point() for name in off):
            # A BatchNorm of another class: towards the mean over samples as well
            samples = [step.buffers for step in alone()]
            off = [n for n in off if not self._close(got[n], torch.stack([s[n] for s in samples]).mean(0))]
        if off:
            moved_ = again()
            amplified = {name: 100 * (moved_[name].double() - want[name].double()).norm() for name in off}
            off = [n for n in off if not (got[n].double() - want[n].double()).norm() <= amplified[n]]
        if off:
            self.wrong.append(f"{len(off)} buffers ({off[0]})")

    def _close(self, got: Tensor, want: Tensor) -> bool:
        if torch.equal(got, want) or not want.is_floating_point():  # equal, also where infinite
            return torch.equal(got, want)
        allowed = 1e3 * self.tolerance * (want.double().norm() + 1e-3 * math.sqrt(want.numel()))
        return got.shape == want.shape and bool((got.double() - want.double()).norm() <= allowed)

    def must(self, what: str, holds: bool) -> None:
        if not holds:
            self.wrong.append(what)


@dataclass(frozen=True)
class Plain:
    """A module that hpc_bnn has not seen, and what is known of it."""

    module: nn.Module
    x: Tensor
    y: Tensor
    changes_input: bool
    draws: bool
    """Whether its forward pass draws from a global generator."""


def modes_of(module: nn.Module) -> list[bool]:
    return [layer.training for layer in module.modules()]


def play(plain: Plain, chunk_size: int, global_seed: int, compare: Comparison | None) -> list[str]:
    """Predict, step, predict; compare where asked to, and return digests of what the step gave."""
    seed_all(global_seed)
    net, x, y = copy.deepcopy(plain.module), plain.x, plain.y
    bnn = Bnn(net, y.shape[1], chunk_size)
    modes = modes_of(net)

    def untouched(given: Tensor, by: str) -> None:
        compare.must(f"input changed by the {by}", plain.changes_input or torch.equal(given, x))
        compare.must(f"modes after the {by}", modes_of(net) == modes)

    def predict(which: str) -> None:
        given = x.clone()
        members = bnn.predict(given)
        untouched(given, which)
        drawn, buffers = [bnn.drawn_for_member(sample) for sample in range(NUM_MEMBERS)], buffers_of(net)

        def want(weights: list[Named]) -> Named:
            return by_member(plain_members(plain.module, weights, buffers, x))

        compare.numbers(f"members of the {which}", by_member(members), want(drawn), lambda: want(moved(drawn)))

    if compare:
        predict("first predictive")
        drawn = [bnn.drawn_for_step(sample) for sample in range(NUM_SAMPLES)]
        means, before = {name: mean.clone() for name, mean in bnn.means().items()}, buffers_of(net)
    given = x.clone()
    loss = bnn.train(given, y)
    gradients = bnn.gradients()
    if compare:
        untouched(given, "step")

        def want(weights: list[Named]) -> PlainStep:
            seed_all(global_seed)
            return PlainStep(plain.module, weights, means, before, x, y)

        step = want(drawn)
        compare.numbers(
            "loss", {"": torch.tensor(loss, dtype=torch.float64)}, step.losses, lambda: want(moved(drawn)).losses
        )
        compare.numbers("gradient", gradients, step.gradients, lambda: want(moved(drawn)).gradients)
        compare.buffers(
            buffers_of(net), step, lambda: [want([weights]) for weights in drawn], lambda: want(moved(drawn)).buffers
        )
        digests = [repr(loss), digest(gradients), digest(buffers_of(net))]
        predict("predictive after the step")
        return digests
    return [repr(loss), digest(gradients), digest(buffers_of(net))]


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def by_member(members: Tensor) -> Named:
    return {f"member {m}": members[:, m] for m in range(members.shape[1])}


def digest(tensors: Named) -> str:
    found = hashlib.sha256()
    for tensor in tensors.values():
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


# --- one network -----------------------------------------------------------------------------------------


class FirstTensor(nn.Module):
    """A network of which only the first tensor of the output is taken."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.net(x)
        self.is_plain = isinstance(outputs, Tensor)
        while not isinstance(outputs, Tensor):
            outputs = next(iter(outputs.values() if hasattr(outputs, "values") else outputs))
        return outputs


def switch_off_drops(net: nn.Module) -> None:
    """Set dropout rates and stochastic depths to 0: known by their names, in layers and configs."""
    for layer in net.modules():
        is_drop = "drop" in type(layer).__name__.lower() or "Depth" in type(layer).__name__
        for holder in (layer, getattr(layer, "config", None)):
            for name, value in list(vars(holder).items()) if hasattr(holder, "__dict__") else ():
                known = "drop" in name or (is_drop and name == "p")
                if known and isinstance(value, float) and 0 < value <= 1:
                    setattr(holder, name, 0.0)


def first_that_runs(candidates: Candidates) -> Plain:
    """Return the first network that runs forward and backward by itself, in training and in evaluation."""
    error = None
    for net, x in candidates:
        switch_off_drops(net)
        size = sum(parameter.numel() for parameter in net.parameters())
        for dtype in (torch.float64, torch.float32)[size > TOO_MANY_FOR_FLOAT64 :]:
            try:
                return look_at(converted(net, dtype).train(), x.to(dtype) if x.is_floating_point() else x)
            except Exception as caught:
                error = caught
    raise error or ValueError("there is nothing to try")


def converted(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a network in another dtype; ``net.to(dtype)`` would discard imaginary parts."""
    of_kind = {True: dtype.to_complex(), False: dtype}
    return net._apply(lambda t: t.to(of_kind[t.is_complex()]) if t.is_floating_point() or t.is_complex() else t)


def look_at(net: nn.Module, x: Tensor) -> Plain:
    """Run a network by itself and return what is to be known of it."""
    trial, given = FirstTensor(copy.deepcopy(net)), x.clone()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    outputs = trial(given)
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    draws = not torch.equal(before[0], after[0]) or (before[1] != after[1]).any() or before[2] != after[2]
    outputs.sum().backward()
    finite = outputs.isfinite().all() and trial.eval()(x.clone()).isfinite().all()
    if not finite or outputs.ndim < 2 or len(outputs) != len(x):
        raise ValueError(f"its outputs are {tuple(outputs.shape)}, finite: {bool(finite)}")
    outputs = outputs.detach()
    generator = torch.Generator().manual_seed(1)
    y = outputs + torch.randn(outputs.shape, dtype=outputs.dtype, generator=generator)
    if not trial.is_plain:
        net = FirstTensor(net)
    return Plain(net, x, y, not torch.equal(given, x), bool(draws))


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage()[:300])


def described(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = "/".join(Path(last.filename).parts[-3:])
    return f"{type(error).__name__}: {str(error)[:400]} [{place}:{last.lineno}]"


def examine(candidates: Callable[[], Candidates], chunk_size: int) -> dict:
    """Return the row of one network."""
    log = Lines()
    logging.getLogger("hpc_bnn").addHandler(log)
    torch.manual_seed(0)
    try:
        plain = first_that_runs(candidates())
    except Exception as error:
        return {"verdict": "skipped", "why": described(error)}
    size = sum(parameter.numel() for parameter in plain.module.parameters())
    dtype = str(plain.y.dtype).split(".")[1]
    row = {"verdict": "", "why": "", "x": list(plain.x.shape), "weights": size, "dtype": dtype}
    compare = Comparison(plain.y.dtype)
    try:
        first, second = (play(plain, chunk_size, seed, c) for seed, c in ((7, compare), (99, None)))
        names = ["loss", "gradient", "buffers"]
        off = [name for name, a, b in zip(names, first, second) if a != b]
        compare.must(f"bits of a second run ({', '.join(off)})", not off)
    except Exception as error:
        is_refused = isinstance(error, HpcBnnError) and not isinstance(error, NonFiniteError)
        row |= {"verdict": "refused" if is_refused else "crash", "why": described(error)}
    else:
        verdict, why = "exact", []
        if compare.wrong:
            verdict, why = "WRONG", compare.wrong
            if plain.draws:
                verdict, why = "undecided", ["it draws from a global generator", *why]
        elif compare.undecided:
            verdict, why = "undecided", compare.undecided
        row |= {"verdict": verdict, "why": "; ".join(why)}
    return row | {"differences": compare.differences, "said": log.lines[:6]}


def examine_in_child(candidates: Callable[[], Candidates], options: argparse.Namespace) -> dict:
    """Examine a network in a process of its own, which may crash or take too long."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (options.limit, options.limit))
        sender.send(examine(candidates, options.chunk_size))

    child = context.Process(target=work)
    child.start()
    sender.close()
    try:
        row = receiver.recv()
    except EOFError:
        child.join()
        row = {"verdict": "crash", "why": f"the process ended with {child.exitcode}"}
        if child.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
            row = {"verdict": "undecided", "why": f"more than {options.limit} s, or too much memory"}
    child.join()
    return row


# --- the networks ----------------------------------------------------------------------------------------

TIMM_SMALLEST = {
    "beit_base_patch16_224", "cait_xxs24_224", "coat_tiny", "convit_tiny", "convmixer_768_32", "cpubone_nano",
    "crossvit_tiny_240", "cs3darknet_focus_s", "csatv2", "cspnext_tiny", "davit_tiny", "deepseek_vit_412m",
    "deit_tiny_patch16_224", "densenet121", "dla34", "dpn48b", "eca_halonext26ts", "edgenext_xx_small",
    "efficientformer_l1", "efficientformerv2_s0", "efficientvim_m1", "efficientvit_b0", "efficientvit_m0",
    "ese_vovnet19b_slim_dw", "fasternet_t0", "fastvit_s12", "focalnet_tiny_srf", "gcvit_xxtiny",
    "gemma4_vit_167m_enc", "ghostnet_050", "gmlp_ti16_224", "hardcorenas_b", "hgnetv2_b0", "hiera_tiny_224",
    "hrnet_w18_small", "iformer_t", "inception_next_atto", "inception_resnet_v2", "inception_v3",
    "inception_v4", "lcnet_035", "lcnetv2_small", "legacy_seresnext26_32x4d", "legacy_xception", "levit_128",
    "lowformer_b0", "mobilenetv5_base", "mobilevit_xxs", "mvitv2_tiny", "naflexvit_base_patch16_gap",
    "nasnetalarge", "nest_tiny", "nextvit_small", "pit_ti_224", "pnasnet5large", "poolformerv2_s12",
    "pvt_v2_b0", "qwen3_vit_88m", "rdnet_tiny", "regnetx_004_tv", "repghostnet_050", "repvit_m1",
    "res2net50_26w_4s", "resnest14d", "resnetv2_18", "rexnet_100", "sam2_hiera_tiny", "samvit_base_patch16_224",
    "selecsls42", "sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s050", "swiftformer_xs",
    "swin_s3_tiny_224", "swinv2_cr_tiny_224", "swinv2_tiny_window8_256", "test_byobnet", "test_coatnet",
    "test_convnext", "test_efficientnet", "test_mambaout", "test_nfnet", "test_resnet", "test_vit4",
    "test_vit_relpos", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "tresnet_m", "twins_svt_small", "vgg11",
    "visformer_tiny", "vit_tiny_patch16_dinov3_qkvb", "vit_tiny_r_s16_p8_224", "vitamin_small_224",
    "volo_d1_224", "xception41p", "xcit_nano_12_p8_224",
}  # fmt: skip
TORCHVISION = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn", "vit_b_32",
]  # fmt: skip
IMAGE_SIZES = (32, 64, 96, 128, 160, 224, 256, 288, 299, 384)
ONES = (1, 1, 1, 1)
LESS = (
    {"embed_dim": 48, "depth": 2, "num_heads": 3}, {"embed_dim": 24, "depths": ONES},
    {"embed_dims": (16, 32, 48, 64), "depths": ONES}, {"dims": (16, 32, 48, 64), "depths": ONES},
    {"depths": ONES}, {"layers": ONES}, {"depth": 2}, {"channel_multiplier": 0.25},
    {"stem_size": 24, "num_features": 1008}, {"mlp_ratio": 0.01},
)  # fmt: skip
MANY_WEIGHTS, TOO_MANY_FOR_FLOAT64 = 1_000_000, 60_000_000
"""Networks above the first are built with less depth or width, where they take it, and get smaller images."""


def images(size: int, channels: int = 3) -> Tensor:
    return torch.randn(NUM_EXAMPLES, channels, size, size, generator=torch.Generator().manual_seed(5))


def words(length: int = 10, number: int = 50) -> Tensor:
    return torch.randint(5, number, (NUM_EXAMPLES, length), generator=torch.Generator().manual_seed(5))


def built(make: Callable[..., nn.Module], **arguments) -> nn.Module | None:
    try:
        return make(**arguments)
    except Exception:
        return None


def num_weights(make: Callable[..., nn.Module]) -> float:
    with torch.device("meta"):
        net = built(make)
    return math.inf if net is None else sum(parameter.numel() for parameter in net.parameters())


def timm_candidates(family: str) -> Candidates:
    import timm

    names = sorted(timm.list_models(module=family), key=lambda name: (name not in TIMM_SMALLEST, len(name)))

    def make(**arguments) -> nn.Module:
        return timm.create_model(names[0], num_classes=NUM_CLASSES, **arguments)

    size = num_weights(make)
    for less in (*LESS, {}) if size > MANY_WEIGHTS else ({},):
        for form in ({"img_size": 64}, {}):
            net = built(make, **form, **less)
            if net is None:
                continue
            channels, default, _ = net.pretrained_cfg.get("input_size", (3, 224, 224))
            sizes = dict.fromkeys((*IMAGE_SIZES[size < MANY_WEIGHTS : 5], default))
            for pixels in (64,) if form else sizes:
                yield net, images(pixels, channels)


def torchvision_candidates(name: str) -> Candidates:
    from torchvision import models

    arguments = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    net = models.get_model(name, weights=None, num_classes=NUM_CLASSES, **arguments)
    if name in ("alexnet", "vgg11", "vgg11_bn"):  # their classifiers have 100 million weights
        net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(1), nn.LazyLinear(NUM_CLASSES)
        net(images(64))
    yield from ((net, images(pixels)) for pixels in IMAGE_SIZES)


def transformers_networks() -> dict[str, Callable[[], nn.Module]]:
    """Return small networks of transformers; those of words first."""
    import transformers

    form = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3,
    }  # fmt: skip
    of_words = form | {"vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 0}
    of_images = form | {"image_size": 64, "patch_size": 8}
    grouped = {"num_key_value_heads": 1}
    kinds = {
        ("SequenceClassification", "Albert"): {"embedding_size": 8}, ("SequenceClassification", "Bert"): {},
        ("SequenceClassification", "DebertaV2"): {}, ("SequenceClassification", "Electra"): {"embedding_size": 8},
        ("SequenceClassification", "Gemma"): grouped | {"head_dim": 8}, ("SequenceClassification", "GPTNeoX"): {},
        ("SequenceClassification", "Llama"): grouped, ("SequenceClassification", "Mixtral"): grouped | {"num_local_experts": 2},
        ("SequenceClassification", "ModernBert"): {}, ("SequenceClassification", "Qwen2"): grouped,
        ("SequenceClassification", "Roberta"): {}, ("ImageClassification", "Beit"): {},
        ("ImageClassification", "Dinov2"): {}, ("ImageClassification", "ViT"): {},
        ("ImageClassification", "ConvNextV2"): {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
        ("ImageClassification", "ResNet"): {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        ("ImageClassification", "Swinv2"): {"embed_dim": 12, "depths": [2, 2], "num_attention_heads": [2, 4], "window_size": 4, "patch_size": 4},
        ("ImageClassification", "MobileViT"): {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 12, 16, 16, 16, 32]},
        ("SemanticSegmentation", "Segformer"): {"hidden_sizes": [8, 16, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 2], "decoder_hidden_size": 16},
    }  # fmt: skip

    def make(task: str, name: str, more: dict) -> nn.Module:
        config = getattr(transformers, f"{name}Config")(
            **(of_words if task == "SequenceClassification" else of_images) | more
        )
        return getattr(transformers, f"{name}For{task}")(config)

    def candidates(task: str, name: str, more: dict) -> Candidates:
        yield make(task, name, more), words() if task == "SequenceClassification" else images(64)

    return {name: lambda kind=(task, name, more): candidates(*kind) for (task, name), more in kinds.items()}


def segmentation_networks() -> dict[str, Callable[[], nn.Module]]:
    import segmentation_models_pytorch as smp

    def candidates(name: str) -> Candidates:
        encoder = "resnet18" if name == "PAN" else "mobilenet_v2"
        net = getattr(smp, name)(encoder_name=encoder, encoder_weights=None, classes=NUM_CLASSES)
        yield from ((net, images(pixels)) for pixels in (64, 128))

    names = (
        "DeepLabV3Plus",
        "FPN",
        "Linknet",
        "MAnet",
        "PAN",
        "PSPNet",
        "Unet",
        "UnetPlusPlus",
        "UPerNet",
        "Segformer",
    )
    return {name: lambda name=name: candidates(name) for name in names}


def monai_networks() -> dict[str, Callable[[], nn.Module]]:
    from monai.networks import nets

    makers = {
        "AttentionUnet": lambda: nets.AttentionUnet(2, 1, 3, (4, 8), (2,)),
        "SegResNet": lambda: nets.SegResNet(2, 8, 1, 3, blocks_down=(1, 1), blocks_up=(1,)),
        "SwinUNETR": lambda: nets.SwinUNETR(
            1, 3, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), feature_size=12, spatial_dims=2
        ),
        "UNet": lambda: nets.UNet(2, 1, 3, (4, 8, 16), (2, 2), num_res_units=1, norm="batch"),
        "UNETR": lambda: nets.UNETR(1, 3, (64, 64), 4, 16, 32, 2, spatial_dims=2),
        "VNet": lambda: nets.VNet(2, 1, 3),
        "VQVAE": lambda: nets.VQVAE(
            2,
            1,
            1,
            channels=(8, 8),
            num_res_channels=(8, 8),
            num_res_layers=1,
            num_embeddings=8,
            embedding_dim=4,
            downsample_parameters=((2, 4, 1, 1),) * 2,
            upsample_parameters=((2, 4, 1, 1, 0),) * 2,
        ),
    }
    return {name: lambda make=make: iter([(make(), images(64, 1))]) for name, make in makers.items()}


def x_transformers_networks() -> dict[str, Callable[[], nn.Module]]:
    import x_transformers as xt

    def encoder(**arguments) -> nn.Module:
        return xt.Encoder(dim=16, depth=2, heads=2, **arguments)

    return {
        "ViT": lambda: iter([(xt.ViTransformerWrapper(
            image_size=64, patch_size=16, num_classes=3, attn_layers=encoder(layer_dropout=0.1)), images(64))]),
        "encoder": lambda: iter([(xt.TransformerWrapper(
            num_tokens=60, max_seq_len=16, attn_layers=encoder(rotary_pos_emb=True, use_rmsnorm=True)), words())]),
    }  # fmt: skip


def neural_operators() -> dict[str, Callable[[], nn.Module]]:
    from neuralop import models

    form = {"n_modes": (4, 4), "in_channels": 1, "out_channels": 1, "hidden_channels": 8, "n_layers": 2}
    layers = {"hidden_channels": 8, "uno_out_channels": [8] * 3, "uno_n_modes": [[4, 4]] * 3, "n_layers": 3}
    scalings = [[1.0, 1.0], [0.5, 0.5], [2.0, 2.0]]
    makers = {
        "FNO": lambda: models.FNO(**form),
        "TFNO": lambda: models.TFNO(**form, factorization="tucker", rank=0.5),
        "UNO": lambda: models.UNO(1, 1, **layers, uno_scalings=scalings, channel_mlp_skip="linear"),
    }
    return {name: lambda make=make: iter([(make(), images(16, 1))]) for name, make in makers.items()}


class OnGraph(nn.Module):
    """Signals [B, 6, F] on one graph, each a component of the graph of a batch."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]]))

    def forward(self, x: Tensor) -> Tensor:
        batch, nodes, width = x.shape
        edges = (self.edges[:, None] + nodes * torch.arange(batch)[:, None]).flatten(1)
        return self.net(x.reshape(batch * nodes, width), edges).view(batch, nodes, -1).mean(1)


def graph_networks() -> dict[str, Callable[[], nn.Module]]:
    from torch_geometric import nn as graphs

    more = {
        "GCN": {}, "GraphSAGE": {}, "GAT": {"heads": 2}, "GIN": {"norm": "batch_norm"}, "EdgeCNN": {},
        "PNA": {"aggregators": ["mean", "max"], "scalers": ["identity"], "deg": torch.tensor([0, 2, 4])},
    }  # fmt: skip
    signals = torch.randn(NUM_EXAMPLES, 6, 5, generator=torch.Generator().manual_seed(5))

    def candidates(name: str) -> Candidates:
        yield OnGraph(getattr(graphs, name)(5, 8, 2, 3, **more[name])), signals

    return {name: lambda name=name: candidates(name) for name in more}


def adapted_networks() -> dict[str, Callable[[], nn.Module]]:
    import peft
    import transformers

    form = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 60,
    }

    def bert() -> nn.Module:
        return transformers.BertForSequenceClassification(transformers.BertConfig(**form))

    configs = {
        "LoRA": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2),
        "DoRA": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, use_dora=True),
        "IA3": lambda: peft.IA3Config(
            task_type="SEQ_CLS", target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
        ),
    }
    return {
        name: lambda config=config: iter([(peft.get_peft_model(bert(), config()), words())])
        for name, config in configs.items()
    }


def timm_networks() -> dict[str, Callable[[], Candidates]]:
    import timm

    return {family: lambda family=family: timm_candidates(family) for family in timm.list_modules()}


def torchvision_networks() -> dict[str, Callable[[], Candidates]]:
    import torchvision  # noqa: F401

    return {name: lambda name=name: torchvision_candidates(name) for name in TORCHVISION}


PACKAGES = {
    "timm": timm_networks,
    "torchvision": torchvision_networks,
    "transformers": transformers_networks,
    "segmentation_models_pytorch": segmentation_networks,
    "monai": monai_networks,
    "x_transformers": x_transformers_networks,
    "neuralop": neural_operators,
    "torch_geometric": graph_networks,
    "peft": adapted_networks,
}


def load_torchvision() -> None:
    """Import torchvision, also where its compiled operators are for another torch: classifiers need none."""
    try:
        import torchvision
    except ImportError:
        return
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


# --- the table -------------------------------------------------------------------------------------------

VERDICTS = ("exact", "refused", "WRONG", "crash", "undecided", "skipped")


def table(rows: dict[str, dict]) -> str:
    """Return the counts of each package, and a line for each network that is not exact."""
    lines = [f"{'package':28}" + "".join(f"{verdict:>11}" for verdict in VERDICTS)]
    for package in dict.fromkeys(name.split("/")[0] for name in rows):
        counts = Counter(row["verdict"] for name, row in rows.items() if name.split("/")[0] == package)
        lines.append(f"{package:28}" + "".join(f"{counts[verdict]:11d}" for verdict in VERDICTS))
    for verdict in VERDICTS[1:]:
        for name, row in rows.items():
            if row["verdict"] == verdict:
                lines.append(f"{verdict:10} {name:40} {row['why'].splitlines()[0][:160]}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="rows, one a line; grows")
    parser.add_argument("--timm", action="store_true", help="the families of timm only")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="such as 'timm/res*'")
    parser.add_argument("--limit", type=int, default=300, help="seconds of the processor per network")
    parser.add_argument("--chunk-size", type=int, default=1, help="samples of a step evaluated at once")
    parser.add_argument("--list", action="store_true", help="show the names and stop")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    load_torchvision()
    for name in hpc_bnn.__all__:  # imported once, before processes are forked
        getattr(hpc_bnn, name)
    networks = {}
    for package, find in PACKAGES.items():
        if options.timm and package != "timm":
            continue
        try:
            networks |= {f"{package}/{name}": candidates for name, candidates in find().items()}
        except ImportError as error:
            print(f"{package} is left out: {error}", flush=True)
    chosen = [n for n in networks if any(fnmatch.fnmatch(n, pattern) for pattern in options.only)]
    if options.list:
        print(*chosen, sep="\n")
        return
    lines = options.json.read_text().splitlines() if options.json.exists() else []
    rows = {row["name"]: row for row in map(json.loads, lines)}
    for name in chosen:
        if name in rows:
            continue
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        row = {"name": name} | examine_in_child(networks[name], options)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
        rows[name] = row | {"seconds": round(seconds, 1)}
        with open(options.json, "a") as file:
            file.write(json.dumps(rows[name]) + "\n")
        print(f"{row['verdict']:10} {name:40} {row['why'].splitlines()[0][:160] if row['why'] else ''}", flush=True)
    print(table({name: rows[name] for name in chosen}))


if __name__ == "__main__":
    main()
