"""Where a training is: the key of its next step, and what a resume needs."""

from __future__ import annotations

from typing import Any

from ..comm import GridComm
from ..errors import ConfigError, Fault
from ..noise import GENERATOR, Key, Stream
from ..posteriors import Posterior
from ..trees import map_tensors
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

    def gather_state(self) -> dict[str, Any]:
        """Return all that a resume needs, of the whole job: no grid is in it, `load_state_dict` takes it on any.

        "model" and "optimizer" by the names of the weights, "num_steps", and "generator", the name of the generator of the
        noise. A learning-rate schedule has a state of its own. Tensors may be views of those of the posterior.

        Collective over ``sample_comm`` where rows of the posterior or the optimizer's state are spread over it.
        """
        model = self.posterior.state_dict()
        if not self.posterior.is_replicated:
            mine = map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), model)
            model = {name: tensor for part in self.comm.gather_objects(mine, "sample") for name, tensor in part.items()}
        optimizer = self.updater.gather_state()
        return {"model": model, "optimizer": optimizer, "num_steps": self.num_steps, "generator": GENERATOR}

    def state_dict(self) -> dict[str, Any]:
        """Return what `gather_state` does, from this rank alone. Local.

        Raises
        ------
        ConfigError
            A part of it is on other ranks.
        """
        spread = "a sharded optimizer has its state" if self.reducer.divided else "an ensemble has its members"
        if (self.reducer.divided or not self.posterior.is_replicated) and self.comm.grid.sample_size > 1:
            rule = f"{spread} spread over the ranks of a sample group"
            raise ConfigError(Fault("state_dict", type(self.updater).__name__, rule, "Use gather_state, on all ranks"))
        return self.gather_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `gather_state` or `state_dict` returned, on this or another grid. Local.

        Raises
        ------
        ConfigError
            It is of another network, optimizer, or generator of the noise.
        """
        if state["generator"] != GENERATOR:
            rule = f"this hpc_bnn draws its noise with {GENERATOR}: it would not go on to the same numbers"
            remedy = "Load state['model'] with posterior.load_state_dict to start anew from it"
            raise ConfigError(Fault("generator", state["generator"], rule, remedy))
        self.posterior.load_state_dict(state["model"])
        self.updater.load_state(state["optimizer"])
        self.num_steps = state["num_steps"]
