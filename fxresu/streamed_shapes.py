"""`StreamedAdamW` on tensors without memory, for predictions: which moments stay on the device, what the slots of the
others take, and gradients that go as they come."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import ConfigError
from .streamed import StreamedAdamW
from .streamed_blocks import find_blocks, stream_blocks
from .streamed_moments import StreamedMoments
from .streamed_state import new_states

__all__ = ["Streamed", "StreamedShapes", "moments_on_their_way"]


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Makes a `StreamedAdamW`, or what stands for it on tensors without memory.

    Attributes:
        options: of `StreamedAdamW`.
    """

    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        try:
            StreamedAdamW([torch.zeros(1)], **self.options)  # says what is wrong with them
        except TypeError as error:
            raise ConfigError(f"optimizer='streamed': {error}") from None
        if self.options.get("sums") == "host":
            raise ConfigError("optimizer='streamed': predictions do not know sums='host'")

    def __call__(self, parameters: Iterable[Tensor]) -> Optimizer:
        found = list(parameters)
        if any(_without_memory(p) for p in found):
            return StreamedShapes(found, self)
        return StreamedAdamW(found, **self.options)

    def moments(self, device: torch.device) -> StreamedMoments:
        """Where the moments are that a `StreamedAdamW` with these options makes on a device."""
        given = {"moments": "8bit", "lookahead": None, "chunk": 2**24, "device_bytes": 0, **self.options}
        return StreamedMoments(given["moments"], given["lookahead"], given["chunk"], given["device_bytes"], device)


def _without_memory(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor)


class StreamedShapes(Optimizer):
    """What `StreamedAdamW` has on the device; it updates nothing.

    Args:
        made: the options.

    Attributes:
        moments: where they would be.
    """

    def __init__(self, params: Iterable[Tensor], made: Streamed) -> None:
        super().__init__(params, {})
        self._all = [p for group in self.param_groups for p in group["params"]]
        self.moments = made.moments(self._all[0].device)
        self._keeps = made.options.get("max_norm") is not None and made.options.get("clip") == "exact"
        self._gathering = False
        self._waiting: dict[int, Tensor] = {}
        for parameter in self._all:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def update_together(self, groups: Sequence[Iterable[Tensor]]) -> None:
        """As `StreamedAdamW`'s."""
        ours = {id(p) for p in self._all}
        self.moments.group([p for p in group if id(p) in ours] for group in groups)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """As `StreamedAdamW`'s."""
        self._gathering = True
        try:
            yield
        finally:
            self._gathering = False

    def _arrived(self, parameter: Tensor) -> None:
        if self._gathering or self._keeps:
            return
        group = self.moments.groups.get(id(parameter))
        if group is None:
            self._update(parameter)
            return
        if self._waiting and self.moments.groups[next(iter(self._waiting))] is not group:
            self._flush()
        self._waiting[id(parameter)] = parameter
        if len(self._waiting) == group.trainable:
            self._flush()

    def _flush(self) -> None:
        for parameter in self._waiting.values():
            self._update(parameter)
        self._waiting.clear()

    def _update(self, parameter: Tensor) -> None:
        if parameter not in self.state and self.moments.stays(parameter, self._all):
            (state,) = new_states([parameter], self.moments.form, None, _nothing, self.moments.chunk, parameter.device)
            self.state[parameter] = state
        parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make what moments stay, and drop all gradients."""
        self._flush()
        for parameter in self._all:
            if parameter.grad is not None:
                self._update(parameter)
        return None


def _nothing() -> None: ...


def run_by_blocks(model: nn.Module, optimizer: Any, compiled: bool, recompute: float) -> None:
    """`stream_blocks` with a streamed optimizer, one that stands for it, or any other."""
    if isinstance(optimizer, StreamedShapes):
        stream_blocks(model, compile=compiled, recompute=recompute)
        optimizer.update_together([list(b.parameters()) for b in find_blocks(model)] if compiled else [])
    else:
        stream_blocks(model, compile=compiled, recompute=recompute, optimizer=optimizer)


def moments_on_their_way(model: nn.Module, make: Any, compiled: bool, by_blocks: bool) -> tuple[int, int]:
    """Bytes of the slots on the device, and of the moments in host memory, of a model on the meta device; zeros for an
    optimizer that is not streamed."""
    if not isinstance(make, Streamed):
        return 0, 0
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = make.moments(parameters[0].device)
    if by_blocks and compiled:
        found.group([list(b.parameters()) for b in find_blocks(model)])
    return found.slot_sizes(parameters), found.travelling_bytes(parameters)
