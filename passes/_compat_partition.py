"""What leans on torch's partitioner of joint graphs, which is private. Checked on torch 2.11.0 and 2.13.0."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any
from unittest import mock

import torch
from torch.fx import GraphModule, Node
from torch.utils._ordered_set import OrderedSet
from torch.utils.checkpoint import CheckpointPolicy

from ._compat import size_hint, when_compiler_is_loaded


class SavedChoice:
    """What a partition of a joint graph may keep for the backward: torch's min-cut solver, with the freedom given.

    Attributes:
        forward: nodes that the forward needs, in order.
    """

    def __init__(self, graph: torch.fx.Graph, info: Any) -> None:
        self._graph, self._info = graph, info
        self.forward: list[Node] = list(info.required_fw_nodes)

    def solve(
        self, free: Collection[Node] = (), *, relaxed: bool = False, once: Collection[Node] = ()
    ) -> list[Node]:
        """Values to save, chosen so that least is saved.

        Args:
            free: nodes that may be computed again although torch's rules speak against it.
            relaxed: drop the rules that avoid memory traffic in the backward.
            once: nodes that must not be computed again; the user has not tagged them.
        """
        from torch._functorch import config, partitioners

        options = partitioners.MinCutOptions(
            ban_if_used_far_apart=config.ban_recompute_used_far_apart and not relaxed,
            ban_if_long_fusible_chains=config.ban_recompute_long_fusible_chains and not relaxed,
            ban_if_materialized_backward=config.ban_recompute_materialized_backward and not relaxed,
            ban_if_not_in_allowlist=config.ban_recompute_not_in_allowlist,
            ban_if_reduction=config.ban_recompute_reductions,
        )
        for node in once:  # the tag of the user's own checkpointing, which the solver reads
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        try:
            return partitioners.solve_min_cut(self._graph, self._info, options, OrderedSet(free) - OrderedSet(once))[0]
        finally:
            for node in once:
                del node.meta["recompute"]

    def is_cheap(self, node: Node) -> bool:
        """Whether torch's rules take the operation for one that is nearly free to repeat."""
        return partitioner_ops().is_recomputable(node)

    def is_view(self, node: Node) -> bool:
        """Whether the node's result shares its operand's memory."""
        return partitioner_ops().is_view(node)


@functools.cache
def partitioner_ops() -> Any:
    """torch's kinds of operations: views, random ones, those worth recomputing."""
    from torch._functorch import partitioners

    return partitioners.get_default_op_list()


def storage_of(node: Node) -> Any:
    """Key of the memory behind a node's (fake) result; None if it is no tensor."""
    from torch._inductor.fx_utils import get_node_storage

    return get_node_storage(node)


def size_of(node: Node) -> int:
    """Bytes of a node's result, by example sizes."""
    from torch._functorch.partitioners import _size_of

    return int(_size_of(node))


def memory_of(node: Node) -> int:
    """Bytes of the memory behind a node's result, which a view keeps alive as a whole."""
    value = node.meta["val"]
    return size_hint(value.untyped_storage().nbytes()) if torch._C._has_storage(value) else size_of(node)


def partitioned(
    module: GraphModule, inputs: Any, choose: Callable[[SavedChoice], list[Node]], **kwargs: Any
) -> tuple[GraphModule, GraphModule]:
    """torch's partition of a joint graph into forward and backward, with a choice of our own of what is saved."""
    from torch._functorch import partitioners

    def chosen(graph: torch.fx.Graph, info: Any, memory_budget: float = 1) -> list[Node]:
        return choose(SavedChoice(graph, info))

    with mock.patch.object(partitioners, "choose_saved_values_set", chosen):
        return partition_by_default(module, inputs, **kwargs)


def partition_by_default(module: GraphModule, inputs: Any, **kwargs: Any) -> tuple[GraphModule, GraphModule]:
    """torch's own partition; attention without dropout needs no state of the random generator to be computed again,
    which takes some 0.1 ms of the host in a forward and in a backward."""
    from torch._functorch import partitioners

    with mock.patch.object(partitioners, "has_recomputable_rng_ops", _draws_again):
        return partitioners.min_cut_rematerialization_partition(module, inputs, **kwargs)


def _draws_again(module: GraphModule) -> bool:
    """Whether something is computed again that draws random numbers."""
    from torch._functorch.partitioners import must_recompute

    return any(
        must_recompute(node) and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and _draws(node)
        for node in module.graph.nodes
    )


def _draws(node: Node) -> bool:
    """Whether a random operation draws: attention whose probability of dropout is 0 does not."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    for place, argument in enumerate(arguments):
        if argument.name == "dropout_p":
            given = node.args[place] if place < len(node.args) else node.kwargs.get("dropout_p", argument.default_value)
            return bool(given)
    return True


def partitioner(run: Callable[..., tuple[GraphModule, GraphModule]], salt: str) -> Any:
    """A partition function in Inductor's form. `salt` stands for it in cache keys."""
    from ._inductor_hooks import Partitioner  # here: it loads the compiler

    return Partitioner(run, salt)


def install_partitioner(run: Callable[..., tuple[GraphModule, GraphModule] | None], salt: str) -> None:
    """Let Inductor ask `run` for every partition; where it returns None the partitioner that was there before decides.
    Idempotent."""
    when_compiler_is_loaded(lambda: _set_partitioner(run, salt))


def _set_partitioner(run: Callable[..., tuple[GraphModule, GraphModule] | None], salt: str) -> None:
    from torch._inductor import config

    from ._inductor_hooks import Partitioner

    earlier = config.custom_partitioner_fn
    if isinstance(earlier, Partitioner):
        return

    def partition(module: GraphModule, inputs: Any, **kwargs: Any) -> tuple[GraphModule, GraphModule]:
        found = run(module, inputs, **kwargs)
        if found is not None:
            return found
        return (earlier or partition_by_default)(module, inputs, **kwargs)

    config.custom_partitioner_fn = Partitioner(partition, f"{salt}{earlier.uuid() if earlier is not None else ''}")


def traced_by_aot(
    module: GraphModule,
    inputs: Sequence[Any],
    partition: Callable[..., tuple[GraphModule, GraphModule]],
    *,
    decompose: bool = False,
) -> Callable[..., Any]:
    """Compile a captured graph with AOTAutograd alone: forward and backward run operation by operation.

    Args:
        decompose: into the operations that Inductor would see.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._inductor.decomposition import select_decomp_table

    compiler = aot_autograd(
        fw_compiler=boxed_nop,
        partition_fn=partition,
        decompositions=select_decomp_table() if decompose else {},
        keep_inference_input_mutations=True,
    )
    return compiler(module, inputs)
