"""`StreamedAdamW` on tensors without memory, for predictions: which moments stay on the device, what the slots of the
others take, and gradients that go as they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxresu.passes._compat import FakeTensor

from .errors import ConfigError
from .streamed import StreamedAdamW
from .streamed_blocks import find_blocks
from .streamed_state import factors, form_of

__all__ = ["Streamed", "StreamedShapes", "moments_on_their_way"]


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Makes a `StreamedAdamW`, or what stands for it on tensors without memory.

    Attributes:
        options: of `StreamedAdamW`.

    Raises:
        ConfigError: it does not take them, or predictions do not know them.
    """

    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        try:
            made = StreamedAdamW([torch.zeros(1)], **self.options)
        except TypeError as error:
            raise ConfigError(f"optimizer='streamed': {error}") from None
        if made.sums == "host":
            raise ConfigError("optimizer='streamed': predictions do not know sums='host'")

    def __call__(self, parameters: Iterable[Tensor]) -> StreamedAdamW:
        found = list(parameters)
        kind = StreamedShapes if any(p.is_meta or isinstance(p, FakeTensor) for p in found) else StreamedAdamW
        return kind(found, **self.options)


class StreamedShapes(StreamedAdamW):
    """What `StreamedAdamW` has on the device: it makes the moments that stay, drops gradients, and updates nothing."""

    def _update(self, parameter: Tensor, factor: Tensor | None = None) -> None:
        if self._moments.stays(parameter, list(self._parameters())):
            self._state_of(parameter)
        elif form_of(parameter, self.moments) == "factored" and not self.state.get(parameter):
            self.state[parameter] = factors(parameter, parameter.device)
        parameter.grad = None

    def _update_many(self, parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            self._update(parameter)

    def sizes(self) -> tuple[int, int]:
        """Bytes of the slots on the device once there are some, and of the moments in host memory."""
        parameters = list(self._parameters())
        return self._moments.slot_sizes(parameters), self._moments.travelling_bytes(parameters)


def moments_on_their_way(model: nn.Module, make: Any, compiled: bool, by_blocks: bool) -> tuple[int, int]:
    """`StreamedShapes.sizes` for a model on the meta device, which stays as it is; zeros for an optimizer that is not
    streamed, and where nothing trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not isinstance(make, Streamed) or not trained:
        return 0, 0
    shapes = StreamedShapes(trained, **make.options)  # its hooks go with it
    if by_blocks and compiled:
        shapes.update_together([list(block.parameters()) for block in find_blocks(model)])
    return shapes.sizes()
