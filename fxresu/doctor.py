"""`fxresu doctor`: what is installed here, what runs and what does not, and the remedy."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_SUPPORTED = ((2, 11), (2, 16))  # torch, from and below
_SYMBOLS = {"ok": "ok  ", "note": "note", "bad": "BAD "}
# Settings that change how everything runs, and are forgotten easily.
_SWITCHES = {
    "TORCH_COMPILE_DISABLE": "compilation is off: models run eager",
    "TORCHDYNAMO_DISABLE": "compilation is off: models run eager",
    "TORCHDYNAMO_SUPPRESS_ERRORS": "torch turns compiler errors into eager code",
    "TRITON_INTERPRET": "kernels run in Triton's interpreter, which is for tests and very slow",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "every process compiles anew",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        state: "ok", "note" (something optional is missing) or "bad" (something that training needs does not work).
        detail: what was found.
        remedy: what to do about it; empty if nothing.
    """

    name: str
    state: str
    detail: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `fxresu doctor`."""
    parser.description = "Show versions, devices and compilers, try what training needs, and name the remedies."
    parser.add_argument("--no-run", action="store_true", help="only look; compile and launch nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings. Exit status 0, or 1 if something that training needs does not work."""
    found = examine(attempt=not args.no_run)
    if args.json:
        print(json.dumps([dataclasses.asdict(f) for f in found], indent=2))
    else:
        print(render(found))
    return 1 if any(f.state == "bad" for f in found) else 0


def examine(*, attempt: bool = True) -> list[Finding]:
    """All findings. `attempt`: also compile a small model and launch kernels, which takes some seconds."""
    found = [_python(), _torch(), *_devices(), _compiler(), _triton(), _cache(), *_switches(), _shadowed()]
    found += [_package(*optional) for optional in _OPTIONAL]
    if attempt and not any(f.state == "bad" and f.name == "torch" for f in found):
        found += _attempts()
    return found


def render(found: list[Finding]) -> str:
    """The findings as text, remedies below what they are for."""
    width = max(len(f.name) for f in found)
    lines = []
    for finding in found:
        lines.append(f"{_SYMBOLS[finding.state]}  {finding.name:<{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<{width + 6}}  -> {finding.remedy}")
    bad = sum(f.state == "bad" for f in found)
    lines.append("" if bad else "\nEverything that training needs is here.")
    if bad:
        lines.append(f"{bad} thing{'s' * (bad > 1)} that training needs do{'es' * (bad == 1)} not work here.")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ what is there


def _python() -> Finding:
    import fxresu

    text = f"fxresu {fxresu.__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}"
    if sys.version_info < (3, 11):
        return Finding("python", "bad", text, "install Python 3.11 or later")
    return Finding("python", "ok", text)


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:
        return Finding("torch", "bad", f"cannot be imported: {error}", "pip install 'torch>=2.11,<2.16'")
    version = tuple(int(p) for p in torch.__version__.split("+")[0].split(".")[:2])
    text = f"{torch.__version__}, {torch.get_num_threads()} threads"
    if not _SUPPORTED[0] <= version < _SUPPORTED[1]:
        return Finding("torch", "bad", f"{text}: not among the versions supported", "pip install 'torch>=2.11,<2.16'")
    return Finding("torch", "ok", text)


def _devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            remedy = "for a GPU: a build of torch with CUDA (pytorch.org says which)"
        else:
            remedy = "this torch can use a GPU, but finds none: check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
        yield Finding("device", "note", "CPU only: kernels run as their PyTorch references", remedy)
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        text = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute capability {facts.major}.{facts.minor}"
        if (facts.major, facts.minor) < (8, 0):
            yield Finding(f"cuda:{index}", "note", text, "bfloat16 is slow below 8.0: give plans precision='fp16'")
        else:
            yield Finding(f"cuda:{index}", "ok", f"{text}, CUDA {torch.version.cuda}")


def _compiler() -> Finding:
    name = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), "")
    path = shutil.which(name) if name else None
    if path is None:
        remedy = "apt-get install g++ (or conda install gxx); without it pass compile=False on a CPU"
        return Finding("C++ compiler", "bad", f"none found ({name or 'g++, clang++, c++'})", remedy)
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return Finding("C++ compiler", "ok", (done.stdout or done.stderr).partition("\n")[0] or path)


def _triton() -> Finding:
    import torch

    from fxresu.kernels._triton import HAS_TRITON, INTERPRET

    if HAS_TRITON:
        import triton

        return Finding("triton", "ok", f"{triton.__version__}{' (interpreted)' if INTERPRET else ''}")
    state = "bad" if torch.cuda.is_available() else "note"
    return Finding("triton", state, "not installed; a CPU does not need it", "pip install triton")


def _cache() -> Finding:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    path = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    try:
        path = cache_dir()  # which makes it
        with tempfile.TemporaryFile(dir=path):
            free = shutil.disk_usage(path).free
    except OSError as error:
        return Finding("cache", "bad", f"{path}: {error}", "set TORCHINDUCTOR_CACHE_DIR to a writable folder")
    state, remedy = ("ok", "") if free > 1 << 30 else ("note", "free some space, or set TORCHINDUCTOR_CACHE_DIR")
    return Finding("cache", state, f"{path}, {free / 2**30:.0f} GiB free", remedy)


def _switches() -> Iterator[Finding]:
    for name, meaning in _SWITCHES.items():
        if os.environ.get(name, "0").lower() not in ("", "0", "false", "off", "no", "n"):
            yield Finding(name, "note", f"is set: {meaning}", f"unset {name}")


def _shadowed() -> Finding:
    spec = importlib.util.find_spec("kernels")
    own = Path(__file__).resolve().parents[1] / "kernels"
    if spec is not None and spec.origin and Path(spec.origin).resolve().parent == own:
        remedy = "do not run Python from this project's folder with it on sys.path (python -P, or another folder)"
        return Finding("imports", "note", "this project's folder kernels/ stands for the package of that name", remedy)
    return Finding("imports", "ok", "no package is shadowed")


# name, package, what it is for, how to get it
_OPTIONAL = (
    ("transformers", "models by hf:NAME", "pip install 'fxresu[models]'"),
    ("timm", "models by timm:NAME", "pip install 'fxresu[models]' with a torchvision that is built for this torch"),
    ("torch_tensorrt", "TensorRT engines", "pip install 'fxresu[tensorrt]'"),
)


def _package(name: str, purpose: str, remedy: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, "note", f"not installed: {purpose} do not run", remedy)
    try:
        importlib.import_module(name)
        version = importlib.metadata.version(name.replace("_", "-"))
    except Exception as error:
        first = str(error).partition("\n")[0]
        return Finding(name, "note", f"installed, but its import fails ({first}): {purpose} do not run", remedy)
    return Finding(name, "ok", f"{version}: {purpose}")


# ------------------------------------------------------------------------------------------------------ what runs here


def _attempts() -> Iterator[Finding]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield _attempt("kernels", lambda: _try_kernels(device), "the message above says why; report it if it does not")
    yield _attempt("passes", lambda: _try_training(device, "aot_eager"), "check the version of torch above")
    remedy = "see the C++ compiler above" if device == "cpu" else "see triton above"
    yield _attempt(f"Inductor on {device}", lambda: _try_training(device, "inductor"), f"{remedy}; or compile=False")


def _attempt(name: str, function: Callable[[], str], remedy: str) -> Finding:
    try:
        return Finding(name, "ok", function())
    except Exception as error:
        return Finding(name, "bad", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", remedy)


def _try_kernels(device: str) -> str:
    import torch

    from fxresu.kernels import pack, unpack
    from fxresu.kernels._triton import use_triton

    mask = torch.rand(8, 70, device=device) > 0.5
    if not torch.equal(unpack(pack(mask), 70), mask):
        raise RuntimeError("a mask does not survive packing")
    return "Triton" if use_triton(mask) else "PyTorch references"


def _try_training(device: str, backend: str) -> str:
    """A step in each phase that trains, and one forward in each that does not."""
    import torch
    from torch import nn

    import fxresu
    from fxresu.runner import runner_of

    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).to(device)
    fxresu.transform(model, compile={"backend": backend})
    for phase in ("dense", "sparse", "resu", "predict"):
        fxresu.set_phase(model, phase)
        out = model(torch.randn(4, 64, device=device))
        if out.requires_grad:
            out.square().mean().backward()
    entries = runner_of(model).entries.values()
    rewritten = {str(e.plan.phase): sum(not r.reason for g in e.graphs for r in g.rewrites) for e in entries}
    if set(rewritten.values()) != {2}:
        raise RuntimeError(f"of 2 weights were rewritten: {rewritten}")
    return f"{', '.join(rewritten)} compile and run"
