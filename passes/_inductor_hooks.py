"""Inductor's forms of a pass and of a partition. Apart from `_compat`, because their base classes load the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn
from torch.fx import GraphModule


class PreGradPass(CustomGraphPass):
    """Inductor's form of a pass over captured graphs. At module level, because cache keys pickle it."""

    def __init__(self, run: Callable[[GraphModule], None], salt: Callable[[], str], earlier: Any) -> None:
        self.run, self.salt, self.earlier = run, salt, earlier

    def __call__(self, graph: torch.fx.Graph) -> None:
        if self.earlier is not None:
            self.earlier(graph)
        module = graph.owning_module
        assert module is not None
        self.run(module)

    def uuid(self) -> Any:
        if self.earlier is None:
            return self.salt()
        earlier = getattr(self.earlier, "uuid", lambda: None)()
        return None if earlier is None else (self.salt(), earlier)


class Partitioner(CustomPartitionerFn):
    """Inductor's form of a partition function. `salt` stands for it in cache keys."""

    def __init__(self, run: Callable[..., tuple[GraphModule, GraphModule]], salt: str) -> None:
        self.run, self.salt = run, salt

    def __call__(self, gm: GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[GraphModule, GraphModule]:
        return self.run(gm, joint_inputs, **kwargs)

    def uuid(self) -> Any:
        return self.salt

    def __reduce__(self) -> Any:  # where a configuration is pickled as it is
        return str, (self.salt,)
