"""A step on a GPU against one on a CPU, captured against launched anew; noise, faults, host reads. Local to one GPU.

``HPC_BNN_GPU_CHECK=cpu`` runs the same code on a CPU, where nothing is captured.
"""

import contextlib
import gc
import os

import pytest
import torch
from captured_cases import CASES, batch, make, train

from hpc_bnn.errors import NonFiniteError
from hpc_bnn.noise import Key, Stream, operators
from hpc_bnn.noise.segments import Segments
from hpc_bnn.training.capture import HostReads
from hpc_bnn.training.chunk_search import ChunkSearch

DEVICE = os.environ.get("HPC_BNN_GPU_CHECK", "cuda")
IS_GPU = DEVICE == "cuda"
pytestmark = pytest.mark.skipif(IS_GPU and not torch.cuda.is_available(), reason="no GPU is visible")
gc.freeze()  # each capture collects garbage: not among all that is imported


@pytest.fixture(autouse=True)
def _precision():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def with_sgd(case):
    """Return a case without Adam, which divides by gradients that are nothing but rounding, as those of attention's keys."""
    return {**({"optimizer": "sgd"} if case.get("network") in ("vit", "attention") else {}), **case}


def name_of(case):
    return " ".join(f"{key}={value}" for key, value in case.items())


def close(got, want, tolerance):
    for a, b in zip(got[0], want[0]):
        assert a == pytest.approx(b, rel=tolerance)
    for name, value in want[1].items():
        error = (got[1][name].cpu().double() - value.cpu().double()).norm() / value.double().norm().cpu().clamp_min(
            1e-30
        )
        assert error < tolerance, name


def test_the_noise_has_the_bits_of_a_cpu():
    if IS_GPU:
        from hpc_bnn.noise import triton_kernels

        assert triton_kernels.matches(DEVICE)
    segments = Segments([3, 1, 2], [0, 37, 2**33], [0, 4096, 9000], [4096, 4000, 2001])
    drawn = []
    for device in ("cpu", DEVICE):
        on = segments.on(torch.device(device))
        for words in ([5, 2**33 + 1], [-7, 3, 11]):
            out = torch.zeros(3, 11008, device=device)
            operators.draw(*on, torch.tensor(words, device=device), 4, True, out)
            drawn.append(out.cpu())
        key = Key(9, Stream.MASK, (1, 2), step=7, sample=3)
        drawn += [key.bits(1000, device).cpu(), key.normal(70, device, torch.arange(5, device=device)).cpu()]
    assert all(map(torch.equal, drawn[:4], drawn[4:]))


@pytest.mark.parametrize(
    "case", [case for case in CASES if "dtype" not in case and "autocast_dtype" not in case], ids=name_of
)
def test_a_gpu_gives_the_numbers_of_a_cpu(case):
    """float64: the update is launched anew there, because torch's fused ones round the learning rate."""
    options = {**with_sgd(case), "dtype": torch.float64}
    views = options.pop("views", False)
    runs = [
        train(make("auto", device=device, **options), views=views, dtype=torch.float64) for device in ("cpu", DEVICE)
    ]
    close(runs[1], runs[0], 1e-12)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_captured_steps_give_the_numbers_of_steps_that_are_launched_anew(case):
    options = with_sgd(case)
    views, dtype = options.pop("views", False), options.get("dtype", torch.float32)
    runs = []
    for capture in ("off", "on"):
        step = make(capture, device=DEVICE, **options)
        runs.append(train(step, 9, views=views, dtype=dtype))
    close(runs[1], runs[0], 1e-9 if dtype == torch.float64 else 2e-2 if "autocast_dtype" in case else 1e-5)
    assert step.recorder.num_captures > 0 or not IS_GPU


@pytest.mark.parametrize("network", ["mlp", "vit"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batches_give_the_numbers_of_a_walk(network, dtype):
    runs = []
    for chunk_size in (1, 4):
        options = with_sgd({"network": network, "num_samples": 8, "chunk_size": chunk_size, "dtype": dtype})
        step = make("auto", device=DEVICE, **options)
        runs.append(train(step, dtype=dtype))
    print("batched" if step.loop.can_batch else f"walked: {network}")
    close(runs[1], runs[0], 1e-12 if dtype == torch.float64 else 1e-5)


def test_a_run_goes_on_on_another_device():
    for first, second in (("cpu", DEVICE), (DEVICE, "cpu")):
        step, other = (make("auto", device=device) for device in (first, second))
        train(step, 5)
        other.load_state_dict(torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, step.gather_state()))
        close(train(other), train(step), 1e-5)


@pytest.mark.parametrize(
    "family", ["mean_field", "student_t", "low_rank", "local", "flipout", "ensemble", "mc_dropout"]
)
def test_no_step_reads_the_device(family):
    """After the first steps: by our own watch, and by torch's."""
    step = make("on", family=family, network="dropout" if family == "mc_dropout" else "mlp", device=DEVICE)
    batches = [batch(step, seed=number) for number in range(8)]
    for x, y in batches[:5]:
        step(x, y, 13)
    if IS_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in batches[5:]:
            with HostReads(refuse=True).watching() if IS_GPU else contextlib.nullcontext():
                step(x, y, 13)
    finally:
        if IS_GPU:
            torch.cuda.set_sync_debug_mode("default")
    step.settle()


def test_an_unsound_step_changes_nothing_and_is_said_two_steps_later():
    step = make("on", device=DEVICE)
    train(step, 6, counts=(13,))
    before = step.posterior.buffer.flat.clone()
    x, y = batch(step)
    step(x * torch.nan, y, 13)
    step(x, y, 13)
    assert torch.equal(step.posterior.buffer.flat, before)
    with pytest.raises(NonFiniteError, match="step 6"):
        step(x, y, 13)
    assert torch.equal(step.posterior.buffer.flat, before)
    train(step, 3, counts=(13,))
    assert not torch.equal(step.posterior.buffer.flat, before)


def test_all_graphs_can_be_given_up_and_captured_anew():
    """torch ends a pool of memory with its last graph."""
    step = make("on", device=DEVICE, num_samples=8)
    for chunk_size in (1, 8, 1):
        step.set_chunk_size_(chunk_size)
        train(step, 6, counts=(13,))
    assert not IS_GPU or step.recorder.num_captures == 9


def test_a_search_for_a_chunk_size_ends():
    step = make("on", device=DEVICE, num_samples=8)
    search = ChunkSearch(step)
    for number in range(32):
        with search.timing():
            step(*batch(step, seed=number), 13)
    print(search.found, search.seconds)
    assert search.found in search.seconds


def test_memory_does_not_grow_with_the_samples():
    peaks = []
    for num_samples in (2, 32):
        step = make("on", network="wide", num_samples=num_samples, device=DEVICE)
        if IS_GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        train(step, 5, counts=(13,))
        peaks.append(torch.cuda.max_memory_reserved() if IS_GPU else 1)
        del step
    assert peaks[1] <= 1.05 * peaks[0]
