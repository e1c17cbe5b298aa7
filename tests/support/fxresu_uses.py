"""What people do with models, tried on one architecture of the zoo, transformed and in RESU."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from fxresu_coverage import TOLERANCE, _close, _loss, _outputs, _to, built, check, cover
from fxresu_zoo import Architecture
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import fxresu
from fxresu.example_inputs import inputs_for
from fxresu.model_state import managed_weights
from fxresu.models import ExampleInputs
from fxresu.phases import set_phase
from fxresu.runner import runner_of

_TOLERANCE = 2e-3
_SIZES = ((2, 8), (3, 12), (5, 7), (4, 10))  # batch, length of sequences
_AOT = {"backend": "aot_eager"}

# A use gets the row and whether to try it on the plain model instead, and raises if it does not work.
Use = Callable[[Architecture, bool], None]


def _made(row: Architecture, plain: bool, compile: Any = None) -> tuple[nn.Module, ExampleInputs]:
    """The model, transformed and in RESU unless it is to be plain, and inputs."""
    model, inputs = built(row)
    if not plain:
        options = {**_AOT, "fullgraph": row.fullgraph, **row.compile}
        fxresu.transform(model, compile=options if compile is None else compile)
        set_phase(model, "resu")
    return model, inputs


def _right(model: nn.Module, inputs: ExampleInputs, plain: bool, dtype: torch.dtype = torch.float32) -> None:
    """A call and its backward; of a transformed model, with the gradients of RESU."""
    if plain:
        _loss(_outputs(inputs.call(model))).backward()
    else:
        check(model, inputs, "resu", dtype)


def _same(got: Any, want: Any, what: str) -> None:
    gots, wants = _outputs(got), _outputs(want)
    assert len(gots) == len(wants) > 0
    for a, b in zip(gots, wants):
        _close(a.detach(), b.detach(), _TOLERANCE, what)


def _plain_copy(model: nn.Module, plain: bool) -> nn.Module:
    twin = copy.deepcopy(model)
    return twin if plain else fxresu.untransform(twin)


def _functional_call(row: Architecture, plain: bool) -> None:
    model, inputs = _made(row, plain)
    values = {n: p.detach() * 1.01 for n, p in model.named_parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], module: nn.Module) -> Tensor:
        return _loss(_outputs(torch.func.functional_call(module, parameters, inputs.args, inputs.kwargs)))

    twin = _plain_copy(model, plain)
    got = torch.func.functional_call(model, values, inputs.args, inputs.kwargs)
    _same(got, torch.func.functional_call(twin, values, inputs.args, inputs.kwargs), "an output of functional_call")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "a parameter changed"
    leaves = {n: v.clone().requires_grad_() for n, v in values.items()}
    loss(leaves, twin).backward()
    for name, grad in torch.func.grad(loss)(values, model).items():
        if (want := leaves[name].grad) is not None:
            _close(grad, want, _TOLERANCE, f"torch.func.grad of {name}")


def _export(strict: bool) -> Use:
    def use(row: Architecture, plain: bool) -> None:
        model, inputs = _made(row, plain)
        exported = torch.export.export(model, inputs.args, inputs.kwargs, strict=strict)
        targets = {str(n.target) for m in exported.graph_module.modules() if hasattr(m, "graph") for n in m.graph.nodes}
        assert not any("fxresu" in t for t in targets), "the exported graph has operators of fxresu"
        keys = set(model.state_dict())
        assert set(exported.state_dict) <= keys, f"keys that the model has not: {set(exported.state_dict) - keys}"
        twin = _plain_copy(model, plain)
        _same(exported.module()(*inputs.args, **inputs.kwargs), inputs.call(twin), "an output of the exported program")

    return use


def _copied(clone: Callable[[nn.Module], nn.Module]) -> Use:
    def use(row: Architecture, plain: bool) -> None:
        model, inputs = _made(row, plain)
        _right(model, inputs, plain)
        twin = clone(model)
        kept = {} if plain else {n: m.entry.anchor.grad.clone() for n, m in _with_gradients(model)}
        _right(twin, inputs, plain)
        for name, grad in kept.items():
            assert torch.equal(grad, managed_weights(model)[name].entry.anchor.grad), f"the copy shares dθ of {name}"

    return use


def _with_gradients(model: nn.Module) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in managed_weights(model).items() if m.entry.grad_of_theta() is not None]


def _meta(row: Architecture, plain: bool) -> None:
    real, inputs = built(row)
    with torch.device("meta"):
        model, _ = row.make()
    if not plain:
        fxresu.transform(model, compile={**_AOT, "fullgraph": row.fullgraph, **row.compile})
    model.to_empty(device="cpu")
    model.load_state_dict(real.state_dict())
    buffers = dict(real.named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])  # those that no state dict holds
    if not plain:
        set_phase(model, "resu")
    _same(inputs.call(model), inputs.call(_plain_copy(model, plain)), "an output after to_empty and load_state_dict")
    _right(model, inputs, plain)


def _sized(model: nn.Module, inputs: ExampleInputs, batch: int, length: int) -> ExampleInputs:
    """Inputs of another size, of the model's own kind."""
    if hasattr(model, "config") or hasattr(model, "pretrained_cfg"):
        return inputs_for(model, None, batch_size=batch, seq_len=length)

    def resized(t: Tensor) -> Tensor:  # [batch, sequence, features] of torch's own layers
        first = batch if t.shape[0] == 2 else t.shape[0]
        return torch.randn(first, length + t.shape[1], *t.shape[2:])

    return ExampleInputs(pytree.tree_map_only(Tensor, resized, inputs.args))


def _dynamic(declared: bool) -> Use:
    def use(row: Architecture, plain: bool) -> None:
        """Four sizes: one graph (and one more for sizes that nobody declared), times the pieces of a broken one."""
        options = {**_AOT, "fullgraph": row.fullgraph, **({"dynamic": True} if declared else {})}
        model, inputs = _made(row, plain, options)
        graphs = []

        def counting(module: Any, example: Any) -> Any:
            graphs.append(module)
            return torch._dynamo.lookup_backend("aot_eager")(module, example)

        compiled = torch.compile(model, **{**options, "backend": counting}) if plain else model
        counts = []
        for batch, length in _SIZES:
            torch.manual_seed(batch)
            sized = _sized(model, inputs, batch, length)
            _right(compiled, sized, plain)
            counts.append(len(graphs) if plain else len(next(iter(runner_of(model).entries.values())).graphs))
        allowed = counts[0] if declared else 2 * counts[0]
        assert counts[-1] <= allowed, f"{counts[-1]} graphs over {len(_SIZES)} sizes, {counts} after each"

    return use


class Checkpointed(nn.Module):
    """A model all of which is recomputed in the backward. The extra input makes reentrant checkpointing track it."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, *args, **kwargs):
        def run(_: Tensor) -> Any:
            return tuple(_outputs(self.inner(*args, **kwargs)))

        return checkpoint(run, torch.ones((), requires_grad=True), use_reentrant=self.reentrant)


def _checkpoint(reentrant: bool) -> Use:
    def use(row: Architecture, plain: bool) -> None:
        """Compiled, and eager (where reentrant checkpointing is what it says)."""
        for compile in ({**_AOT, **row.compile}, False):
            model, inputs = built(row)
            if getattr(model, "supports_gradient_checkpointing", False):
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            else:
                model = Checkpointed(model, reentrant)
            if not plain:
                fxresu.transform(model, compile=compile)
                set_phase(model, "resu")
            _right(model, inputs, plain)

    return use


def _lora(row: Architecture, plain: bool) -> None:
    """Adapters on top of a transformed model: their gradients, and none for what they freeze."""
    from peft import LoraConfig, get_peft_model

    model, inputs = _made(row, plain)
    twin = _plain_copy(model, plain)

    def adapted(base: nn.Module) -> nn.Module:
        kinds = (nn.Linear, nn.MultiheadAttention, *([c] if (c := _conv1d()) else []))
        names = [n for n, m in base.named_modules() if isinstance(m, kinds) and not n.endswith("out_proj")]
        assert names, "no linear to adapt"
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_dropout=0.0, target_modules=names, init_lora_weights=False)
        return get_peft_model(base, config)

    model, twin = adapted(model), adapted(twin).double()
    compiled = torch.compile(model, **_AOT, fullgraph=row.fullgraph) if plain else model
    got = _outputs(inputs.call(compiled))
    want = _outputs(_to(inputs, torch.float64).call(twin))
    _same(got, want, "an output under LoRA")
    _loss(got).backward()
    _loss(want).backward()
    grads = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == mine.keys() and grads, f"gradients of {grads.keys() ^ mine.keys()}"
    for name, grad in mine.items():
        _close(grad, grads[name], _TOLERANCE, f"the gradient of {name}")


def _conv1d() -> type[nn.Module] | None:
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError:
        return None
    return Conv1D


def _right_in_half(model: nn.Module, inputs: ExampleInputs) -> None:
    """The plain model's own gradients, against float64, within the tolerance of its type."""
    reference = copy.deepcopy(model).double()
    if hasattr(reference, "set_experts_implementation"):
        reference.set_experts_implementation("eager")
    _loss(_outputs(inputs.call(model))).backward()
    _loss(_outputs(_to(inputs, torch.float64).call(reference))).backward()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and parameter.grad is not None:
            want, tolerance = reference.get_parameter(name).grad, TOLERANCE[parameter.dtype]
            _close(parameter.grad, want, tolerance, f"the plain model's gradient of {name}")


def _half(dtype: torch.dtype) -> Use:
    def use(row: Architecture, plain: bool) -> None:
        """As far off as the type allows; models that look for overflow in float16 break their graph."""
        row = dataclasses.replace(row, dtype=dtype, inductor=False, fullgraph=row.fullgraph and dtype is torch.bfloat16)
        if plain:
            _right_in_half(*_made(row, plain))
        else:
            cover(row, ("resu",))

    return use


USES: dict[str, Use] = {
    "functional_call": _functional_call,
    "export": _export(False),
    "export, strict": _export(True),
    "deepcopy": _copied(copy.deepcopy),
    "pickle": _copied(lambda m: pickle.loads(pickle.dumps(m))),
    "meta": _meta,
    "sizes change": _dynamic(False),
    "sizes declared": _dynamic(True),
    "checkpoint": _checkpoint(False),
    "checkpoint, reentrant": _checkpoint(True),
    "LoRA": _lora,
    "bfloat16": _half(torch.bfloat16),
    "float16": _half(torch.float16),
}


def try_use(row: Architecture, use: str) -> str:
    """Try a use.

    Returns:
        "" if it works; else why it does not, where the plain model cannot be used so either.

    Raises:
        Exception: it does not work, and works with the plain model.
    """
    row = dataclasses.replace(row, inductor=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch._dynamo.reset()
            USES[use](row, False)
            return ""
        except Exception as error:
            failure = error
        try:
            torch._dynamo.reset()
            USES[use](row, True)
        except Exception as error:
            said = re.sub(r'"(/[^"/]*)+/', '"', " ".join(str(error).split()))  # files by their names alone
            return f"{type(error).__name__}: {said[:160]}"
    raise failure
