"""Transformers models built from their configuration, without weights, and example inputs derived from it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import ConfigError
from .models import ExampleInputs, named_errors, near_matches, parse_overrides

__all__ = ["load_hf"]

# The head that gives a model its usual training task; first match. Masked comes before causal language models because
# encoders such as BERT are registered as both, and decoders only as the latter; image-text models before both, because
# the causal class of some of them takes only the text part's configuration.
_TASKS = (
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MASKED_LM",
    "CAUSAL_LM",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
)


def load_hf(text: str, device: torch.device, batch_size: int, seq_len: int) -> tuple[nn.Module, ExampleInputs]:
    """Model and inputs for `NAME?key=value&...`; see `fxresu.models.load_model`. Raises ConfigError."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"model 'hf:{text}': transformers cannot be imported ({error}); pip install 'fxresu[models]'"
        ) from error
    spec = f"hf:{text}"
    name, overrides = parse_overrides(text, spec)
    config = _configuration(transformers, name, overrides, spec)
    for part in {id(c): c for c in (config, _text_part(config))}.values():
        if getattr(part, "use_cache", None):
            part.use_cache = False  # a cache has no use in training and breaks graphs
    with named_errors(f"model {spec!r}"), device:
        model = _model_class(transformers, config)._from_config(config)
    with device:
        return model.train(), _inputs(model, config, batch_size, seq_len, spec)


def _configuration(transformers: Any, name: str, overrides: dict[str, Any], spec: str) -> Any:
    values = _known_values(transformers, name, spec)
    model_type = values.pop("model_type")
    config_class = transformers.CONFIG_MAPPING[model_type]
    with named_errors(f"model {spec!r}: the configuration of {model_type!r}"):
        default = config_class(**values)
    for key, value in overrides.items():
        _override(values, default, key, value, spec)
    # Built anew rather than changed, because constructors derive values (head size, layer types) from others.
    with named_errors(f"model {spec!r}: the configuration of {model_type!r}"):
        return config_class(**values)


def _known_values(transformers: Any, name: str, spec: str) -> dict[str, Any]:
    """What is known of a configuration by its name: its model type, and its values if it is a file or cached."""
    types = list(transformers.CONFIG_MAPPING.keys())
    if name in types:
        return {"model_type": name}
    local = Path(name).expanduser()
    if local.exists():
        name = str(local)
    elif name.startswith((".", "/", "~")):
        raise ConfigError(f"model {spec!r}: no folder or config.json at {name!r}")
    try:
        values, _ = transformers.PretrainedConfig.get_config_dict(name, local_files_only=True)
    except Exception as error:
        raise ConfigError(
            f"model {spec!r}: {name!r} is no model type of transformers {transformers.__version__}, no folder with a "
            f"config.json and not in the local cache (nothing is downloaded){near_matches(name, types)}"
        ) from error
    if values.get("model_type") not in types:
        hint = near_matches(str(values.get("model_type")), types)
        raise ConfigError(
            f"model {spec!r}: its configuration says model_type={values.get('model_type')!r}, which transformers "
            f"{transformers.__version__} does not have{hint}"
        )
    return values


def _override(values: dict[str, Any], default: Any, key: str, value: Any, spec: str) -> None:
    """Set `a.b.c` in nested dicts of configuration values, refusing names that the default configuration lacks."""
    *folders, leaf = key.split(".")
    for folder in folders:
        child = getattr(default, folder, None)
        if child is None or not hasattr(child, "to_dict"):
            nested = [k for k, v in vars(default).items() if hasattr(v, "to_dict")]
            raise ConfigError(f"model {spec!r}: no nested configuration {folder!r}{near_matches(folder, nested)}")
        if not isinstance(values.get(folder), dict):
            values[folder] = {}
        default, values = child, values[folder]
    if not hasattr(default, leaf):
        known = [*default.to_dict(), *getattr(default, "attribute_map", {})]
        raise ConfigError(f"model {spec!r}: {type(default).__name__} has no {leaf!r}{near_matches(leaf, known)}")
    values.pop(leaf, None)
    values[getattr(default, "attribute_map", {}).get(leaf, leaf)] = value


def _model_class(transformers: Any, config: Any) -> Any:
    for architecture in getattr(config, "architectures", None) or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    for task in _TASKS:
        found = _lookup(transformers, f"MODEL_FOR_{task}_MAPPING", config)
        if found is not None:
            return found
    found = _lookup(transformers, "MODEL_MAPPING", config)
    if found is None:
        raise ConfigError(f"model type {config.model_type!r}: transformers builds it only as a part of a larger model")
    return found


def _lookup(transformers: Any, mapping: str, config: Any) -> Any:
    table = getattr(transformers, mapping, {})
    if type(config) not in table:
        return None
    found = table[type(config)]
    return found[0] if isinstance(found, list | tuple) else found


# ------------------------------------------------------------------------------------------------------ example inputs


def _inputs(model: nn.Module, config: Any, batch: int, seq_len: int, spec: str) -> ExampleInputs:
    accepted = inspect.signature(model.forward).parameters
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [str(model.main_input_name)]
    names += [n for n, p in accepted.items() if p.default is inspect.Parameter.empty and p.kind in kinds]
    if names[0] == "pixel_values" and "input_ids" in accepted:
        names.append("input_ids")
    if hasattr(model, "get_text_features"):  # two towers (CLIP and its relatives): text beside the other
        names += [n for n in ("input_ids", "pixel_values", "input_features") if n in accepted]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        names.append("decoder_input_ids")
    kwargs = {}
    for name in dict.fromkeys(names):
        builder = _BUILDERS.get(name)
        value = builder(config, batch, seq_len) if builder is not None else None
        if value is None:
            raise ConfigError(
                f"model {spec!r}: example inputs for {name!r} of {type(model).__name__} cannot be derived from its "
                "configuration; give 'package.module:factory', a function that returns (module, inputs)"
            )
        kwargs[name] = value
    return ExampleInputs(kwargs=kwargs)


def _text_part(config: Any) -> Any:
    try:
        return config.get_text_config()
    except ValueError:  # several parts read text; the configuration itself then has to know
        return config


def _first(config: Any, *names: str) -> Any:
    """The first of these values that the configuration or one of its nested configurations has."""
    nested = [c for c in vars(config).values() if hasattr(c, "to_dict")]
    for part in (config, *nested):
        for name in names:
            if (value := getattr(part, name, None)) is not None:
                return value
    return None


def _tokens(config: Any, batch: int, seq_len: int) -> torch.Tensor | None:
    text = _text_part(config)
    vocab = getattr(text, "vocab_size", None) or _first(config, "vocab_size")
    longest = getattr(text, "max_position_embeddings", None)
    if not isinstance(vocab, int):
        return None
    # RoBERTa and its relatives number positions from pad_token_id + 1
    length = min(seq_len, longest - 2) if isinstance(longest, int) and longest > 2 else seq_len
    return torch.randint(vocab, (batch, length))


def _decoder_tokens(config: Any, batch: int, seq_len: int) -> torch.Tensor | None:
    vocab = getattr(getattr(config, "decoder", None), "vocab_size", None)
    if isinstance(vocab, int):
        return torch.randint(vocab, (batch, seq_len))
    longest = getattr(config, "max_target_positions", None)
    return _tokens(config, batch, min(seq_len, longest) if isinstance(longest, int) else seq_len)


def _pixels(config: Any, batch: int, seq_len: int) -> torch.Tensor | None:
    channels = _first(config, "num_channels", "in_channels", "in_chans") or 3
    size = _first(config, "image_size", "img_size", "crop_size") or 224  # convolutional models take any size
    if isinstance(size, dict):
        size = [size.get("height"), size.get("width")]
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    frames = _first(config, "num_frames", "frames_per_clip")
    shape = (batch, frames, channels, height, width) if isinstance(frames, int) else (batch, channels, height, width)
    return torch.randn(shape)


def _waveform(config: Any, batch: int, seq_len: int) -> torch.Tensor | None:
    frames, bins = _first(config, "max_length"), _first(config, "num_mel_bins")
    if isinstance(frames, int) and isinstance(bins, int):
        return torch.randn(batch, frames, bins)
    if _first(config, "conv_stride") is None:
        return None
    return torch.randn(batch, 16000)  # one second


def _features(config: Any, batch: int, seq_len: int) -> torch.Tensor | None:
    bins = _first(config, "num_mel_bins")
    frames = _first(config, "max_source_positions")
    if isinstance(bins, int) and isinstance(frames, int):
        return torch.randn(batch, bins, 2 * frames)  # Whisper: a convolution of stride 2 precedes the positions
    width = _first(config, "input_feat_per_channel", "feature_projection_input_dim")
    return torch.randn(batch, 8 * seq_len, width) if isinstance(width, int) else None


_BUILDERS = {
    "input_ids": _tokens,
    "decoder_input_ids": _decoder_tokens,
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "input_values": _waveform,
    "input_features": _features,
}
