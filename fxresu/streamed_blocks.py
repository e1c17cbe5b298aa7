"""`stream_blocks`: a model's repeated blocks one by one: compiled, recomputed in the backward, in and out of memory.

Compiled as a whole, a model gives all gradients at once, when the graph's backward ends. Compiled block by block it
gives one block's, which an optimizer that works in the backward (`StreamedAdamW`) uses and frees before the next are
made. Blocks of one class share one compilation, or two where only some are recomputed by their own graphs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxresu.passes import Phase, install_partitioner, keeping_costly, keeping_narrow
from fxresu.passes._compat import compilations_since, compile_isolated, honour_dynamic_marks, last_compilation

from .activation_stream import ActivationStream
from .errors import ConfigError, NothingCompiledError
from .lanes import lanes_for
from .model_state import is_transformed, link_stream, managed_weights
from .streamed import StreamedAdamW
from .weight_stream import WeightStream

__all__ = ["KEPT", "RECOMPUTED", "StreamedBlocks", "find_blocks", "stream_blocks"]

KEPT = ("all", "costly")
RECOMPUTED = ("inputs", "narrow")
_KEY = "_fxresu_streamed"
_Frame = Callable[..., Any]


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks: the `nn.ModuleList` or `nn.Sequential` with the most parameters in equal members.

    Raises:
        ConfigError: there is none with two or more members of one class.
    """
    best: tuple[int, list[nn.Module]] = (0, [])
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            members = list(module)
            size = sum(p.numel() for p in module.parameters())
            if all(type(m) is type(members[0]) for m in members) and size > best[0]:
                best = (size, members)
    if not best[1]:
        raise ConfigError(f"model={type(model).__name__} has no list of equal blocks; name them with blocks=")
    return best[1]


def stream_blocks(
    model: nn.Module,
    blocks: Sequence[nn.Module] | None = None,
    *,
    compile: bool | Mapping[str, Any] = True,
    recompute: float | Mapping[str, float] = 1.0,
    kept: str = "all",
    recomputed: str = "inputs",
    offload: bool = False,
    weights: int | Mapping[str, int] = 0,
    slots: int = 3,
    optimizer: StreamedAdamW | None = None,
    device: torch.device | str | None = None,
) -> StreamedBlocks:
    """Let the blocks of a model run one by one, in place. Names, `state_dict()` keys and results stay.

    A transformed model has to be transformed with `compile=False`: it would be compiled as a whole otherwise. Its
    passes run on every block then, if these are compiled with Inductor.

    Args:
        blocks: in the order in which they run; default is `find_blocks(model)`.
        compile: every block by itself: True, False, or arguments for `torch.compile`.
        recompute: share of the blocks, the first ones, whose activations are not kept but computed again in the
            backward. It costs one more forward of these, a third of their time at most. A mapping gives shares by
            phase, such as {"dense": 0.7, "resu": 1.0}: θ and its moments take room that activations have in other
            phases. The largest share holds for phases that it does not name.
        kept: of the other blocks: "all" that the compiler wants to keep, or what is "costly" to compute again, the
            results of products and attention. A transformer block then keeps a third less, for a few more reads and
            writes in its backward.
        recomputed: what recomputed blocks keep: their "inputs" alone, or what is "narrow" too: results of attention,
            and of products that are no wider than what these read. In a transformer block most of the feed-forward part
            is computed again then.
        offload: the inputs of recomputed blocks wait in host memory. A block's input then costs two copies over the
            bus, beside the computation.
        weights: this many of the recomputed blocks have their weights in host memory, the last ones. It frees a block's
            weights each but for `slots` of them, and costs three copies of each in a step. A mapping says how many are
            away by phase, such as {"dense": 12, "resu": 30}: in phases with fewer, the others of them are on the
            device. The largest number holds for phases that it does not name, and for changes of phase.
        slots: blocks of these that the device holds at a time: one that runs, one that comes, one that leaves.
        optimizer: steps such weights; needed with `weights`.
        device: where the model computes; default is where the blocks are. A model in host memory that the device could
            not hold goes there in part: blocks by their slots, the rest of it for good. The optimizer has not stepped.

    Raises:
        ConfigError: an argument is out of range, or blocks are streamed already.
        HostMemoryError: with `weights`, if the host has not enough memory. The model is unchanged in both cases.
    """
    chosen = list(blocks) if blocks is not None else find_blocks(model)
    by_phase = weights if isinstance(weights, Mapping) else {}
    shares = recompute if isinstance(recompute, Mapping) else {"": recompute}
    weights = _check(model, chosen, compile, shares, weights, optimizer)
    home = next(chosen[0].parameters()).device
    target = home if device is None else _device(device)
    if target != home and optimizer is not None and optimizer.state:
        raise ConfigError(f"device={str(target)!r}: the optimizer has moments on {home} already; make a new one")
    counts = {phase: round(share * len(chosen)) for phase, share in shares.items()}
    count = min(counts.values())
    if weights > count:
        raise ConfigError(f"weights={weights} with recompute={recompute!r}: only recomputed blocks can be away")
    for name, value, known in (("kept", kept, KEPT), ("recomputed", recomputed, RECOMPUTED)):
        if value not in known:
            raise ConfigError(f"{name}={value!r}: use {' or '.join(map(repr, known))}")
    if weights and recomputed != "inputs":
        raise ConfigError(f"recomputed={recomputed!r} with weights={weights}: blocks that leave keep their inputs only")
    stream = WeightStream(chosen[count - weights : count], lanes_for(target), slots, target) if weights else None
    if target != home:
        _move_rest(model, stream, target)
    if isinstance(optimizer, StreamedAdamW):
        optimizer.weights = stream
        optimizer.compute_on(target)
        # Gradients of an eager block come one at a time, and need not wait for the others.
        optimizer.update_together([] if compile is False else [list(block.parameters()) for block in chosen])
    if stream is not None:
        link_stream(model, stream)
    options = None if compile is False else {} if compile is True else dict(compile)
    if options is not None:
        install_partitioner()  # attention that is computed again saves no state of the random generator with it
    saved = ActivationStream(lanes_for(target)) if offload else None
    frames = {"costly": _costly_forward, "narrow": _narrow_forward}
    saving = frames.get(kept, _forward), frames.get(recomputed)
    return StreamedBlocks(model, chosen, counts, saving, options, saved, stream, optimizer, by_phase)


def _device(name: torch.device | str) -> torch.device:
    """With its index; ConfigError for one that is not there."""
    try:
        return torch.empty(0, device=name).device
    except Exception as error:  # torch raises several kinds
        raise ConfigError(f"device={str(name)!r} cannot be used here: {error}") from None


def _move_rest(model: nn.Module, stream: WeightStream | None, device: torch.device) -> None:
    """What does not travel goes to the device for good; all of it, or nothing after an error."""
    stay = [p for p in model.parameters() if stream is None or not stream.streams(p)]
    parameters = [(p, p.detach().to(device)) for p in stay]
    buffers = [
        (module, name, buffer.to(device))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    for parameter, value in parameters:
        parameter.data = value
    for module, name, value in buffers:
        module._buffers[name] = value
    if is_transformed(model):
        for managed in managed_weights(model).values():
            managed.entry.apply(lambda tensor: tensor.to(device))


def _check(
    model: nn.Module,
    blocks: list[nn.Module],
    compile: object,
    recompute: Mapping[str, float],
    weights: int | Mapping[str, int],
    optimizer: object,
) -> int:
    """The largest number of blocks whose weights are away."""
    inside = {id(m) for m in model.modules()}
    for block in blocks:
        if id(block) not in inside:
            raise ConfigError(f"blocks: a {type(block).__name__} among them is no part of the model")
        if _KEY in block.__dict__:
            raise ConfigError("blocks are streamed already; remove() the earlier ones first")
        if not any(True for _ in block.parameters()):
            raise ConfigError(f"blocks: a {type(block).__name__} among them has no parameters")
    if not isinstance(compile, (bool, Mapping)):
        raise ConfigError(f"compile={compile!r}: use True, False, or a mapping of torch.compile arguments")
    if not recompute:
        raise ConfigError("recompute={}: use a share of the blocks, or shares by phase")
    for phase, share in recompute.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            name = f"recompute[{phase!r}]" if phase else "recompute"
            raise ConfigError(f"{name}={share!r}: use a share of the blocks in [0, 1]")
    named = {f"weights[{p!r}]": n for p, n in weights.items()} if isinstance(weights, Mapping) else {"weights": weights}
    _check_phases("recompute", [phase for phase in recompute if phase])
    _check_phases("weights", list(weights) if isinstance(weights, Mapping) else [])
    for name, number in named.items():
        if not isinstance(number, int) or not 0 <= number <= len(blocks):
            raise ConfigError(f"{name}={number!r}: use a number of blocks from 0 to {len(blocks)}")
    most = max(named.values(), default=0)
    if most and is_transformed(model) and any(m.entry.packed for m in managed_weights(model).values()):
        raise ConfigError(f"weights={weights!r}: packed weights have nothing to bring; call it before RESU, or use 0")
    if most and not isinstance(optimizer, StreamedAdamW):
        raise ConfigError(
            f"weights={weights!r} needs optimizer=, a StreamedAdamW: another one would step absent weights"
        )
    return most


def _check_phases(argument: str, phases: Sequence[str]) -> None:
    known = [str(phase) for phase in Phase]
    for phase in phases:
        if phase not in known:
            raise ConfigError(f"{argument}[{phase!r}]: there is no such phase; use {', '.join(known)}")


class StreamedBlocks:
    """What `stream_blocks` has set up.

    Attributes:
        blocks: in order.
        activations: brings inputs that wait in host memory, or None.
        weights: brings weights that are in host memory, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        recomputed: Mapping[str, int],
        saving: tuple[_Frame, _Frame | None],
        options: Mapping[str, Any] | None,
        activations: ActivationStream | None,
        weights: WeightStream | None,
        optimizer: StreamedAdamW | None,
        away: Mapping[str, int],
    ) -> None:
        self.blocks, self.activations, self.weights = blocks, activations, weights
        self._away = away  # blocks whose weights come and go, by phase
        self._recomputed = recomputed  # how many, by phase; "" is every one
        self._saving, self._narrow = saving
        self._model, self._options, self._optimizer = model, options, optimizer
        self._functions: dict[tuple[type, str, _Frame], Callable[..., Any]] = {}
        self._entries: dict[int, list[Any]] = {}  # managed weights by block: a walk through it takes a tenth of a call
        for i, block in enumerate(blocks):
            block.__dict__[_KEY] = True
            block.__dict__["forward"] = functools.partial(self._call, block, i)
        self._handles: list[Any] = []
        if weights is not None:  # what reads or writes parameters by name finds them at home
            self._handles = [
                model.register_state_dict_pre_hook(lambda *_: weights.send_home()),
                model.register_load_state_dict_pre_hook(lambda *_: weights.send_home()),
            ]

    def remove(self) -> None:
        """Give the blocks their own forward back; weights that are in host memory come to the device for good."""
        for block in self.blocks:
            block.__dict__.pop(_KEY, None)
            block.__dict__.pop("forward", None)
        for handle in self._handles:
            handle.remove()
        if isinstance(self._optimizer, StreamedAdamW):
            self._optimizer.update_together([])
        if self.weights is not None:
            self.weights.give_up()
            link_stream(self._model, None)
            if self._optimizer is not None:
                self._optimizer.weights = None

    def _call(self, block: nn.Module, number: int, *args: Any, **kwargs: Any) -> Any:
        if self.weights is not None and self._away:
            away = self._in_phase(self._away, block)
            if away != self.weights.away:
                self.weights.reside(away)
        if not torch.is_grad_enabled():
            return self._run(block, _forward, *args, **kwargs)
        if number >= self._in_phase(self._recomputed, block):
            return self._run(block, self._saving, *args, **kwargs)
        inside = self._options is not None and (self.weights is None or not self.weights.comes_and_goes(block))
        if self.activations is None:
            saving: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        else:
            saving = self.activations.saving(args if inside or self._narrow else None)
        with saving:
            if self._narrow is not None:
                return self._run(block, self._narrow, *args, **kwargs)
            if inside:
                return self._run(block, _recomputed_forward, *args, **kwargs)
            # What is saved inside a graph includes the weights, whose memory another block's are in meanwhile.
            return checkpoint(functools.partial(self._run, block, _forward), *args, use_reentrant=False, **kwargs)

    def _in_phase(self, by_phase: Mapping[str, int], block: nn.Module) -> int:
        """The number for the phase that the block is in."""
        if "" in by_phase:
            return by_phase[""]
        entries = self._managed(block)
        phase = entries[0].state.plan.phase if entries else Phase.DENSE
        return by_phase.get(str(phase), max(by_phase.values()))

    def _run(self, block: nn.Module, frame: _Frame, *args: Any, **kwargs: Any) -> Any:
        if self.weights is not None:
            self.weights.bring(block)
        if self._options is None:
            return frame(block, *args, **kwargs)
        # One function for all blocks of a class, and for every phase of a transformed model.
        entries = self._managed(block)
        # What their reads follow; "" where there are none.
        key = type(block), entries[0].state.current()[1] if entries else "", frame
        first = key not in self._functions
        if first:
            self._functions[key] = compile_isolated(frame, **self._options)
        mark = last_compilation() if first else None
        packed = any(entry.packed for entry in entries)  # their lengths differ from block to block
        with honour_dynamic_marks() if packed else contextlib.nullcontext():
            out = self._functions[key](block, *args, **kwargs)
        failures = [why for _, why in compilations_since(mark)] if first else []
        if failures and all(failures):
            del self._functions[key]
            raise NothingCompiledError(
                f"compiling {type(block).__name__} gave no graph: {failures[0]} (models of transformers want"
                " config.use_cache = False). Pass compile=False to run it eager knowingly"
            )
        return out

    def _managed(self, block: nn.Module) -> list[Any]:
        """Records of its managed weights."""
        entries = self._entries.get(id(block)) or self._entries.setdefault(id(block), [])
        if not entries:  # a model may be transformed later; `block.modules()` would cost this walk ten times as much
            modules = [block]
            for module in modules:
                entries += module.__dict__.get("_fxresu", {}).values()
                modules += [child for child in module._modules.values() if child is not None]
        return entries


def _forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The frame that is compiled. The class's forward: the block's own attribute is what calls this."""
    return type(block).forward(block, *args, **kwargs)


def _recomputed_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The same where the backward's graph computes again what it needs, and nothing else: not the block's result, and
    without a call of its own."""
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, **kwargs)


def _costly_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The same where the backward's graph computes again what is cheap."""
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, context_fn=keeping_costly, **kwargs)


def _narrow_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The same where it computes again what is cheap, and what is wide."""
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, context_fn=keeping_narrow, **kwargs)
