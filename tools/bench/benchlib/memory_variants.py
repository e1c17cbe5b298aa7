"""The variants of the memory ladder, as data, and the optimizers that they name."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fxresu
from fxresu import Phase, PhasePlan

LEARNING_RATE = 1e-4


class NotHereError(Exception):
    """What a variant needs is not installed here, or this version has not got it."""


@dataclasses.dataclass(frozen=True)
class MemoryVariant:
    """One way to train a model of the ladder.

    Attributes:
        name: of the row.
        optimizer: key of `OPTIMIZERS`.
        dtype: of the weights, "bf16" or "fp32" (under bfloat16 autocast).
        managed: whether fxresu transforms the model and goes through all phases; others train dense.
        resu: arguments of `set_phase("resu", ...)`.
        transform: further arguments of `fxresu.transform`.
        plans: fields of `PhasePlan` that differ from the default, by phase.
        checkpoint: whether blocks are recomputed in the backward (transformers' own checkpointing).
        tiled_loss: logits are never whole.
        blocks: arguments of `stream_blocks`: blocks run, and are compiled, one by one.
        compiled: with `torch.compile` (fxresu: a function a phase).
        accumulation, clip: micro-batches of a step; largest gradient norm (optimizers that consume gradients clip by
            themselves). With a learning-rate schedule always.
        theta_in_backward: θ is updated inside the backward.
        host: built in host memory; weights visit the device one by one to be pruned and packed (RESU and predict only).
        batch: sequences of a step, where they are fewer than the ladder's.
        cap: the most that PyTorch's allocator may hold, in GB, by size; none where a size is missing.
    """

    name: str
    optimizer: str = "adamw"
    dtype: str = "bf16"
    managed: bool = False
    resu: dict[str, Any] = dataclasses.field(default_factory=dict)
    transform: dict[str, Any] = dataclasses.field(default_factory=dict)
    plans: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    checkpoint: bool = False
    tiled_loss: bool = False
    blocks: dict[str, Any] | None = None
    compiled: bool = True
    accumulation: int = 1
    clip: float | None = None
    theta_in_backward: bool = False
    host: bool = False
    batch: int | None = None
    cap: dict[str, float] = dataclasses.field(default_factory=dict)


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _adamw(model: nn.Module) -> Any:
    return torch.optim.AdamW(_weights(model), lr=LEARNING_RATE, fused=next(model.parameters()).is_cuda)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # bitsandbytes raises its own kinds when it finds no CUDA
        raise NotHereError(f"{name} is not installed here ({type(error).__name__})") from None


def _torchao(name: str, **options: Any) -> Callable[[nn.Module], Any]:
    def make(model: nn.Module) -> Any:
        kind = getattr(_module("torchao.optim"), name)
        if name == "CPUOffloadOptimizer":
            return kind(_weights(model), torch.optim.AdamW, lr=LEARNING_RATE, fused=True, **options)
        return kind(_weights(model), lr=LEARNING_RATE, **options)

    return make


def _bitsandbytes(name: str) -> Callable[[nn.Module], Any]:
    return lambda model: getattr(_module("bitsandbytes.optim"), name)(_weights(model), lr=LEARNING_RATE)


def _low_rank(name: str, **options: Any) -> Callable[[nn.Module], Any]:
    """GaLore and APOLLO: matrices of the blocks are projected to a low rank, the rest is trained as it is."""

    def make(model: nn.Module) -> Any:
        kind = getattr(_module("pytorch_optimizer"), name)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        inside = [p for n, p in named if p.dim() == 2 and not any(w in n for w in ("embed", "wte", "wpe", "head"))]
        known = {id(p) for p in inside}
        groups = [
            {"params": inside, "rank": 128, "update_proj_gap": 200, "scale": 0.25, "projection_type": "std"} | options,
            {"params": [p for _, p in named if id(p) not in known]},
        ]
        return kind(groups, lr=LEARNING_RATE)

    return make


def _lomo(name: str) -> Callable[[nn.Module], Any]:
    return lambda model: getattr(_module("pytorch_optimizer"), name)(model, lr=LEARNING_RATE)


def _streamed(**options: Any) -> Callable[[nn.Module], Any]:
    def make(model: nn.Module) -> Any:
        try:
            kind = fxresu.StreamedAdamW  # type: ignore[attr-defined]
        except AttributeError:
            raise NotHereError("this version of fxresu has no StreamedAdamW") from None
        return kind(_weights(model), lr=LEARNING_RATE, **options)

    return make


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "adamw": _adamw,
    "torchao 8-bit": _torchao("AdamW8bit", bf16_stochastic_round=True),
    "torchao offload": _torchao("CPUOffloadOptimizer"),
    "torchao offload, gradients too": _torchao("CPUOffloadOptimizer", offload_gradients=True),
    "bitsandbytes 8-bit": _bitsandbytes("AdamW8bit"),
    "bitsandbytes 8-bit, paged": _bitsandbytes("PagedAdamW8bit"),
    "GaLore": _low_rank("GaLore"),
    "APOLLO": _low_rank("APOLLO"),
    "APOLLO-Mini": _low_rank("APOLLO", rank=1, scale=128.0),
    "LOMO": _lomo("LOMO"),
    "AdaLOMO": _lomo("AdaLOMO"),
    # Two batches of parcels on the device: one in use, one that arrives or leaves.
    "streamed 8-bit": _streamed(moments="8bit", lookahead=4),
    "streamed bf16": _streamed(moments="bf16"),
    # The moments of a whole block ahead, and the embedding's here: its gradient comes last.
    "streamed 8-bit, whole blocks": _streamed(moments="8bit", device_bytes=270_000_000),
    # The first parameter's stay: its gradient comes last, when nothing is left to compute beside transfers.
    # Two parcels a block, so that its update is one launch.
    "streamed 8-bit, some here": _streamed(moments="8bit", chunk=2**25, device_bytes=560_000_000),
    # Where both directions share the bus, a byte that stays saves two, and more time than activations of its size do.
    "streamed 8-bit, more here": _streamed(moments="8bit", device_bytes=1_400_000_000),
    # Half as many bytes: what does not pass by in a backward's time stays. Two parcels a block: fewer copies to launch.
    "streamed factored, some here": _streamed(moments="factored", chunk=2**25, device_bytes=450_000_000),
    "streamed factored, whole blocks": _streamed(moments="factored", device_bytes=135_000_000),
    "streamed 8-bit, some here, clipped": _streamed(
        moments="8bit", chunk=2**25, device_bytes=560_000_000, max_norm=1.0
    ),
}

_COLUMNS = {"sparsity": 0.5, "candidates": 0.2}
_INT4 = {"storage": "packed", "packed_values": "int4"}
_RESU = {"rule": "adam", "moments": "8bit", "grad_dtype": torch.bfloat16}
_FORWARD = ("predict", "correct")
_LEAN = {"theta_in_backward": True, "resu": _RESU | {"theta_dtype": "bf16"}}
# Beside it comes what is outside of PyTorch's allocator: context, libraries and kernels, up to 0.9 GB.
_CAPS = {"1.24B": 6.12, "3.2B": 9.5, "6.7B": 13.6}
_STREAMED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("", "streamed 8-bit", {"recompute": 1.0}),
    (", inputs away", "streamed 8-bit", {"recompute": 1.0, "offload": True}),
    (", bf16 moments", "streamed bf16", {"recompute": 1.0}),
)


def _state(strategy: str) -> dict[str, dict[str, Any]]:
    return {phase: {"optimizer_state": strategy} for phase in ("resu", *_FORWARD)}


def _managed(name: str, **options: Any) -> MemoryVariant:
    return MemoryVariant(name, managed=True, **{"resu": _RESU, "transform": _COLUMNS, **options})


VARIANTS: tuple[MemoryVariant, ...] = (
    MemoryVariant("dense/bf16"),
    MemoryVariant("dense/AMP", dtype="fp32"),
    MemoryVariant("dense/fp32, checkpointed", dtype="fp32", checkpoint=True),
    MemoryVariant("torchao 8-bit", optimizer="torchao 8-bit"),
    MemoryVariant("torchao offload", optimizer="torchao offload"),
    MemoryVariant("torchao offload, gradients too", optimizer="torchao offload, gradients too"),
    MemoryVariant("bitsandbytes 8-bit", optimizer="bitsandbytes 8-bit"),
    MemoryVariant("bitsandbytes 8-bit, paged", optimizer="bitsandbytes 8-bit, paged"),
    *(MemoryVariant(n, optimizer=n, compiled=False, checkpoint=True) for n in ("GaLore", "APOLLO", "APOLLO-Mini")),
    *(MemoryVariant(n, optimizer=n, compiled=False, checkpoint=True) for n in ("LOMO", "AdaLOMO")),
    # One optimizer-state strategy each, and all savings together.
    *(_managed(f"fxresu/bf16, {s}", plans=_state(s)) for s in ("keep", "drop", "offload", "pinned", "compress")),
    _managed("fxresu/AMP, pinned", dtype="fp32", plans=_state("pinned")),
    _managed("fxresu/recompute", plans={**_state("pinned"), "dense": {"activation_budget": 0.5},
                                         "sparse": {"activation_budget": 0.5}}),
    _managed("fxresu/bf16, accumulation of 4", plans=_state("pinned"), accumulation=4, clip=1.0, batch=16),
    _managed("fxresu/streamed, accumulation of 4", optimizer="streamed 8-bit, some here, clipped",
             accumulation=4, batch=16, blocks={"recompute": 0.0}, tiled_loss=True),
    _managed("fxresu/packed int4, pinned", transform={"sparsity": 0.5} | _INT4, plans=_state("pinned")),
    *(_managed(f"fxresu/streamed{name}", optimizer=optimizer, blocks=blocks, tiled_loss=True, cap=_CAPS)
      for name, optimizer, blocks in _STREAMED),
    # As many blocks as 7 GB hold at 1.24B keep their activations; in RESU θ may take their room.
    *(_managed(f"fxresu/streamed, {n} of 16 saved", optimizer="streamed 8-bit, some here", tiled_loss=True, cap=_CAPS,
               blocks={"recompute": 1 - n / 16}, **_LEAN) for n in (4, 5)),
    _managed("fxresu/streamed, 3 of 16 saved, moments here", optimizer="streamed 8-bit, more here", tiled_loss=True,
             cap=_CAPS, blocks={"recompute": {"dense": 13 / 16, "sparse": 14 / 16, "resu": 1.0}, "kept": "costly"},
             **_LEAN),
    *(_managed(f"fxresu/streamed, {n} of 16 saved, factored", optimizer="streamed factored, some here", cap=_CAPS,
               tiled_loss=True, blocks={"recompute": {"dense": 1 - n / 16, "sparse": 1 - (n - 1) / 16, "resu": 12 / 16},
                                        "kept": "costly"}, **_LEAN) for n in (8, 9)),
    # The other blocks keep what is narrow, a third of it.
    *(_managed(f"fxresu/streamed, {n} of 16 saved, others narrow, factored", optimizer="streamed factored, some here",
               cap=_CAPS, tiled_loss=True, blocks={
                   "recompute": {"dense": 1 - n / 16, "sparse": 1 - (n - 1) / 16, "resu": 1.0}, "kept": "costly",
                   "recomputed": "narrow"}, **_LEAN) for n in (5, 6)),
    # Masks take the room of two blocks in the sparse phase.
    _managed("fxresu/streamed, weights away", optimizer="streamed 8-bit, whole blocks",
             blocks={"recompute": 1.0, "offload": True, "weights": {"dense": 11, "sparse": 13, "resu": 30}},
             tiled_loss=True, cap=_CAPS, **_LEAN),
    *(_managed(f"fxresu/streamed, {dense} of 32 away{form}", optimizer=optimizer, tiled_loss=True, cap=_CAPS,
               blocks={"recompute": 1.0, "offload": True, "weights": {"dense": dense, "sparse": sparse, "resu": 30}},
               **_LEAN)
      for dense, sparse, form, optimizer in (
          (10, 13, "", "streamed 8-bit, whole blocks"), (9, 12, ", factored", "streamed factored, whole blocks"))),
    # Active values, not rounded, and θ: the least that RESU can have without a loss.
    _managed("fxresu/packed from the host", optimizer="streamed 8-bit", transform=_COLUMNS | {"storage": "packed"},
             tiled_loss=True, host=True, **_LEAN),
    # No gradient of θ waits for the step, and θ is in bfloat16: it is rounded stochastically.
    _managed("fxresu/frozen int4 from the host", optimizer="streamed 8-bit", transform=_COLUMNS | _INT4,
             tiled_loss=True, host=True, batch=1, cap={"6.7B": 7.1}, **_LEAN),
)  # fmt: skip


def plans_of(variant: MemoryVariant) -> dict[Phase | str, PhasePlan]:
    """The default plans with the variant's changes."""
    return {
        Phase(phase): dataclasses.replace(fxresu.DEFAULT_PLANS[Phase(phase)], **changes)
        for phase, changes in variant.plans.items()
    }
