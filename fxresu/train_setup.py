"""What a run of `fxresu train` starts from: device, output folder, corpus and model, as the options say."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .corpus import Corpus, build_corpus, corpus_from_file
from .errors import ConfigError
from .ledger import current_rss
from .models import GPT, GPTConfig, demo_config


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or the best there is; ConfigError if it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device={name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def make_writable(folder: Path) -> None:
    """Make the output folder, and find out now rather than after an hour whether it can be written."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; give a writable folder with --out", str(folder)) from None
    probe.unlink()


def framework_bytes(device: torch.device, compiled: bool = True) -> int:
    """What the process holds before there is a model: interpreter, libraries, and Inductor where it will compile (on
    a CPU, where that counts)."""
    if compiled and device.type == "cpu":
        importlib.import_module("torch._inductor.compile_fx")
    return current_rss()


def sequence_length(args: argparse.Namespace, device: torch.device) -> int:
    """Tokens a sequence."""
    return args.seq or (128 if device.type == "cpu" else 512)


def open_corpus(args: argparse.Namespace, seq: int) -> Corpus:
    """The user's own text, or text found on this machine; built on first use."""
    folder = args.corpus or args.out.parent / ("corpus-own" if args.data else "corpus")
    options: dict[str, Any] = {"tokenizer": args.tokenizer, "vocab_size": args.vocab, "window": seq + 1}
    if args.data:
        return corpus_from_file(args.data, folder, **options)
    return build_corpus(folder, min_bytes=args.corpus_bytes, **options)


def make_model(args: argparse.Namespace, vocab: int, seq: int, device: torch.device) -> GPT:
    """A GPT of the options' shape."""
    given = {k: v for k, v in (("layers", args.layers), ("width", args.width), ("heads", args.heads)) if v is not None}
    config: GPTConfig = dataclasses.replace(demo_config(vocab, device), context=seq, **given)
    model = GPT(config).to(device)
    if args.init is not None:
        load_weights(model, args.init)
    return model


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Load `model.state_dict()` from a .safetensors file, one that `torch.save` wrote, or a checkpoint folder.

    Raises:
        ConfigError: a file of another model, or none of these.
        OSError: it cannot be read.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        model.load_state_dict(state)
    except FileNotFoundError:
        raise ConfigError(f"--init={str(path)!r}: there is no {str(file)!r}") from None
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, AttributeError, TypeError, EOFError) as error:
        first = " ".join(str(error).split())[:300]
        raise ConfigError(f"--init={str(path)!r} does not fit this model: {first}") from None
