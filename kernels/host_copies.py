"""Tensors that wait in host memory: `fxresu::to_host`, `fxresu::from_host`, and the ends of these transfers.

With CUDA a copy runs on a stream of its own and the host memory is pinned. `to_host` returns at once; nothing but
`from_host`, on the same stream and so after it, may read what it returns, and its operand has to stay as it is until
`sent`: compilers give the memory of a dead tensor to the next one without asking the allocator. The result of
`from_host` holds its values from the `arrive` on that is given it. `to_host_after` is a `to_host` and an earlier one's
`sent`, and `arrive_and_fetch` an `arrive` and the next `from_host`: one node each, so that no compiler moves the start
of a transfer to its end. The latter takes what arrived before it as if it wrote to it: a compiler that orders nodes by
the memory they take counts the host's as the device's, and would fetch everything before anything is read. On other
devices all are plain copies, done when they return.

`transfers` counts what ran, since the process began: "to_host", "sent", "from_host" and "arrived", the bytes of the
first and the third ("..._bytes"), and "pageable", host tensors that could not be pinned (right, but their copies wait).
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

_LIB = torch.library.Library("fxresu", "FRAGMENT")
_LIB.define("to_host(Tensor x) -> Tensor")
_LIB.define("to_host_after(Tensor x, Tensor(a!) host, Tensor leaving) -> Tensor")
_LIB.define("sent(Tensor(a!) host, Tensor leaving) -> ()")
_LIB.define("from_host(Tensor host, Device device) -> Tensor")
_LIB.define("arrive(Tensor(a!) x) -> ()")
_LIB.define("arrive_and_fetch(Tensor(a!) x, Tensor host, Device device, Tensor(b!)? read) -> Tensor")

transfers: Counter[str] = Counter()
_STREAMS: dict[torch.device, torch.cuda.Stream] = {}
# By address: a tensor on its way is alive.
_ARRIVING: dict[int, torch.cuda.Event] = {}
_LEAVING: dict[int, torch.cuda.Event] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]


def _like(x: Tensor, device: torch.device | str, pin: bool = False) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device, pin_memory=pin)


def _host_like(x: Tensor) -> Tensor:
    """Pinned memory of x's layout; pageable where the host has none to spare."""
    try:
        return _like(x, "cpu", pin=True)
    except RuntimeError:
        transfers["pageable"] += 1
        return _like(x, "cpu")


def send(x: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """(a copy of `x` in host memory, of its layout; the event after which it is there). The allocator knows that `x` is
    in use, so eager code may forget it.

    Args:
        x: any dtype; non-overlapping and dense, as `can_wait` says.
    """
    transfers["to_host"] += 1
    transfers["to_host_bytes"] += x.nbytes
    if not x.is_cuda:
        return _like(x, "cpu").copy_(x), None
    host, stream = _host_like(x), _stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        host.copy_(x, non_blocking=True)
        event = stream.record_event()
    x.record_stream(stream)
    return host, event


def to_host(x: Tensor) -> Tensor:
    """`send`, for graphs: a `sent` has to follow."""
    host, event = send(x)
    if event is not None:
        _LEAVING[host.data_ptr()] = event
    return host


def sent(host: Tensor, leaving: Tensor) -> None:
    """Let the current stream wait until `leaving` has left for `host`; its memory may be used again then."""
    transfers["sent"] += 1
    event = _LEAVING.pop(host.data_ptr(), None)
    if event is not None:
        torch.cuda.current_stream(leaving.device).wait_event(event)


def to_host_after(x: Tensor, host: Tensor, leaving: Tensor) -> Tensor:
    """`to_host(x)`, then `sent(host, leaving)`."""
    new = to_host(x)
    sent(host, leaving)
    return new


def from_host(host: Tensor, device: torch.device) -> Tensor:
    """A copy of `host` on `device`, which may be read after `arrive`."""
    transfers["from_host"] += 1
    transfers["from_host_bytes"] += host.nbytes
    out = _like(host, device)
    if not out.is_cuda:
        return out.copy_(host)
    stream = _stream(out.device)
    stream.wait_stream(torch.cuda.current_stream(out.device))  # who had the memory before has to be done with it
    with torch.cuda.stream(stream):
        out.copy_(host, non_blocking=True)
        _ARRIVING[out.data_ptr()] = stream.record_event()
    out.record_stream(stream)
    return out


def arrive(x: Tensor) -> None:
    """Let the current stream wait for the transfer that fills `x`."""
    transfers["arrived"] += 1
    event = _ARRIVING.pop(x.data_ptr(), None) if x.is_cuda else None
    if event is not None:
        torch.cuda.current_stream(x.device).wait_event(event)


def arrive_and_fetch(x: Tensor, host: Tensor, device: torch.device, read: Tensor | None) -> Tensor:
    """`arrive(x)`, then `from_host(host, device)`, behind the readers of `read`, which stays as it is."""
    arrive(x)
    return from_host(host, device)


def can_wait(x: Tensor) -> bool:
    """Whether `x` has a layout that a host tensor can have too: no strides of zero, no gaps."""
    expected = 1
    for size, stride in sorted(zip(x.shape, x.stride()), key=lambda d: (int(d[1]), int(d[0]))):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected = expected * size
    return True


_LIB.impl("to_host", to_host, "CompositeExplicitAutograd")
_LIB.impl("to_host_after", to_host_after, "CompositeExplicitAutograd")
_LIB.impl("sent", sent, "CompositeExplicitAutograd")
_LIB.impl("from_host", from_host, "CompositeExplicitAutograd")
_LIB.impl("arrive", arrive, "CompositeExplicitAutograd")
_LIB.impl("arrive_and_fetch", arrive_and_fetch, "CompositeExplicitAutograd")


@torch.library.register_fake("fxresu::to_host")
def _fake_to_host(x: Tensor) -> Tensor:
    return _like(x, "cpu")


@torch.library.register_fake("fxresu::to_host_after")
def _fake_to_host_after(x: Tensor, host: Tensor, leaving: Tensor) -> Tensor:
    return _like(x, "cpu")


@torch.library.register_fake("fxresu::sent")
def _fake_sent(host: Tensor, leaving: Tensor) -> None:
    return None


@torch.library.register_fake("fxresu::from_host")
def _fake_from_host(host: Tensor, device: torch.device) -> Tensor:
    return _like(host, device)


@torch.library.register_fake("fxresu::arrive")
def _fake_arrive(x: Tensor) -> None:
    return None


@torch.library.register_fake("fxresu::arrive_and_fetch")
def _fake_arrive_and_fetch(x: Tensor, host: Tensor, device: torch.device, read: Tensor | None) -> Tensor:
    return _like(host, device)
