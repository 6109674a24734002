"""CUDA graphs on a CPU: operations that are recorded once, and run again on the memory that they had."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class InterpretedGraph(TorchDispatchMode):
    """A `Graph` of `hpc_bnn.training.capture`: what Python decided when it was recorded stays so, and tensors stay in place.

    A capture must leave no trace: what was there before is put back.
    """

    def __init__(self):
        super().__init__()
        self.operations, self._own, self._former = [], set(), {}

    def capture(self, body, num_gradients):
        with self:
            body()
        for tensor, former in self._former.values():
            tensor.copy_(former)
        self._former.clear()

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():  # where they were recorded
            for function, args, kwargs, results in self.operations:
                again = tree_leaves(function(*args, **kwargs))
                for result, value in zip(results, again):
                    if isinstance(result, torch.Tensor) and result is not value:
                        assert result.shape == value.shape and result.dtype == value.dtype
                        result.copy_(value)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        written = [a.name for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        for argument, value in [*zip(function._schema.arguments, args), *kwargs.items()]:
            name = argument if isinstance(argument, str) else argument.name
            for tensor in tree_leaves(value) if name in written else ():
                if isinstance(tensor, torch.Tensor):
                    self._keep(tensor)
        # A graph knows addresses: a parameter may be given other memory later
        recorded = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        result = function(*args, **kwargs)
        leaves = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves(result)]
        if written:
            self.operations.append((function, *recorded, []))
        elif not function.is_view and any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            inputs = {storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            mine = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            if not all(storage(leaf) in inputs for leaf in mine):  # detach, or a reshape that was a view
                self._own |= {storage(leaf) for leaf in mine}
                self.operations.append((function, *recorded, leaves))
        return result

    def _keep(self, tensor):
        whole = tensor.untyped_storage()
        if storage(tensor) not in self._own and storage(tensor) not in self._former:
            flat = torch.empty(0, dtype=torch.uint8).set_(whole)
            self._former[storage(tensor)] = flat, flat.clone()


def storage(tensor):
    return tensor.untyped_storage()._cdata
