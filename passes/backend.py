"""The backend in front of Inductor: one object a phase, which runs the phase's passes over every captured graph."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from fxresu.kernels import kernel_salt
from fxresu.kernels.choose import ENVIRONMENT, MEASURE

from . import _compat, _compat_partition
from .markers import fed_weights
from .notices import RewriteWarning, warn
from .partition import partition
from .pipeline import Pipeline, PipelineRecord
from .plan import PhasePlan

_INSIDE = contextvars.ContextVar("fxresu_backend_is_compiling", default=False)


@functools.cache
def salt() -> str:
    """Hash of the source of all kernels and passes.

    A custom op's formula is no part of torch's cache keys: without this a changed backward would be served from a cache
    written by the old one.
    """
    digest = hashlib.sha256(kernel_salt().encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


class PhaseBackend:
    """A `torch.compile` backend: the pipeline, then Inductor (or another compiler).

    Args:
        names: gives FQNs by `id` of the tensor that graphs read a managed weight from, asked at every compilation.
        pipeline: the passes; they read the plan from the markers in the graph.
        compiler: `(module, inputs) -> callable`; None is Inductor.
        options: Inductor options (config patches).
        plan: for captured graphs without a marker: the pieces that graph breaks leave.

    Attributes:
        records: one `PipelineRecord` for every graph compiled so far.
        watching: graphs note the weights that they run with. A graph of one layer serves the next ones too where a
            graph break lets Dynamo compile layers apart: parameters are inputs.
    """

    def __init__(
        self,
        names: Callable[[], Mapping[int, str]] = dict,
        pipeline: Pipeline | None = None,
        compiler: Callable[[GraphModule, Sequence[Any]], Callable[..., Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        plan: PhasePlan | None = None,
    ) -> None:
        self.names = names
        self.pipeline = pipeline or Pipeline()
        self.compiler = compiler
        self.options = dict(options or {})
        self.plan = plan
        self.records: list[PipelineRecord] = []
        self.watching = True

    def __call__(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        names = self.names()
        fed = fed_weights(module, names)
        record = self.pipeline(module, names, self.plan)
        plan = PhasePlan.from_tag(record.plan_tag) if record.plan_tag else None
        with _inside():
            if plan is not None and plan.manages_activations:
                compiled = self._with_policy(module, inputs, plan, record)
            elif self.compiler is not None:
                compiled = self.compiler(module, inputs)
            else:
                compiled = _compat.inductor(module, inputs, self.options, salt())
        self.records.append(record)  # not before: Dynamo starts anew when a compiler asks it to, with another graph
        return self._watched(compiled, record, fed) if fed else compiled

    def _watched(
        self, compiled: Callable[..., Any], record: PipelineRecord, fed: Mapping[int, str]
    ) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if self.watching:
                names = self.names()
                served = {names.get(id(args[i]), own): own for i, own in fed.items()}
                record.serve({name: own for name, own in served.items() if name not in fed.values()})
            return compiled(*args)

        return run

    def _with_policy(
        self, module: GraphModule, inputs: Sequence[Any], plan: PhasePlan, record: PipelineRecord
    ) -> Callable[..., Any]:
        """Compile under the plan's policy for activations.

        Inductor and aot_eager take it, and compilers with an attribute `takes_partition`, as an argument `partition`.
        """
        split = functools.partial(partition, plan=plan, found=record.activations.append)
        if self.compiler is None:
            key = f"{salt()}{plan.tag}{os.environ.get(MEASURE, '')}"
            options = {**self.options, "custom_partitioner_fn": _compat_partition.partitioner(split, key)}
            if plan.activations == "offload":
                # Inductor's estimate counts what waits on the host as the device's, so that all orders seem to peak
                # alike: it put the sums for biases off to the end, and kept what they read.
                options.setdefault("reorder_for_peak_memory", False)
            # From AOTAutograd's cache it would come partitioned, and with no record of what the policy did.
            return _compat.inductor(module, inputs, options, key, partitioned_anew=True)
        if self.compiler is _compat.lookup_compiler("aot_eager"):
            return _compat_partition.traced_by_aot(module, inputs, split)
        if getattr(self.compiler, "takes_partition", False):
            return self.compiler(module, inputs, partition=split)  # type: ignore[call-arg]
        return self.compiler(module, inputs)


@contextlib.contextmanager
def _inside():
    token = _INSIDE.set(True)
    try:
        yield
    finally:
        _INSIDE.reset(token)


_TOLD: set[tuple[str, str, str]] = set()

user_records: list[PipelineRecord] = []
"""Records of graphs that the user's own `torch.compile(model)` brought through Inductor's pre-grad hook."""


_user_policy: list[tuple[PhasePlan, PipelineRecord]] = []  # of the graph that is on its way to the partitioner


def _pre_grad(module: GraphModule) -> None:
    if _INSIDE.get():
        return
    record = Pipeline()(module)
    _user_policy.clear()
    _compat.partition_anew(False)
    if not record.plan_tag:
        return
    _compat.key_caches(salt())
    user_records.append(record)
    plan = PhasePlan.from_tag(record.plan_tag)
    if plan.manages_activations:
        _user_policy.append((plan, record))
        _compat.partition_anew(True)
    for rewrite in record.rewrites:
        told = (record.plan_tag, rewrite.weight, rewrite.reason)
        if rewrite.reason and told not in _TOLD:
            _TOLD.add(told)
            warn(
                RewriteWarning,
                f"phase {record.plan_tag.partition('/')[0]}: {rewrite.weight} was not rewritten: {rewrite.reason}",
            )


def _pre_grad_salt() -> str:
    """The salt, and what else decides the outcome: caches are asked before the passes have seen the graph."""
    return salt() + os.environ.get(ENVIRONMENT, "") + os.environ.get(MEASURE, "")


def install_pre_grad_pass() -> None:
    """Give a plain `torch.compile(model)` the same passes, through Inductor's `pre_grad_custom_pass`. Idempotent."""
    _compat.install_pre_grad_pass(_pre_grad, _pre_grad_salt)


def _partition_of_users(module: GraphModule, inputs: Any, **kwargs: Any) -> tuple[GraphModule, GraphModule] | None:
    """Partition a graph of the user's own `torch.compile(model)`, if its plan has a policy for activations."""
    if _INSIDE.get() or not _user_policy:
        return None
    plan, record = _user_policy.pop()
    kwargs.pop("compiler", None)
    return partition(module, inputs, plan=plan, found=record.activations.append, **kwargs)


def install_partitioner() -> None:
    """Give a plain `torch.compile(model)` the plan's policy for activations too. Idempotent.

    Plans are part of the graphs (markers carry their tags), and so of torch's cache keys.
    """
    _compat_partition.install_partitioner(_partition_of_users, salt())
