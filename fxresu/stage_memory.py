"""What every stage of a run holds, as it goes: measured peaks, and the tensors and host memory that they consist of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .ledger import current_rss, memory_bill, peak_rss
from .memory_watch import Held, MemoryWatch, children_bytes
from .model_state import managed_weights, other_parameters
from .state_manager import find_manager

if TYPE_CHECKING:
    from .cycle import ResuCycle

__all__ = ["Extra", "StageMemory"]

Extra = Callable[[str], dict[str, int]]
"""From a stage's name, of a phase or a transition, to further bytes by component."""


class StageMemory:
    """Follows the memory of a cycle's stages.

    Args:
        tensors: further tensors on the model's device that are there in a stage.
        host: further parts of the process's resident set; "interpreter and libraries" among them replaces the guess
            that is made here (what was resident when this began, less the tensors).
    """

    def __init__(self, cycle: ResuCycle, tensors: Extra | None = None, host: Extra | None = None) -> None:
        self.cycle, self.tensors, self.host = cycle, tensors, host
        self.device = next(cycle.model.parameters()).device
        there = sum(memory_bill(cycle.model, cycle.optimizer, "cpu").values())
        self._before = max(0, current_rss() - there)
        self.watch = MemoryWatch(self.device)
        self.outside: dict[str, int] = {}

    def phase(self, name: str) -> dict[str, Any]:
        """The phase that ends here. Its gradients are gone by now: they were as large as what trains."""
        held, model = self.watch.take(), self.cycle.model
        counted = memory_bill(model, self.cycle.optimizer)
        trained: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
        if name == "resu":
            anchors = [m.entry.anchor for m in managed_weights(model).values()]
            counted["θ gradient"] = sum(a.numel() * a.element_size() for a in anchors if a is not None)
            trained = [p for _, p in other_parameters(model) if p.requires_grad]
        counted["gradients"] = sum(p.numel() * p.element_size() for p in trained)
        return self._found(name, held, counted)

    def transition(self, name: str) -> dict[str, Any]:
        """The transition, out of `memory_bill.TRANSITIONS`, that ends here."""
        held = self.watch.take()
        return self._found(name, held, memory_bill(self.cycle.model, self.cycle.optimizer))

    def aside(self, name: str) -> None:
        """What ends here belongs to no stage; only its peak is kept."""
        held = self.watch.take()
        peak = held.host if held.device is None else held.device
        self.outside[name] = max(peak, self.outside.get(name, 0))

    def end(self) -> dict[str, Any]:
        """The run is over."""
        self.watch.close()
        return {"peak_rss": peak_rss(), "outside": self.outside}

    def _found(self, name: str, held: Held, counted: dict[str, int]) -> dict[str, Any]:
        manager = find_manager(self.cycle.optimizer)
        owners = {} if manager is None else manager.owners()
        host = {"interpreter and libraries": self._before} if self.host is None else self.host(name)
        host |= {"data loader's workers and other children": children_bytes()}
        if self.device.type == "cuda":
            host |= self._beside_the_device(owners)
        found = {
            "stage": name,
            "counted": {n: size for n, size in counted.items() if size},
            "extra": {} if self.tensors is None else self.tensors(name),
            "host": {n: size for n, size in host.items() if size},
            "host_peak": held.host + host["data loader's workers and other children"],
            "device_peak": held.device,
            "whole_device": held.whole_device,
            "reserved": torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else None,
        }
        return found if manager is None else {**found, "optimizer_state": owners, "pinned": manager.pinned_bytes()}

    def _beside_the_device(self, owners: dict[str, int]) -> dict[str, int]:
        """Tensors in host memory of a run on a GPU: what torch's pinned allocator holds, and the rest, pageable or
        pinned by `PinnedMemory` itself (streamed training's)."""
        there = sum(memory_bill(self.cycle.model, self.cycle.optimizer, "cpu").values())
        pinned = sum(owners.get(name, 0) for name in ("pinned", "leaving", "returning"))
        buffers = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
        return {"pinned buffers": buffers, "tensors in other host memory": max(0, there - pinned)}
