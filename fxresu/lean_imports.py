"""Keeps the compiler out of processes that never compile.

`torch.optim`, custom operations and others import `torch._dynamo` only to say "do not trace this", and that import
brings sympy and Inductor with it: about 145 MB and two seconds (torch 2.13) in a run that is eager from end to end.
Importing Triton takes another 70 MB, and on a CPU nothing runs it.

This module imports neither torch nor the rest of the package, because it has to come first.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["compiler_is_deferred", "defer_compiler", "hide_triton"]

_DYNAMO = "torch._dynamo"


class _DeferredDynamo(types.ModuleType):
    """Stands for `torch._dynamo` until something needs more of it than `disable` and `graph_break`."""

    __path__: list[str] = []  # a package: the finder below sees imports of its submodules

    def __init__(self) -> None:
        super().__init__(_DYNAMO)
        self.fxresu_when_loaded: list[Callable[[], None]] = []

    @staticmethod
    def graph_break(msg: str = "") -> None:
        """Only means something to a tracer, and there is none."""

    def disable(self, fn: Callable[..., Any] | None = None, recursive: bool = True, **options: Any) -> Any:
        """`fn` itself, until Dynamo is there; from then on what Dynamo makes of it."""
        if fn is None:
            return functools.partial(self.disable, recursive=recursive, **options)
        real: list[Callable[..., Any]] = []

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (real[0] if real else fn)(*args, **kwargs)

        def load() -> None:
            real.append(sys.modules[_DYNAMO].disable(fn, recursive, **options))
            vars(call).update(vars(real[0]))  # the marks by which Dynamo knows that it must not look inside

        self.fxresu_when_loaded.append(load)
        return call

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {_DYNAMO!r} has no attribute {name!r}")
        return getattr(_load(), name)


class _LoadParent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads `torch._dynamo` itself before the first of its submodules, as the import system does."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{_DYNAMO}.") or not compiler_is_deferred():
            return None
        _load()
        if fullname in sys.modules:  # loading the package has brought it: hand that one over, do not run it again
            return importlib.machinery.ModuleSpec(fullname, self, is_package=hasattr(sys.modules[fullname], "__path__"))
        return importlib.machinery.PathFinder.find_spec(fullname, list(sys.modules[_DYNAMO].__path__), target)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        module = sys.modules[spec.name]
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def compiler_is_deferred() -> bool:
    """Whether `torch._dynamo` has not been loaded because of `defer_compiler`."""
    return isinstance(sys.modules.get(_DYNAMO), _DeferredDynamo)


def defer_compiler() -> bool:
    """Put off loading torch's compiler until something compiles, which then works as always.

    Call it first, before `torch.optim` makes an optimizer and before `fxresu.transform`.

    Returns:
        False where the compiler was loaded already; nothing is done then.
    """
    if _DYNAMO in sys.modules:
        return compiler_is_deferred()
    sys.modules[_DYNAMO] = _DeferredDynamo()
    sys.meta_path.insert(0, _LoadParent())
    return True


def _load() -> types.ModuleType:
    """The real module in the place of the deferred one; what waited for it is called."""
    deferred = sys.modules.get(_DYNAMO)
    if not isinstance(deferred, _DeferredDynamo):  # another thread was faster
        return importlib.import_module(_DYNAMO)
    import torch

    del sys.modules[_DYNAMO]
    vars(torch).pop("_dynamo", None)
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _LoadParent)]
    module = importlib.import_module(_DYNAMO)
    for call in deferred.fxresu_when_loaded:
        call()
    return module


def hide_triton() -> bool:
    """Let `import triton` fail in this process, as where it is not installed: for runs on a CPU, which have no use for
    it. Not done where it is imported already or its interpreter is asked for (TRITON_INTERPRET).

    Returns:
        Whether it is hidden.
    """
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        return False
    if "triton" not in sys.modules:
        sys.modules["triton"] = None  # type: ignore[assignment]
    return sys.modules["triton"] is None
