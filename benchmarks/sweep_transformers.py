"""A tiny configuration of every transformers model type: `names()` lists them, `build(name)` makes one and its inputs.

Nothing is downloaded. Each type's default configuration is shrunk field by field (few layers, narrow, small tables,
small images), the model gets random weights, and inputs are chosen by what its `forward` asks for, tried until one
choice runs. Where the narrow model does not run, only its depth and tables are shrunk.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.corpus import import_torchvision
from benchmarks.sweep_transformers_special import CONFIGS, INPUTS

LAYERS = 2
HEADS = 4
WIDTH = 32
VOCABULARY = 128
LENGTH = 8
PARAMETERS = 500_000_000  # of the largest model that is built

Inputs = dict[str, torch.Tensor]


class UnbuiltError(Exception):
    """No configuration and inputs were found with which the model runs."""


class Hidden(torch.nn.Module):
    """A transformer without its cache, reduced to its last hidden state, or to all float tensors where it has none."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.taken = "return_dict" in inspect.signature(model.forward).parameters or _takes_all(model.forward)

    def forward(self, **inputs: torch.Tensor) -> Any:
        """`inputs`: the tensors of the model's own `forward`, by name."""
        result = self.model(**inputs, return_dict=True) if self.taken else self.model(**inputs)
        hidden = getattr(result, "last_hidden_state", None)
        if isinstance(hidden, torch.Tensor):
            return hidden
        tensors = tuple(value for value in _tensors(result) if value.is_floating_point())
        return tensors[0] if len(tensors) == 1 else tensors


def names(everything: bool = False) -> list[str]:
    """The model types that transformers has a base model for."""
    import_torchvision()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(set(CONFIG_MAPPING_NAMES) & set(MODEL_MAPPING_NAMES))


def build(name: str) -> tuple[torch.nn.Module, Inputs]:
    """The model of a type in evaluation mode, and its inputs by name. UnbuiltError with the last reason."""
    import_torchvision()
    reasons: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for narrow in (True, False):
            try:
                model = _model(name, narrow)
            except Exception as error:  # noqa: BLE001 (the models' own errors are of every kind)
                reasons.append(_line(error))
                continue
            for inputs in _choices(name, model):
                module = Hidden(model).eval()
                try:
                    with torch.no_grad():
                        module(**inputs)
                except Exception as error:  # noqa: BLE001
                    reasons.append(f"{', '.join(inputs)}: {_line(error)}")
                    continue
                return module, inputs
    raise UnbuiltError("; ".join(dict.fromkeys(reasons)))


def configuration(name: str, narrow: bool = True) -> Any:
    """The type's default configuration, shrunk. `narrow`: in width too, not only in depth and tables."""
    import_torchvision()
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[name]()
    for part in _parts(config):
        _shrink(part, narrow)
    for path, value in CONFIGS.get(name, {}).items():
        *parents, field = path.split(".")
        owner = config
        for parent in parents:
            owner = getattr(owner, parent)
        old = getattr(owner, field, None)
        setattr(owner, field, {**old, **value} if isinstance(value, dict) and isinstance(old, dict) else value)
    return config


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _takes_all(function: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, dict):
        for value in result.values():
            yield from _tensors(value)
    elif isinstance(result, (list, tuple)):
        for value in result:
            yield from _tensors(value)


def _model(name: str, narrow: bool) -> Any:
    from transformers import AutoModel

    config = configuration(name, narrow)
    for part in _parts(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False
        part.dtype = torch.float32
    with torch.device("meta"):
        size = sum(math.prod(p.shape) for p in _from_config(AutoModel, config).parameters())
    if size > PARAMETERS:
        raise UnbuiltError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return _from_config(AutoModel, config).eval()


def _from_config(auto: Any, config: Any) -> Any:
    for part in _parts(config):
        part._experts_implementation = "batched_mm"  # matrices by a gather, which ONNX has
    try:
        return auto.from_config(config, attn_implementation="eager")
    except ValueError as error:
        if "attn" not in str(error) and "attention" not in str(error):
            raise
        return auto.from_config(config)


def _parts(config: Any) -> Iterator[Any]:
    """The configuration and those inside it."""
    from transformers import PreTrainedConfig

    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


# A field's name → its new value, from the old one. The first that matches.
_DEPTH: tuple[tuple[str, Callable[[int], int]], ...] = (
    (r"num_feat_extract_layers|num_conv_layers|num_upsampling_stages|num_dense_layers", lambda old: old),
    (r"first_k_dense_replace|moe_layer_start_index|num_nextn_predict_layers", lambda old: min(old, 1)),
    (r"num_kv_shared_layers", lambda old: 0),
    (
        r"(.*_)?(num_)?(.*_)?layers(_per_stack)?|(.*_)?n_layers?|(.*_)?depth|num_blocks|num_self_attends_per_block",
        lambda old: min(old, LAYERS),
    ),
    (
        r"vocab_size|src_vocab_size|tgt_vocab_size|decoder_vocab_size|.*vocab_size(_per_layer_input)?",
        lambda old: min(old, VOCABULARY),
    ),
    (r"(num|n)_(routed_|local_)?experts|moe_num_experts", lambda old: min(old, 4)),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|topk|num_selected_experts|top_k_experts", lambda old: min(old, 2)),
    (r"n_group|topk_group|num_expert_group|num_hash_buckets", lambda old: 1 if old < 64 else old),
)
_NARROW: tuple[tuple[str, Callable[[int], int]], ...] = (
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_length|max_.*positions", lambda old: min(old, 64)),
    (r".*sliding_window|attention_window|local_attention|attention_window_size", lambda old: min(old, 8)),
    (r"(.*_)?(num_)?(key_value|kv)_(attention_)?heads", lambda old: 1 if old == 1 else 2),
    (r"(.*_)?(num_)?(.*)heads|n_heads?", lambda old: min(old, HEADS)),
    (r"(.*)head_dim|d_kv|dim_head|attention_head_size|rotary_dim|(.*)head_size", lambda old: min(old, 8)),
    (r"upsample_groups|n_groups|mamba_n_groups", lambda old: min(old, 2) if old < 64 else WIDTH),
    (r"(q|kv|o)_lora_rank", lambda old: min(old, 16)),
    (
        r".*(intermediate|ffn|mlp|feed_?forward|inner).*(size|dim)|d_ff|dff|dim_ff|.*_linear_units",
        lambda old: min(old, 64),
    ),
    (
        r".*(hidden_size|hidden_dim|embed_dim|embedding_size|projection_dim|_width|d_model|n_embd|proj_dim|pooler_output_size)"
        r"|dim|d_model|n_embd|out_hidden_size|.*_hidden_size.*|output_dim|lru_width|fpn_feature_size|mask_dim|mask_feature_size",
        lambda old: min(old, WIDTH),
    ),
    (r"image_size|img_size|pretrain_image_size", lambda old: min(old, 32)),
    (r"patch_size", lambda old: min(old, 8)),
)


# Lists of the number of layers in each stage.
_STAGES = {"depths", "depth", "num_block_repeats", "stage_num_blocks", "blocks_per_stage", "stage_numb_of_layers"}
_STAGES |= {"layer_depths", "num_blocks"}


def _shrink(config: Any, narrow: bool) -> None:
    """Make the numbers of one configuration small, lists that have one entry for each layer with them."""
    deep = next((getattr(config, field, None) for field in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
                 if isinstance(getattr(config, field, None), int)), None)  # fmt: skip
    fields = {name: value for name, value in vars(config).items() if value is not None and not isinstance(value, bool)}
    kept = (
        None if any(isinstance(fields.get(stage), (list, tuple)) for stage in _STAGES) else _kept_layers(fields, deep)
    )
    for name, value in fields.items():
        new = value
        if isinstance(value, int):
            new = _small(name, value, narrow)
            if name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") and kept is not None:
                new = len(kept)
        elif isinstance(value, (list, tuple)) and kept is not None and len(value) == deep:
            new = type(value)(value[index] for index in kept)
            if name.endswith("heads_per_layer"):
                new = type(value)(min(number, HEADS) for number in new)
        elif name in _STAGES and isinstance(value, (list, tuple)):
            new = type(value)(min(number, LAYERS) if isinstance(number, int) else number for number in value)
        elif narrow and name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            new = _rope(value)
        if new is not value and new != value:
            setattr(config, name, new)
    _tokens(config)
    if narrow:
        _agree(config, fields)
    heads, shared = getattr(config, "num_attention_heads", None), fields.get("num_key_value_heads")
    if narrow and shared is not None and shared == fields.get("num_attention_heads") and isinstance(heads, int):
        config.num_key_value_heads = heads


def _agree(config: Any, fields: dict[str, Any]) -> None:
    """Sizes that follow from others, and those that a default configuration leaves open."""
    for field, value in _OPEN.items():
        if field in vars(config) and getattr(config, field) is None:
            setattr(config, field, value)
    if "qk_head_dim" in fields and "qk_nope_head_dim" in fields:
        config.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    if "mamba_n_heads" in fields and "mamba_d_head" in fields:
        config.mamba_d_head = config.mamba_expand * config.hidden_size // config.mamba_n_heads
        if "mamba_d_ssm" in fields:
            config.mamba_d_ssm = config.mamba_expand * config.hidden_size
    if "num_heads" in fields and "expand" in fields and "state_size" in fields:
        config.head_dim = config.expand * config.hidden_size // config.num_heads
        config.n_groups = min(config.n_groups, config.num_heads)


_OPEN = {
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": WIDTH // HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCABULARY,
    "prediction_length": 4,
}


def _kept_layers(fields: dict[str, Any], deep: int | None) -> list[int] | None:
    """Which layers stay: the first of each sort, at least two, where lists say of what sort each one is."""
    if deep is None or deep <= LAYERS:
        return None
    lists = [value for value in fields.values() if isinstance(value, (list, tuple)) and len(value) == deep]
    sorts = [value for value in lists if all(isinstance(entry, str) for entry in value)] or lists
    if not sorts:
        return None
    found: dict[tuple[Any, ...], int] = {}
    for index, sort in enumerate(zip(*sorts, strict=True)):
        found.setdefault(tuple(map(str, sort)), index)
    kept = sorted(found.values())[:4]
    return (
        kept if len(kept) >= LAYERS else sorted({*kept, *range(deep)} - set(range(LAYERS, deep)) | set(kept))[:LAYERS]
    )


def _small(name: str, value: int, narrow: bool) -> int:
    for pattern, rule in (*_DEPTH, *_NARROW) if narrow else _DEPTH:
        if re.fullmatch(pattern, name):
            return rule(value)
    return value


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters for heads of 8 channels."""
    changed = dict(value)
    for key, entry in value.items():
        if isinstance(entry, dict):
            changed[key] = _rope(entry)
        elif key == "mrope_section":
            changed[key] = [2, 1, 1]
        elif key == "original_max_position_embeddings":
            changed[key] = min(entry, 64)
    return changed


def _tokens(config: Any) -> None:
    """Special tokens that fit the small vocabulary, none of them among those that the inputs hold."""
    size = getattr(config, "vocab_size", None)
    number = VOCABULARY - 1
    for name, value in list(vars(config).items()):
        if not re.search(r"(token|_bos|_eos|_start|_end|_pad)_(id|index|ids)$|_token_id", name):
            continue
        if isinstance(value, int) and value >= VOCABULARY and (not isinstance(size, int) or size <= VOCABULARY):
            setattr(config, name, number)
            number -= 1


def _choices(name: str, model: Any) -> Iterator[Inputs]:
    """Inputs that the model may want, the most likely first."""
    if name in INPUTS:
        yield INPUTS[name](model.config)
        return
    parameters = inspect.signature(model.forward).parameters
    for main in dict.fromkeys([model.main_input_name, *_MAIN]):
        if main not in parameters or main not in _MAIN:
            continue
        for tensor in _MAIN[main](model.config):
            inputs = {main: tensor}
            for other, make in _COMPANIONS.items():
                if (
                    other in parameters
                    and other != main
                    and (made := make(model.config, inputs, parameters)) is not None
                ):
                    inputs[other] = made
            yield inputs


def _find(config: Any, *fields: str, default: Any = None) -> Any:
    """A field of the configuration, or of one inside it."""
    for part in _parts(config):
        for field in fields:
            value = getattr(part, field, None)
            if value is not None:
                return value
    return default


def _ids(config: Any) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    yield torch.randint(5, 60, (1, LENGTH), generator=generator)
    yield torch.randint(5, 60, (1, 4 * LENGTH), generator=generator)


def _pixels(config: Any) -> Iterator[torch.Tensor]:
    if hasattr(config, "patch_size") and (
        hasattr(config, "spatial_merge_size") or hasattr(config, "merge_kernel_size")
    ):
        yield from _patches(config)
        size = config.patch_size
        yield torch.randn(16, _find(config, "in_channels", "in_chans", "num_channels", default=3), size, size)
    channels = _find(config, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    size = _find(config, "image_size", "img_size", default=64)
    sizes = [tuple(size) if isinstance(size, (list, tuple)) else (size, size), (64, 64), (224, 224)]
    for height, width in dict.fromkeys(sizes):
        yield torch.randn(1, channels, height, width)
    frames = _find(config, "num_frames", "frames_per_clip", default=4)
    yield torch.randn(1, frames, channels, *sizes[0])
    yield torch.randn(1, channels, *sizes[0][:1], sizes[0][1])[:, :, None]


def _features(config: Any) -> Iterator[torch.Tensor]:
    bands = _find(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim",
                  "n_mel_bins", "input_dim", default=80)  # fmt: skip
    positions = _find(config, "max_source_positions", default=0)
    if positions:
        yield torch.randn(1, bands, 2 * positions)
    yield torch.randn(1, 64, bands)
    yield torch.randn(1, bands, 64)
    yield torch.randn(1, 1, _find(config, "spec_size", default=64), 64)


def _waves(config: Any) -> Iterator[torch.Tensor]:
    yield torch.randn(1, 2000)
    yield torch.randn(1, 1, 1920)
    yield torch.randn(1, 64, _find(config, "num_mel_bins", default=128))
    yield torch.randn(1, 64, _find(config, "num_mel_bins", default=128))


def _patches(config: Any) -> Iterator[torch.Tensor]:
    """Sixteen patches, flattened, of one image of 4 by 4."""
    size = config.patch_size * config.patch_size * _find(config, "in_channels", "in_chans", "num_channels", default=3)
    for frames in dict.fromkeys((_find(config, "temporal_patch_size", default=1), 1)):
        yield torch.randn(16, size * frames)


_MAIN: dict[str, Callable[[Any], Iterator[torch.Tensor]]] = {
    "input_ids": _ids,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _waves,
    "pixel_values_videos": _pixels,
    "hidden_states": _patches,
}


def _decoder_ids(config: Any, inputs: Inputs, parameters: Any) -> torch.Tensor | None:
    return torch.randint(5, 60, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def _pixel_companion(config: Any, inputs: Inputs, parameters: Any) -> torch.Tensor | None:
    """Only where text and image are encoded side by side: an image inside the text needs its own tokens."""
    needed = parameters["pixel_values"].default is inspect.Parameter.empty
    beside = hasattr(config, "vision_config") and (
        "text_config" in vars(config) and hasattr(config, "projection_dim") and not hasattr(config, "image_token_id")
    )
    return next(_pixels(getattr(config, "vision_config", config))) if needed or beside else None


def _boxes(config: Any, inputs: Inputs, parameters: Any) -> torch.Tensor | None:
    if "input_ids" not in inputs:
        return None
    return torch.arange(4).expand(*inputs["input_ids"].shape, 4).contiguous()


def _grid(config: Any, inputs: Inputs, parameters: Any) -> torch.Tensor | None:
    """Frames, rows and columns of the patches."""
    main = next(iter(inputs.values()))
    return torch.tensor([[1, 4, 4]]) if main.shape[0] == 16 else None


def _everything(main: str) -> Callable[[Any, Inputs, Any], torch.Tensor | None]:
    """A mask, all true, over a main input's positions, where the model requires one."""

    def make(config: Any, inputs: Inputs, parameters: Any) -> torch.Tensor | None:
        return None if main not in inputs else torch.ones(inputs[main].shape[:2], dtype=torch.bool)

    return make


def _required(name: str, make: Callable[[Any, Inputs, Any], torch.Tensor | None]) -> Any:
    def guarded(config: Any, inputs: Inputs, parameters: Any) -> torch.Tensor | None:
        return make(config, inputs, parameters) if parameters[name].default is inspect.Parameter.empty else None

    return guarded


_COMPANIONS: dict[str, Callable[[Any, Inputs, Any], torch.Tensor | None]] = {
    "decoder_input_ids": _decoder_ids,
    "pixel_values": _pixel_companion,
    "bbox": _boxes,
    "grid_thw": _required("grid_thw", _grid),
    "image_grid_thw": _required("image_grid_thw", _grid),
    "merge_sizes": _required("merge_sizes", lambda *_: torch.tensor([1])),
    "input_features_mask": _required("input_features_mask", _everything("input_features")),
    "pixel_position_ids": _required(
        "pixel_position_ids", lambda *_: torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
    ),
}
