"""Captured steps without a GPU: the same segments, recorded as graphs of operations that run again (`graphs.InterpretedGraph`)."""

import json
import logging
import math

import pytest
import torch
from captured_cases import CASES, KINDS, NUM_STEPS, batch, same, train
from captured_cases import make as make_plain
from graphs import InterpretedGraph
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import hpc_bnn
from hpc_bnn.errors import DataError, NonFiniteError, RankError
from hpc_bnn.posteriors.families import MeanField
from hpc_bnn.run.profiling import Profiler
from hpc_bnn.training.capture import Fixed, HostReads, Pool
from hpc_bnn.training.chunk_search import GAIN, ChunkSearch


def make(capture="on", graphs=True, **options):
    step = make_plain(capture, **options)
    if step.recorder is not None and graphs:
        step.recorder.new_graph = InterpretedGraph
    return step


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(f"{k}={v}" for k, v in case.items()))
def test_captured_steps_have_the_bits_of_plain_ones(case):
    options = dict(case)
    views, dtype = options.pop("views", False), options.get("dtype", torch.float32)
    want = train(make("off", **options), views=views, dtype=dtype)
    step = make(**options)
    same(train(step, views=views, dtype=dtype), want)
    if options.get("optimizer") == "rmsprop":
        assert ["RMSprop cannot leave an update out" in reason for reason in step.recorder.said] == [True]
    else:
        assert not step.recorder.said
        # Of a batch of each size: the samples in one segment or two, with those of a smaller chunk; checksum and update
        assert step.recorder.num_captures >= 4


class Wrong(InterpretedGraph):
    """A graph that leaves something out."""

    def replay(self):
        self.operations = self.operations[:-3]
        super().replay()


@pytest.mark.parametrize(
    "options", [{}, {"objective": "crps", "likelihood": "implicit", "num_samples": 4, "chunk_size": 4}]
)
def test_a_graph_that_gives_other_numbers_is_not_used(options):
    step = make(**options)
    step.recorder.new_graph = Wrong
    same(train(step), train(make("off", **options)))
    assert step.recorder.said == {"a graph gave other numbers than the operations that it comes from"}


# --- counted operations and host reads ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((name, torch.float32) for name in KINDS if name != "mc_dropout"), ("flipout", torch.float64)],
)
def test_no_step_reads_the_device(family, dtype):
    """In the whole call, update included; and the number of operations grows by a chunk's for each sample."""
    counts = []
    for num_samples in (2, 3, 4):
        step = make(family=family, graphs=False, dtype=dtype, num_samples=num_samples)
        for number in range(3):
            step(*batch(step, seed=number, dtype=dtype), 13)
        x, y = batch(step, seed=3, dtype=dtype)
        with HostReads(refuse=True).watching() as reads:
            step(x, y, 13)
        counts.append(reads.num_operations)
    per_sample = counts[1] - counts[0]
    assert counts[2] - counts[1] == per_sample <= (30 if family == "mean_field" else 115)
    assert counts[0] - 2 * per_sample <= (85 if family == "mean_field" else 170)


def test_the_whole_step_runs_on_tensors_without_numbers():
    with FakeTensorMode():
        for options in ({}, {"family": "student_t"}, {"objective": "log_predictive"}, {"optimizer": "sgd"}):
            step = make(graphs=False, **options)
            step.leave_out_checks()
            for _ in range(4):
                for slot in step._latch._to_host:
                    slot.array[:] = 1  # sound
                step(torch.randn(13, 1, 8, 8), torch.zeros(13, dtype=torch.int64), 13)
            assert step.num_steps == 4


def test_what_reads_is_seen():
    x, mask = torch.arange(6.0), torch.arange(6) > 2
    reading = (
        lambda: x.sum().item(), x.tolist, x.numpy, lambda: bool(x[0] > 0), lambda: float(x[0]), lambda: x[mask],
        lambda: x.nonzero(), lambda: torch.equal(x, x), lambda: torch.tensor(1.0), lambda: torch.as_tensor([1.0]),
        lambda: x.new_tensor([1.0]), lambda: x.masked_select(mask), lambda: x.unique(), lambda: x.to("meta"),
        lambda: torch.repeat_interleave(mask.long()), lambda: x.clone().index_put_((mask,), x[0]),
    )  # fmt: skip
    for read in reading:
        with pytest.raises(RuntimeError, match="the host would wait"), HostReads(refuse=True).watching():
            read()
        with HostReads().watching() as reads:
            read()
        assert reads.found
    with HostReads(refuse=True).watching() as reads:
        torch.where(mask, x, 0).sum().add_(1)
        x.repeat_interleave(2), x[torch.arange(2)], torch.zeros(()), x.view(2, 3), x.double()
    assert reads.num_operations >= 8


# --- what a capture fixes ------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Reads a number, a list, a buffer and a tensor that users may change."""

    def __init__(self):
        super().__init__()
        self.layer, self.drop, self.norm = nn.Linear(64, 3), nn.Dropout(0.3), nn.BatchNorm1d(3)
        self.factor, self.factors, self.extra = 1.0, {"a": [1.0]}, torch.ones(3)
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, x):
        return (
            self.drop(self.norm(self.layer(x.flatten(1)))) * (self.factor * self.factors["a"][0]) * self.extra
            + self.shift
        )


CHANGES = {
    "rate of dropout": lambda step: setattr(step.posterior.module.drop, "p", 0.6),
    "mode": lambda step: step.posterior.module.drop.eval(),
    "attribute": lambda step: setattr(step.posterior.module, "factor", 2.0),
    "attribute in a container": lambda step: step.posterior.module.factors["a"].__setitem__(0, 2.0),
    "tensor": lambda step: setattr(step.posterior.module, "extra", 2 * torch.ones(3)),
    "buffer": lambda step: setattr(step.posterior.module, "shift", torch.ones(3)),
    "memory of a buffer": lambda step: setattr(step.posterior.module.shift, "data", torch.ones(3)),
    "new attribute": lambda step: step.posterior.module.__dict__.__setitem__("forward", lambda x: x.flatten(1)[:, :3] * step.posterior.module.layer.weight.sum()),
    "momentum of BatchNorm": lambda step: setattr(step.posterior.module.norm, "momentum", 0.5),
    "hyper-parameter": lambda step: step.optimizer.optimizer.param_groups[0].update(betas=(0.5, 0.9)),
    "prior": lambda step: setattr(step.posterior.family_, "prior", hpc_bnn.GaussianPrior(0.1)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_python_would_hide_in_a_graph_recaptures(change):
    results = []
    for capture in ("off", "on"):
        step = make(capture, net=Scaled, max_gradient_norm=None)
        train(step, 4, counts=(13,))
        before = step.recorder and step.recorder.num_captures
        CHANGES[change](step)
        results.append(train(step, 4, counts=(13,)))
    same(results[1], results[0])
    assert step.recorder.num_captures > before


def test_rates_kl_weights_and_steps_recapture_nothing():
    step = make()  # `train` changes the first two in each step
    train(step, 12, counts=(13,))
    assert step.recorder.num_captures == 3


def test_a_step_that_is_launched_anew_for_a_trace_has_the_same_bits(tmp_path):
    step, plain = make(), make("off")
    profiler = Profiler(step, 2, tmp_path / "trace.json")
    for number in range(12):
        with profiler.recording():
            step(*batch(step, seed=number), 13)
        plain(*batch(plain, seed=number), 13)
    step.settle()
    assert torch.equal(step.posterior.buffer.flat, plain.posterior.buffer.flat)
    names = [event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert names.count("hpc_bnn: draw") == names.count("hpc_bnn: fold") == 5
    assert names.count("hpc_bnn: reduce") == names.count("hpc_bnn: update") == 1
    assert "draw_" not in vars(step.posterior)


def test_a_pool_that_has_lost_its_last_graph_is_another_one():
    """torch refuses to capture into it again."""
    pool, graphs = Pool(object), [nn.Identity() for _ in range(3)]
    handles = [pool.handle_for(graph) for graph in graphs[:2]]
    assert handles[0] is handles[1]
    del graphs[:2]
    assert pool.handle_for(graphs[0]) is not handles[0]


# --- the search for a chunk size ---------------------------------------------------------------------------


class Searching(hpc_bnn.VariationalStep):
    def __call__(self, *arguments, **options):
        with self.search.timing():
            return super().__call__(*arguments, **options)


def search(room=math.inf, **options):
    """Search in captured steps of 9 samples; return the search and what the steps gave."""
    step = make(dtype=torch.float64, num_samples=9, **options)
    step.__class__, found = Searching, ChunkSearch(step)
    object.__setattr__(step, "search", found)
    found._room = lambda size: room
    return found, train(step, 36, torch.float64)


@pytest.mark.parametrize("objective", ["elbo", "log_predictive"])
def test_a_search_changes_no_number_and_keeps_the_fastest(objective):
    found, got = search(objective=objective)
    want = train(make("off", dtype=torch.float64, num_samples=9, objective=objective), 36, torch.float64)
    for a, b in zip(got[0], want[0]):
        assert a == pytest.approx(b, rel=1e-11)
    for name, value in want[1].items():
        torch.testing.assert_close(got[1][name], value, rtol=1e-9, atol=1e-11)
    seconds = found.seconds
    assert list(seconds) == [1, 4, 9][: len(seconds)]
    best = 1
    for size in list(seconds)[1:]:
        best = size if seconds[size] < GAIN * seconds[best] else best
    assert found.found == found._step.loop.chunk_size == best
    assert len(seconds) == 3 or seconds[4] >= GAIN * seconds[1]


def test_a_search_stays_within_the_memory_and_walks_where_it_has_to(caplog):
    found, _ = search(room=3.0)
    assert found.found == 1 and list(found.seconds) == [1]
    with caplog.at_level(logging.INFO):
        found, _ = search(net=Counting)
    assert found.found == 1 and list(found.seconds) == [1, 4] and not found._step.loop.can_batch
    [said] = [record for record in caplog.records if "chunk_size auto: 1" in record.message]
    assert "num_calls" in said.message
    assert not [record for record in caplog.records if "evaluated one after another" in record.message]


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.num_calls = nn.Linear(64, 3), 0

    def forward(self, x):
        self.num_calls += 1
        return self.layer(x.flatten(1)) / self.num_calls


class Reading(Counting):
    def forward(self, x):
        y = self.layer(x.flatten(1))
        return y if y.sum() > 0 else 2 * y


class Drawing(Counting):
    def forward(self, x):
        return self.layer(x.flatten(1)) + torch.rand(())


class Hooked(Counting):
    seen = 0

    def __init__(self):
        super().__init__()
        self.layer.register_forward_hook(self.see)

    def see(self, layer, inputs, outputs):
        Hooked.seen += 1

    def forward(self, x):
        return self.layer(x.flatten(1))


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Counting, "changes attributes"), (Reading, "makes the host wait for the device (__bool__"),
        (Drawing, "draws numbers of its own"), (Hooked, "has hooks"),
    ],
)  # fmt: skip
def test_what_python_does_in_each_pass_stays_so_and_this_is_said_once(net, reason, caplog):
    caplog.set_level(logging.INFO)
    results = []
    for capture in ("off", "on"):
        torch.manual_seed(0)
        step = make(capture, net=net)
        torch.manual_seed(0)
        results.append(train(step))
    same(results[1], results[0])
    assert [reason in said for said in step.recorder.said] == [True]
    assert caplog.text.count(reason) == 1
    assert net is not Hooked or Hooked.seen >= 2 * NUM_STEPS * 5


# --- the latch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "network"), [("adam", "mlp"), ("adamw", "mlp"), ("sgd", "mlp"), ("adam", "residual")]
)
def test_from_an_unsound_step_on_nothing_changes_until_it_is_read(optimizer, network):
    step = make(optimizer=optimizer, network=network)
    train(step, 5, counts=(13,))

    def state():
        found = [value for state in step.optimizer.optimizer.state.values() for value in state.values()]
        kept = step.posterior.buffer.flat, *step.posterior.module.buffers(), *found
        return [value.clone() for value in kept]

    before = state()
    x, y = batch(step)
    x[0, 0, 0, 0] = torch.nan
    results = [step(x, y, 13)]
    results.append(step(*batch(step, seed=8), 13))  # sound by itself
    assert all(map(torch.equal, state(), before))
    with pytest.raises(NonFiniteError, match="step 5: the loss or a gradient is not finite on rank 0"):
        step(*batch(step, seed=9), 13)
    assert step.num_steps == 5
    assert all(map(torch.equal, state(), before))
    plain = make("off", optimizer=optimizer, network=network)
    same(train(step, 3), [train(plain, 5, counts=(13,)), train(plain, 3)][1])
    assert torch.isnan(torch.tensor(results[0].data_term))


@pytest.mark.parametrize("read", ["settle", "gather_state", "state_dict"])
def test_an_unsound_step_is_read_before_its_state_is(read):
    step = make()
    train(step, 4, counts=(13,))
    step(torch.full((13, 1, 8, 8), torch.inf), batch(step)[1], 13)
    with pytest.raises(NonFiniteError, match="step 4"):
        getattr(step, read)()
    getattr(step, read)()
    assert step.num_steps == 4


@pytest.mark.parametrize(
    ("error", "message", "targets", "size"),
    [
        (DataError, "a target is 7 on rank 0 in step 4", 7, 13),
        (RankError, "step 4: global_batch_size 14: the batch has 13 examples", 0, 14),
    ],
)  # fmt: skip
def test_what_else_makes_a_step_unsound_is_said_as_late(error, message, targets, size):
    step = make()
    train(step, 4, counts=(13,))
    before = step.posterior.buffer.flat.clone()
    x, y = batch(step)
    step(x, torch.full_like(y, targets), size)
    step(x, y, 13)
    assert torch.equal(step.posterior.buffer.flat, before)
    with pytest.raises(error, match=message):
        step(x, y, 13)
    assert step.num_steps == 4


def test_an_update_that_is_launched_anew_does_not_go_on_from_an_unsound_step():
    step = make()
    train(step, 4, counts=(13,))
    step(torch.full((13, 1, 8, 8), torch.nan), batch(step)[1], 13)
    before = step.posterior.buffer.flat.clone()
    step.optimizer.optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(NonFiniteError, match="step 4"):
        step(*batch(step), 13)
    assert torch.equal(step.posterior.buffer.flat, before)
    step(*batch(step), 13)
    assert not torch.equal(step.posterior.buffer.flat, before)
    assert "the host waits before each update: the optimizer has hooks" in step.recorder.said


def test_the_first_step_raises_at_once():
    step = make()
    with pytest.raises(NonFiniteError, match="step 0"):
        step(torch.full((13, 1, 8, 8), torch.nan), batch(step)[1], 13)


class Chain(MeanField):
    """Adds noise after the update."""

    name = "chain"

    def after_update_(self, grads, slots, samples, draw, scalars):
        slots["loc"].add_(draw.normal((), slots["loc"].numel())[0] * scalars.learning_rate.to(slots["loc"]))


def test_what_a_family_does_after_the_update_is_latched_and_drawn_anew():
    same(train(make(family=Chain())), train(make("off", family=Chain())))
    step = make(family=Chain())
    train(step, 5, counts=(13,))
    before = step.posterior.loc.clone()
    step(torch.full((13, 1, 8, 8), torch.nan), batch(step)[1], 13)
    assert torch.equal(step.posterior.loc, before)


def test_a_stop_request_and_results_are_seen_late_and_right():
    step, plain = make(), make("off")
    for number in range(6):
        step.wants_stop = plain.wants_stop = number == 4
        late, at_once = (s(*batch(s, seed=number), 13) for s in (step, plain))
        assert late.wants_stop == (number == 4)
        assert vars(at_once).items() <= vars(late).items()
    with pytest.raises(AttributeError):
        assert late.other
    assert (step.lag, plain.lag) == (2, 0)


def test_a_resumed_run_goes_on_as_one_that_was_not_interrupted():
    step, other = make(), make()
    train(step, 5)
    state = step.gather_state()
    train(other, 3)
    other.load_state_dict(state)
    same(train(other), train(step))


def test_what_is_compared():
    layer = nn.BatchNorm1d(3)
    layer.numbers = [1.5, {"a": 2}]
    fixed, seen = Fixed(), []

    def is_as_before(*also):
        seen.append(fixed.now(layer, also=also))
        return seen[-1] is seen[-2]

    seen.append(fixed.now(layer, also=(0.5, 2)))
    assert is_as_before(0.5, 2)
    assert not is_as_before(0.25, 2)
    assert not is_as_before(0.25, 2.0)
    layer.numbers = [1.5, {"a": 2}]  # another list of the same
    assert is_as_before(0.25, 2.0)
    layer.numbers[1]["a"] = 3
    assert not is_as_before(0.25, 2.0)
    layer.eval()
    assert not is_as_before(0.25, 2.0)
    layer.running_mean.data = torch.zeros(3)  # the same tensor, with other memory
    assert not is_as_before(0.25, 2.0)
    layer.name = "more"
    assert not is_as_before(0.25, 2.0)
    assert is_as_before(0.25, 2.0)
