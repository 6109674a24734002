"""Where a training is: the key of its next step, and what a resume needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..comm import GridComm
from ..errors import ConfigError, Fault
from ..grid import Grid
from ..noise import GENERATOR, Key, Stream
from ..posteriors import Posterior
from .places import Places, outline_of
from .reducer import Reducer
from .updaters import Updater


class StepState:
    """Gives and takes the state of a step: of the whole job, without a grid in it."""

    posterior: Posterior
    comm: GridComm
    seed: int
    num_steps: int
    reducer: Reducer
    updater: Updater

    @property
    def key(self) -> Key:
        """Of the weights of sample 0 in the next step."""
        return Key(self.seed, Stream.NOISE, step=self.num_steps)

    @property
    def is_spread(self) -> bool:
        """Whether a part of the state is on other ranks of the sample group."""
        return (self.reducer.divided or not self.posterior.is_replicated) and self.comm.grid.sample_size > 1

    def gather_state(self, *, to_first: bool = False) -> dict[str, Any]:
        """Return all that a resume needs, of the whole job: no grid is in it, `load_state_dict` takes it on any.

        "model" and "optimizer" by the names of the weights, "num_steps", and "generator", the name of the generator of the
        noise. A learning-rate schedule has a state of its own. Tensors may be views of those of the posterior.

        With ``to_first`` only the first rank of the job has it, which writes it; the others need no memory for it.

        Collective over the world where rows of the posterior or the optimizer's state are spread over the sample group.
        """
        comm, state = self.comm, {}
        if comm.grid.is_first("data") or not self.is_spread:  # one sample group has it all
            model = self.posterior.state_dict()
            if not self.posterior.is_replicated:
                parts = comm.gather_trees(model, "sample")
                model = {name: tensor for part in parts for name, tensor in part.items()}
            optimizer = self.updater.gather_state()
            state = {"model": model, "optimizer": optimizer, "num_steps": self.num_steps, "generator": GENERATOR}
        if to_first:
            return state if comm.grid.is_first("world") else {}
        return comm.broadcast_tree(state) if self.is_spread else state

    def state_dict(self) -> dict[str, Any]:
        """Return what `gather_state` does, from this rank alone; `ConfigError` where a part is on others. Local."""
        if self.is_spread:
            spread = "a sharded optimizer has its state" if self.reducer.divided else "an ensemble has its members"
            rule = f"{spread} spread over the ranks of a sample group"
            raise ConfigError(Fault("state_dict", type(self.updater).__name__, rule, "Use gather_state, on all ranks"))
        return self.gather_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `gather_state` or `state_dict` returned, on this or another grid. Local.

        `ConfigError` where it is of another network, optimizer, or generator of the noise.
        """
        outline, tensors = outline_of(state)
        places, end = self._begin_load(outline)
        places.fill_(GridComm(Grid()), tensors)
        end()

    def scatter_state(self, state: dict[str, Any] | None) -> None:
        """Go on from the state of world rank 0, as `load_state_dict` does; others give None. Collective over the world.

        Each rank takes what it needs of it, in pieces, so that none needs memory for the whole. Errors are raised on all.
        """
        names = ("model", "optimizer", "num_steps", "generator")
        outline, tensors = outline_of(None if state is None else {name: state[name] for name in names})
        outline = self.comm.broadcast_object(outline)
        with self.comm.agree("restoring the checkpoint"):
            places, end = self._begin_load(outline)
        places.fill_(self.comm, tensors)
        with self.comm.agree("restoring the checkpoint"):
            end()

    def _begin_load(self, state: dict[str, Any]) -> tuple[Places, Callable[[], None]]:
        """Check the outline of a state; return where its tensors go, and what ends to load it. Local."""
        if state["generator"] != GENERATOR:
            rule = f"this hpc_bnn draws its noise with {GENERATOR}: it would not go on to the same numbers"
            remedy = "Load state['model'] with posterior.load_state_dict to start anew from it"
            raise ConfigError(Fault("generator", state["generator"], rule, remedy))
        places = Places(state, self.posterior.buffer.flat.device)
        for name, value in self.posterior.places_of(state["model"]).items():
            places.add(state["model"][name], value)
        load_optimizer = self.updater.begin_load(state["optimizer"], places)

        def end() -> None:
            load_optimizer()
            self.num_steps = state["num_steps"]

        return places, end


def scatter_model(posterior: Posterior, model: dict[str, Tensor] | None, comm: GridComm) -> None:
    """Take over the state of a posterior that world rank 0 has, as `Posterior.load_state_dict` does; the others give None.

    Collective over the world, with the memory of `StepState.scatter_state`.
    """
    outline, tensors = outline_of(model)
    outline = comm.broadcast_object(outline)
    places = Places(outline, posterior.buffer.flat.device)
    with comm.agree("restoring the checkpoint"):
        for name, value in posterior.places_of(outline).items():
            places.add(outline[name], value)
    places.fill_(comm, tensors)
