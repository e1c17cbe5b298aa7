"""Everything that leans on a private torch API, in one place; the partitioner of joint graphs: `_compat_partition`,
rehearsals of compiled code: `_compat_rehearsal`. Checked on torch 2.11.0 and 2.13.0."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import traceback
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch._dynamo
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._functorch import pyfunctorch
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op, with_effects
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

_DYNAMO = "torch._dynamo"
set_grad_enabled = torch._C._set_grad_enabled
enter_autocast = torch.amp.autocast_mode._enter_autocast
exit_autocast = torch.amp.autocast_mode._exit_autocast
linear_builtin = torch._C._nn.linear
attention_builtin = torch._C._nn.scaled_dot_product_attention
# Names of operations that multiply rows by one of several matrices: torch's own, and what transformers has without it.
GROUPED_PRODUCTS = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")


def compiling() -> bool:
    """Whether `torch.compile` is tracing and `torch.export` is not.

    Reads the flag itself: Dynamo of torch 2.11 takes `torch.compiler.is_exporting()` for True in everything it traces.
    """
    return torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag


def tracing() -> bool:
    """Whether `torch.compile` or `torch.export` (strict or not) is at work."""
    return torch.compiler.is_compiling() or torch.compiler._is_exporting_flag


def compiler_is_loaded() -> bool:
    """Whether Dynamo is there, and not put off until something compiles (see `fxresu.lean_imports`)."""
    return not hasattr(sys.modules[_DYNAMO], "fxresu_when_loaded")


def when_compiler_is_loaded(call: Callable[[], None]) -> None:
    """Call this now, or where Dynamo is put off as soon as it is loaded."""
    if compiler_is_loaded():
        call()
    else:
        sys.modules[_DYNAMO].fxresu_when_loaded.append(call)


def only_inlined(*functions: Callable[..., Any]) -> None:
    """Let Dynamo trace these functions inside others, but not compile them by themselves.

    Where it leaves a model's code to Python it would otherwise make graphs of single reads of weights.
    """
    codes = [function.__code__ for function in functions]

    def skip() -> None:
        for code in codes:
            torch._dynamo.eval_frame.skip_code(code)

    when_compiler_is_loaded(skip)


def _patched(config: Any, **values: Any) -> contextlib.AbstractContextManager[Any]:
    """`patch` of one of torch's configurations, which type checkers do not see on all of them."""
    return config.patch(**values)


# Compiled by themselves they would say that torch.compile is tracing.
only_inlined(compiling, tracing)


def placeholder_example(node: Node) -> object:
    """The real tensor behind a placeholder of a graph that Dynamo captured, or None."""
    return getattr(node.meta.get("grapharg"), "example", None)


def placeholder_source(node: Node) -> str:
    """Dynamo's source of a placeholder, such as `L['self']._modules['fc']._parameters['weight']`; "" if unknown."""
    name = getattr(getattr(node, "_dynamo_source", None), "name", "")
    return name() if callable(name) else str(name)


def tracing_artifacts() -> bool:
    """Whether structured trace artifacts (TORCH_TRACE) go anywhere."""
    return bool(torch._logging._internal.trace_log.handlers)


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Emit a text artifact for the trace viewers."""
    torch._logging.trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text
    )


def register_ordered_effect(op: torch._ops.OpOverload) -> None:
    """Let compilers keep every call of an operation that returns nothing, in the order of all such calls."""
    _register_effectful_op(op, _EffectType.ORDERED)


@contextlib.contextmanager
def cacheable_effects() -> Iterator[None]:
    """Graphs with ordered effects go into Inductor's caches like others.

    Torch 2.11 and 2.13 bypass them for `with_effects`, which says nothing of itself: every process would compile such
    a graph anew. What runs from the cache was seen to run every effect, in order (tests/passes).
    """
    earlier, with_effects._cacheable = with_effects._cacheable, True
    try:
        yield
    finally:
        with_effects._cacheable = earlier


def inductor(
    module: GraphModule, inputs: Sequence[Any], options: dict[str, Any], salt: str, *, partitioned_anew: bool = False
) -> Callable[..., Any]:
    """Compile a captured graph with Inductor; `salt` becomes part of every cache key.

    Args:
        partitioned_anew: run the partition function even if AOTAutograd's cache has its outcome. Generated code comes
            from Inductor's own cache all the same.
    """
    from torch._functorch import config as joint
    from torch._inductor.compile_fx import compile_fx

    config = torch.compiler.config
    with contextlib.ExitStack() as stack:
        stack.enter_context(_patched(config, cache_key_tag=f"{config.cache_key_tag}{salt}"))
        stack.enter_context(cacheable_effects())
        if partitioned_anew:
            stack.enter_context(_patched(joint, enable_autograd_cache=False))
        return cast(Callable[..., Any], compile_fx(module, inputs, config_patches=options or None))


_cache_of_user: list[bool] = []


def partition_anew(wanted: bool) -> None:
    """`partitioned_anew` for the compilation under way, which is the user's own, and later ones; False gives back the
    user's setting."""
    from torch._functorch import config

    if wanted and not _cache_of_user:
        _cache_of_user.append(config.enable_autograd_cache)
        config.enable_autograd_cache = False
    elif not wanted and _cache_of_user:
        config.enable_autograd_cache = _cache_of_user.pop()


def isolated_inductor(module: GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """Compile a graph over real tensors with Inductor in the middle of another compilation, leaving that one alone."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    # The backward too, right away: compiled at its first run it would count as a part of the compilation under way.
    with real_tensors(), config.patch(force_non_lazy_backward_lowering=True):
        compiled = compile_fx(module, list(inputs), config_patches={"triton.cudagraphs": False})
        return cast(Callable[..., Any], compiled)


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Leaves fake tensors and the compilation that is under way, for work on real tensors in the middle of it."""
    from torch._guards import tracing
    from torch.utils._python_dispatch import _disable_current_modes

    with tracing(None), _disable_current_modes():
        yield


def mode_options(mode: str | None) -> dict[str, Any]:
    """The Inductor options that a `torch.compile` mode stands for."""
    if mode is None or mode == "default":
        return {}
    return dict(torch._inductor.list_mode_options(mode))


def install_pre_grad_pass(run: Callable[[GraphModule], None], salt: Callable[[], str]) -> None:
    """Have Inductor call `run` on every captured graph before autograd; keeps a pass that the user has set.

    Args:
        salt: identity of the passes for cache keys. Both arguments must be functions of a module (they are pickled).
    """
    when_compiler_is_loaded(lambda: _set_pre_grad_pass(run, salt))


def _set_pre_grad_pass(run: Callable[[GraphModule], None], salt: Callable[[], str]) -> None:
    from torch._inductor import config

    from ._inductor_hooks import PreGradPass

    # Since torch 2.13 a hit of AOTAutograd's cache would skip the passes, and with them every record and warning. Run
    # early, they see each graph, and the key is that of the graph which they leave (see `key_caches`).
    if getattr(config, "pre_grad_pass_timing", None) == "default":
        config.pre_grad_pass_timing = "early"
    current = config.pre_grad_custom_pass
    if isinstance(current, (list, tuple)):
        if not any(isinstance(p, PreGradPass) for p in current):
            config.pre_grad_custom_pass = [*current, PreGradPass(run, salt, None)]
    elif not isinstance(current, PreGradPass):
        config.pre_grad_custom_pass = PreGradPass(run, salt, current)


def key_caches(salt: str) -> None:
    """Make `salt` a part of the keys of the compilation under way and of later ones: passes that run before a cache is
    asked are not in its key, and a changed backward formula leaves the graph as it was."""
    config = torch.compiler.config
    if salt not in config.cache_key_tag:
        config.cache_key_tag += salt


def compile_isolated(function: types.FunctionType, **kwargs: Any) -> Callable[..., Any]:
    """`torch.compile` with a count of compiled variants of its own.

    Dynamo counts variants by code object; phases that share one would exceed the limit together and then run eager in
    silence. So every call gets a fresh code object, and isolated counting for the frames below it where torch has it.
    """
    fresh = types.FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{next(_COUNTER)}"),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        return torch.compile(fresh, **{"isolate_recompiles": True, **kwargs})
    compiled = torch.compile(fresh, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_SHARED_LIMIT):
            return compiled(*args, **kwargs)

    return call


# Variants of a frame that all phases together may have, where torch counts them together (before 2.12).
_SHARED_LIMIT = 64


def _count() -> Any:
    n = 0
    while True:
        yield n
        n += 1


_COUNTER = _count()


def graph_breaks(since: tuple[int, int] = (0, 0)) -> int:
    """Graph breaks that Dynamo has met in this process since `break_books` was asked, by the fuller of its two books
    (`recorded_breaks`)."""
    return max(now - then for now, then in zip(break_books(), since))


def break_books() -> tuple[int, int]:
    """Mark for `graph_breaks`."""
    utils = torch._dynamo.utils
    return sum(utils.counters["graph_break"].values()), sum(r.graph_break for r in utils.graph_break_reasons)


def in_backward() -> bool:
    """Whether this thread is inside a backward pass (a recomputed forward, a gradient hook)."""
    return torch._C._current_graph_task_id() != -1


def inside_functorch() -> bool:
    """Whether a `torch.func` transform is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@contextlib.contextmanager
def outside_functorch() -> Iterator[None]:
    """A context without `torch.func` transforms. Those that an operation which fails inside leaves open are closed."""
    functorch = torch._C._functorch
    with pyfunctorch.temporarily_clear_interpreter_stack():
        try:
            yield
        finally:
            while functorch.peek_interpreter_stack() is not None:
                functorch.pop_dynamic_layer_stack()


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor inside the wrappers of `torch.func` transforms, which have no storage of their own."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def leaf_asked(node: Any) -> str:
    """What the backward that is running wants of a leaf's gradient, by the leaf's node (`AccumulateGrad`): "added" to
    the leaf, "returned" (`torch.autograd.grad`), or "" where it wants none."""
    try:
        return "added" if torch._C._will_engine_execute_node(node) else ""
    except RuntimeError:  # so it says of a leaf whose gradient is only returned
        return "returned"


def compiling_is_off() -> bool:
    """Whether the user has switched `torch.compile` off (`set_stance("force_eager")`, TORCH_COMPILE_DISABLE)."""
    return torch._dynamo.eval_frame._stance.stance == "force_eager" or torch._dynamo.config.disable


def inside_compiled_call() -> bool:
    """Whether this eager code runs inside a call of something that was given to `torch.compile`."""
    return get_eval_frame_callback() not in (None, False)


def eager_only() -> contextlib.AbstractContextManager[Any]:
    """Context in which nothing is compiled, and what is compiled already runs eager."""
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def no_attention_fast_path() -> Iterator[None]:
    """Context without the fused inference kernels of torch's transformer layers, which hide their matrix products."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def lookup_compiler(compiler: str | Callable[..., Any] | None) -> Callable[..., Any] | None:
    """A compiler for captured graphs by its `torch.compile` name; None and "inductor" are our own call of Inductor."""
    if compiler is None or compiler == "inductor":
        return None
    return torch._dynamo.lookup_backend(compiler)


def mark_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Let graphs take any size in this dimension, so that a change of it does not recompile."""
    _once_loaded(tensor, lambda tensor: torch._dynamo.maybe_mark_dynamic(tensor, dim))


def mark_static(tensor: torch.Tensor) -> None:
    """Let CUDA graphs read this input where it lies, instead of copying it before every replay; another address is
    recorded anew, without a recompile."""
    _once_loaded(tensor, lambda tensor: torch._dynamo.mark_static_address(tensor, guard=False))


def version_of(tensor: torch.Tensor) -> tuple[int, int]:
    """What changes when values are written, by torch's count, or exchanged (`tensor.data = other`)."""
    return tensor._version, tensor.untyped_storage()._cdata


def mark_fixed(tensor: torch.Tensor) -> None:
    """Sizes of this input are numbers to the compiler, even with `dynamic=True`: a symbol would be shared with an input
    of the same size by chance, and the graph be for that size alone."""
    torch._dynamo.mark_static(tensor)


def _once_loaded(tensor: torch.Tensor, mark: Callable[[torch.Tensor], None]) -> None:
    """Mark a tensor, if it still lives, as soon as the compiler is loaded."""
    if compiler_is_loaded():
        mark(tensor)
        return
    alive = weakref.ref(tensor)

    def later() -> None:
        if (tensor := alive()) is not None:
            mark(tensor)

    when_compiler_is_loaded(later)


@contextlib.contextmanager
def honour_dynamic_marks() -> Iterator[None]:
    """Context for a first call: Dynamo takes tensors reached through a module for static in spite of `mark_dynamic`.

    Sizes of a weight's records that happen to equal one of an input (a batch of 32, a row of 32 words) must not be
    taken for the same size: the graph would be for that batch alone.
    """
    with (
        torch._dynamo.config.patch(force_nn_module_property_static_shapes=False),
        _patched(torch.fx.experimental._config, use_duck_shape=False),
    ):
        yield


def recurrent_modules_allowed() -> Any:
    """Context in which Dynamo does not give up a frame because it mentions an RNN, GRU or LSTM."""
    return torch._dynamo.config.patch(allow_rnn=True)


@contextlib.contextmanager
def recorded_breaks() -> Iterator[list[tuple[str, list[traceback.FrameSummary]]]]:
    """Collects (reason, user's stack) of every graph break met inside the context; the stack is empty if unknown.

    Dynamo keeps two books: a branch on a tensor's value is only in the list, a frame that it gives up on before any
    operation only in the counters.
    """
    found: list[tuple[str, list[traceback.FrameSummary]]] = []
    start, earlier = len(torch._dynamo.utils.graph_break_reasons), Counter(torch._dynamo.utils.counters["graph_break"])
    try:
        yield found
    finally:
        recorded = torch._dynamo.utils.graph_break_reasons[start:]
        found += [(r.reason, list(r.user_stack)) for r in recorded if r.graph_break]
        listed = {reason for reason, _ in found}
        for reason, times in (Counter(torch._dynamo.utils.counters["graph_break"]) - earlier).items():
            found += [(reason, [])] * times if reason not in listed else []


def last_compilation() -> object:
    """Mark for `compilations_since`: the frame that Dynamo compiled last."""
    book = getattr(torch._dynamo.utils, "_compilation_metrics", ())
    return book[-1] if book else None


def compilations_since(mark: object) -> list[tuple[str, str]]:
    """(why it was compiled anew, why it failed) of every frame that Dynamo compiled since `mark`; "" where neither."""
    found = []
    for metrics in reversed(getattr(torch._dynamo.utils, "_compilation_metrics", ())):
        if metrics is mark:
            break
        found.append((_first_line(metrics.recompile_reason), _first_line(metrics.fail_reason)))
    return found[::-1]


def _first_line(reason: str | None) -> str:
    """A reason without the frame's number in front, the stack behind, and torch's hints."""
    text = (reason or "").partition("\n")[0].partition("(HINT:")[0]
    guard, _, where = text.partition("  # ")
    text = f"{guard.strip()} ({where.strip().lstrip('# ')})" if where.strip() else text.strip()
    number, _, rest = text.partition(": ")
    return rest if rest and set(number) <= set("0123456789/_") else text


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Keeps torch from logging the traceback of an error in a fake computation, which is raised as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def inside_compiled(module: torch.nn.Module) -> torch.nn.Module | None:
    """The module that `torch.compile(module)` wrapped, or None if it is no such wrapper."""
    return module._orig_mod if compiler_is_loaded() and isinstance(module, torch._dynamo.OptimizedModule) else None


def size_hint(size: int | torch.SymInt) -> int:
    """The example size behind a symbolic one, without a guard."""
    return size if isinstance(size, int) else int(size.node.hint)


def shape_env() -> Any:
    """A fresh place for the symbols of a fake mode."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return ShapeEnv()


def fake_mode() -> FakeTensorMode:
    """A mode whose tensors have a device and a shape and no memory; constants of the model may meet them."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=shape_env())
