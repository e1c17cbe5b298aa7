"""Calls a transformed model: picks the compiled function of the phase, or runs eager with the phase's precision."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxresu.kernels import transfers
from fxresu.kernels._autocast import active_dtype, autocast_off
from fxresu.passes import PhaseBackend, PhasePlan, Pipeline, PipelineRecord, configured_passes
from fxresu.passes import _compat as compat

from . import weight_storage
from .eager_offload import EagerOffload
from .errors import NothingCompiledError, PhaseError
from .fallbacks import Teller, observed
from .model_state import ModelState, managed_weights, operand_names, state_of
from .recurrent import recurrent

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}  # fp8 needs the pass


@dataclasses.dataclass
class CompiledEntry:
    """The compiled function of one phase (or of inference), with what came of compiling it.

    Attributes:
        plan: what it was compiled for.
        backend: holds a record for every graph.
        function: the compiled callable.
        calls: how often it ran.
        breaks: graph breaks met while it compiled.
        first_graphs: graphs of its first call; every later one is a recompilation.
        eager_reads: managed weights that eager code read during compiled calls, with the number of such calls.
        eager_cause: why eager code read them, as of the first such call.
        recompiles_told: recompilations that a warning was given for.
        broken: Dynamo is known to leave code of the model to Python: forward-only phases then run under `no_grad`,
            which a pass over graphs cannot give that code.
        recurrent: the model has an RNN, GRU or LSTM.
    """

    plan: PhasePlan
    backend: PhaseBackend
    function: Callable[..., Any]
    calls: int = 0
    breaks: int = 0
    first_graphs: int = 0
    eager_reads: dict[str, int] = dataclasses.field(default_factory=dict)
    eager_cause: str = ""
    recompiles_told: int = 0
    broken: bool = False
    recurrent: bool = False

    @property
    def graphs(self) -> list[PipelineRecord]:
        """Records of all graphs compiled so far."""
        return self.backend.records

    @property
    def recompiles(self) -> int:
        """Graphs compiled after the first call."""
        return len(self.graphs) - self.first_graphs if self.calls else 0


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The frame that is compiled. `_call_impl` and not the module: Dynamo skips frames of torch's own classes."""
    return module._call_impl(*args, **kwargs)


class PhaseRunner:
    """Stands in `module._compiled_call_impl` of a transformed model's root.

    Attributes:
        entries: compiled functions by the tag of the graph's plan, for forward-only plans with "/packed" on packed
            weights and with "/frozen" where RESU trains θ alone.
        eager_calls: calls that ran uncompiled although compilation is on, by reason.
        on_input: gets the arguments of every call under autograd, before it.
        on_output: gets what every call under autograd returns; for the loss that a loop does not hand over itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.entries: dict[str, CompiledEntry] = {}
        self.eager_calls: dict[str, int] = {}
        self._teller = Teller()
        self.on_input: Callable[[tuple, dict[str, Any]], None] | None = None
        self.on_output: Callable[[Any], None] | None = None
        self._pending: weakref.WeakSet[_Pending] = weakref.WeakSet()
        self._offload = EagerOffload()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        assert model is not None  # it is what is called
        if compat.tracing():
            return model._call_impl(*args, **kwargs)
        if self.on_input is not None and torch.is_grad_enabled():
            self.on_input(args, kwargs)
        record = state_of(model)
        record.state.tracked = torch.is_grad_enabled()
        if record.base == "resu" and record.storage == "offload":
            _check_precision(model, record)
        if record.compile_options is None:
            out = self._eager(model, record, args, kwargs)
        elif (reason := _uncompilable()) is not None:
            self.eager_calls[reason] = self.eager_calls.get(reason, 0) + 1
            self._teller.eager_call(reason, type(model).__name__)
            out = self._eager(model, record, args, kwargs)
        else:
            out = self._compiled(model, record, args, kwargs)
        if torch.is_grad_enabled():
            self._watch(out)
            if self.on_output is not None:
                self.on_output(out)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> PhaseRunner:
        # A parametrized module copies its `__dict__` itself, and the runner with it.
        model: Any = self._model()
        return PhaseRunner(memo.get(id(model), model))

    @property
    def backward_pending(self) -> bool:
        """Whether a graph of an earlier forward is still alive and has not run backward."""
        return any(not p.done for p in self._pending)

    def _eager(self, model: nn.Module, record: ModelState, args: tuple, kwargs: dict) -> Any:
        plan = PhasePlan.from_tag(record.state.current()[1])
        if record.transfers is not None and record.transfers.armed:
            record.transfers.begin()
        if plan.precision == "inherit" and plan.activations in ("save", "needed"):
            out = model._call_impl(*args, **kwargs)  # contexts that do nothing take a quarter of a small layer's time
        else:
            out = self._eager_planned(model, plan, args, kwargs)
        if record.transfers is not None:
            record.transfers.finish()
        return out

    def _eager_planned(self, model: nn.Module, plan: PhasePlan, args: tuple, kwargs: dict) -> Any:
        """An eager call in the precision that the plan asks for, keeping for the backward what it says."""
        with _precision(model, plan.precision) as low, contextlib.ExitStack() as stack:
            if plan.activations == "discard":
                stack.enter_context(torch.no_grad())
            if plan.activations == "offload" and torch.is_grad_enabled():
                stack.enter_context(self._offload(plan, _alive(model, args, kwargs)))
            out = model._call_impl(*args, **kwargs)
        return out if low is None else pytree.tree_map(lambda t: _from_low(t, low), out)

    def _compiled(self, model: nn.Module, record: ModelState, args: tuple, kwargs: dict) -> Any:
        if record.base == "resu" and record.state.plan.compute_copy == "bf16":
            refresh_copies(model, record)
        entry = self.entry(model, record)
        books = compat.break_books()
        with observed(record.state) as call, contextlib.ExitStack() as stack:
            if not entry.calls and record.storage == "packed":
                stack.enter_context(compat.honour_dynamic_marks())
            elif not entry.calls:
                _fix_sizes(model)
            if entry.recurrent:
                stack.enter_context(compat.recurrent_modules_allowed())
            if entry.plan.precision != "inherit":
                # The graph has casts of its own; traced under autocast it would remember autocast's dtypes.
                stack.enter_context(_no_autocast(model))
            if entry.plan.activations == "discard" and not torch.is_inference_mode_enabled():
                # One graph whether or not the caller tracks gradients; the pass switches them off inside it.
                stack.enter_context(torch.set_grad_enabled(not entry.broken))
            stack.enter_context(transfers.active(record.transfers))
            out = entry.function(model, *args, **kwargs)
            if entry.plan.activations == "discard" and any(map(_is_tracked, pytree.tree_leaves(out))):
                out = pytree.tree_map(lambda v: v.detach() if _is_tracked(v) else v, out)
        if record.transfers is not None and record.transfers.armed:  # the graph has no transfers: `insert_transfers`
            record.transfers.finish()
            record.transfers.begin()
        entry.calls += 1
        if entry.calls == 1:
            entry.backend.watching = False
            entry.first_graphs = len(entry.graphs)
            entry.breaks = compat.graph_breaks(since=books)
            # What is left beside an LSTM may be eager code too; the weights that it reads are warned about below.
            if not entry.graphs and not (call.reads and entry.recurrent):
                raise NothingCompiledError(
                    f"compiling {type(model).__name__} for phase {record.state.plan.phase} gave no graph: torch.compile"
                    " skipped it (TORCH_LOGS=graph_breaks says why). Pass compile=False to run it eager knowingly"
                )
        if call.reads or entry.calls == 1 or entry.recompiles > entry.recompiles_told:
            self._teller.after_call(entry, call, set(managed_weights(model)))
        return out

    def entry(self, model: nn.Module, record: ModelState) -> CompiledEntry:
        """The compiled function for the current phase and grad mode, made on first use."""
        _, tag = record.state.current()
        plan = PhasePlan.from_tag(tag)
        # A forward-only plan serves resident and packed weights; these are other inputs, of other shapes.
        packed = record.storage == "packed" and record.base == "resu" and not plan.trains
        key = f"{tag}/packed" if packed else tag
        # Dynamo guards on `requires_grad`, which RESU takes from what it freezes.
        key += "/frozen" if record.frozen and not plan.trains else ""
        if key not in self.entries:
            options = dict(record.compile_options or {})
            keep_text = options.pop("keep_text", False)
            compiler = options.pop("backend", None)
            inductor = {**compat.mode_options(options.pop("mode", None)), **(options.pop("options", None) or {})}
            names = weakref.ref(model)
            passes = configured_passes(record.kernels, graphed=bool(inductor.get("triton.cudagraphs")))
            backend = PhaseBackend(
                lambda: {} if (live := names()) is None else operand_names(live),
                Pipeline(passes, keep_text=keep_text),
                compat.lookup_compiler(compiler),
                inductor,
                plan,
            )
            function = compat.compile_isolated(_call, backend=backend, **options)
            self.entries[key] = CompiledEntry(
                plan, backend, function, broken=self._breaks(model), recurrent=recurrent(model)
            )
        return self.entries[key]

    def _breaks(self, model: nn.Module) -> bool:
        """Whether Dynamo leaves code of the model to Python, as far as it is known."""
        return recurrent(model) or any(e.breaks or e.eager_reads for e in self.entries.values())

    def _watch(self, out: Any) -> None:
        """Remember that a backward is due, until it starts (from whichever result) or the graph dies."""
        pending = _Pending()
        # Flattening takes as long as all the rest of this.
        for tensor in (out,) if isinstance(out, Tensor) else pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                self._pending.add(pending)
                tensor.register_hook(pending.start)


class _Pending:
    """A forward whose backward is due. Lives as long as the autograd graph that holds its hook."""

    def __init__(self) -> None:
        self.done = False

    def start(self, grad: Tensor) -> None:
        self.done = True


def _uncompilable() -> str | None:
    """Why this very call cannot go through `torch.compile`, or None."""
    if compat.inside_functorch():
        return "torch.func transform"
    if torch.jit.is_tracing() or torch.jit.is_scripting():
        return "torch.jit"
    if compat.compiling_is_off():
        return "torch.compile switched off"
    return None


def _is_tracked(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _check_precision(model: nn.Module, record: ModelState) -> None:
    """PhaseError where float32 products are asked for, and the device has bfloat16 copies only."""
    precision = record.state.plan.precision
    low = active_dtype(_device_type(model)) == torch.bfloat16 if precision == "inherit" else precision != "fp32"
    if low:
        return
    for fqn, managed in managed_weights(model).items():
        if managed.entry.host is not None and managed.entry.host.dtype == torch.float32:
            raise PhaseError(
                f"storage='offload' keeps float32 weights like {fqn} in host memory during RESU, and a bfloat16 copy on"
                f" the device: call the model under torch.autocast({_device_type(model)!r}, torch.bfloat16), plan"
                " precision='bf16' for the phase, or use another storage"
            )


def refresh_copies(model: nn.Module, record: ModelState) -> None:
    """bfloat16 copies of the weights of RESU, where products run in bfloat16: made before the phase's first call, and
    again for a weight that something other than θ's step has written.

    Torch counts no writes through `.data`, which is how averaged weights are often put in place for an evaluation: in
    evaluation mode, and in the first call after it, all copies are made anew."""
    plan = record.state.plan
    inherited = plan.precision == "inherit" and active_dtype(_device_type(model)) == torch.bfloat16
    record.state.reads_copies = plan.weights == "resu" and (inherited or plan.precision == "bf16")
    if not record.state.reads_copies:
        return
    anew, record.state.evaluated = not model.training or record.state.evaluated, not model.training
    for managed in managed_weights(model).values():
        entry, weight = managed.entry, managed.parameter
        if not entry.packed and weight.dtype == torch.float32 and (anew or not weight_storage.copied(entry, weight)):
            weight_storage.make_copy(entry, weight)


def _fix_sizes(model: nn.Module) -> None:
    """Sizes of what stands beside the weights do not follow those of a batch."""
    for managed in managed_weights(model).values():
        for name in (*managed.entry.TENSORS, "anchor"):
            if (tensor := getattr(managed.entry, name)) is not None:
                compat.mark_fixed(tensor)


def _alive(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Tensors that a call does not make: weights, buffers, what fxresu keeps beside them, and the arguments."""
    yield from model.parameters()
    yield from model.buffers()
    for managed in managed_weights(model).values():
        yield from (t for n in managed.entry.TENSORS if (t := getattr(managed.entry, n)) is not None)
    yield from (t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))


def _device_type(model: nn.Module) -> str:
    return next((p.device.type for p in model.parameters()), "cpu")


def _no_autocast(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    return autocast_off(_device_type(model))


@contextlib.contextmanager
def _precision(model: nn.Module, precision: str) -> Iterator[torch.dtype | None]:
    """Eager counterpart of the cast pass: autocast in low precision, or no autocast for fp32.

    Yields the dtype that results must be brought back from, or None.
    """
    if precision == "inherit":
        yield None
        return
    low = _AUTOCAST.get(precision)
    native = {p.dtype for p in model.parameters()}
    with torch.autocast(_device_type(model), dtype=low, enabled=low is not None):
        yield None if low in native else low


def _from_low(value: Any, low: torch.dtype) -> Any:
    """A result that autocast left in low precision, in the fp32 that it would have without."""
    return value.float() if isinstance(value, Tensor) and value.dtype == low else value


def install_runner(model: nn.Module) -> PhaseRunner:
    """Put a fresh runner where `Module.__call__` looks for a compiled implementation."""
    runner = PhaseRunner(model)
    model._compiled_call_impl = runner
    return runner


def runner_of(model: nn.Module) -> PhaseRunner:
    """The runner of a transformed model."""
    state_of(model)
    return cast(PhaseRunner, model._compiled_call_impl)


def uses_cuda_graphs(model: nn.Module) -> bool:
    """Whether compiled functions of the model are replayed as CUDA graphs."""
    options = dict(state_of(model).compile_options or {})
    inductor = {**compat.mode_options(options.get("mode")), **(options.get("options") or {})}
    return _device_type(model) == "cuda" and bool(inductor.get("triton.cudagraphs"))


def cast_statistics(model: nn.Module) -> dict[str, Any]:
    """Products by precision and bytes that inserted casts write, in the compiled graphs of the current phase."""
    tag = state_of(model).state.plan.tag
    graphs = [g for e in runner_of(model).entries.values() if e.plan.tag == tag for g in e.graphs]
    products: Counter[str] = sum((g.products for g in graphs), Counter())
    return {
        "products": dict(products),
        "bytes_cast": sum(p.counts.get("bytes cast", 0) for g in graphs for p in g.passes),
    }
