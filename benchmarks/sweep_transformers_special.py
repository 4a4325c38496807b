"""What `benchmarks.sweep_transformers` cannot tell from a model's fields: settings and inputs of single model types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_SECTIONS = {"rope_parameters": {"mrope_section": [2, 1, 1]}}
_SECTIONS_HALF = {"rope_parameters": {"mrope_section": [1, 1, 0]}}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SORTS = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_SERIES: dict[str, Any] = {"prediction_length": 4, "context_length": 8, "d_model": 32, "lags_sequence": [1, 2]}


def _in_text(fields: dict[str, Any]) -> dict[str, Any]:
    return {f"text_config.{name}": value for name, value in fields.items()}


# model type → field (dotted into nested configurations) → value, after shrinking
CONFIGS: dict[str, dict[str, Any]] = {
    "autoformer": {**_SERIES, "feature_size": 5, "num_time_features": 1, "moving_average": 3},
    "informer": {**_SERIES, "feature_size": 5, "num_time_features": 1},
    "time_series_transformer": {**_SERIES, "feature_size": 5, "num_time_features": 1},
    "qwen2_vl_text": _SECTIONS,
    "qwen2_5_vl_text": _SECTIONS,
    "glm4v_text": _SECTIONS,
    "glm_image_text": _SECTIONS,
    "glm4v_moe_text": _SECTIONS_HALF,
    "qwen2_vl": _in_text(_SECTIONS),
    "qwen2_5_vl": _in_text(_SECTIONS),
    "qwen2_5_omni_thinker": _in_text(_SECTIONS),
    "glm4v": _in_text(_SECTIONS),
    "glm46v": _in_text(_SECTIONS),
    "glm_image": _in_text(_SECTIONS),
    "glmga": _in_text(_SECTIONS),
    "glm4v_moe": _in_text(_SECTIONS_HALF),
    "funnel": {"block_sizes": [2, 2, 2], "architectures": []},
    "nemotron": {"head_dim": 8},
    "mistral4": {"head_dim": 16, "qk_nope_head_dim": 8, "qk_head_dim": 16},
    "step3p7": {"text_config.sliding_window": 8},
    "patchtst": {"context_length": 32, "patch_length": 8, "patch_stride": 8, "num_input_channels": 2},
    "patchtsmixer": {"context_length": 32, "patch_length": 8, "patch_stride": 8, "num_input_channels": 2},
    "vits": {"pad_token_id": 0, "vocab_size": 128},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "esm": {"pad_token_id": 1, "mask_token_id": 2},
    "hunyuan_vl_text": _SECTIONS,
    "hunyuan_vl": _in_text(_SECTIONS),
    "moonshine_streaming": {"num_key_value_heads": 4},
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "chameleon": {"vocabulary_map": {"<image>": 120, "IMGIMGA": 121}},
    "emu3": {"vocabulary_map": {"<image>": 120, "<|extra_200|>": 121}},
    "cvt": {"depth": [1, 2, 10]},
    "cohere_compass_text": {"rope_parameters": _SORTS},
    "cohere_compass": {"text_config.rope_parameters": _SORTS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "qwen4_exp_text": {"token_budget": 8, "compress_ratio": 4},
    "qwen4_exp": {"text_config.token_budget": 8, "text_config.compress_ratio": 4},
    "sam2_vision_model": {"backbone_config.hidden_size": 96, "backbone_config.blocks_per_stage": [1, 2, 7, 2]},
    "sam2_hiera_det_model": {"hidden_size": 96, "blocks_per_stage": [1, 2, 7, 2]},
}


def _ids(length: int = 8) -> torch.Tensor:
    return torch.randint(5, 60, (1, length), generator=torch.Generator().manual_seed(0))


def _image(config: Any, size: int | None = None) -> torch.Tensor:
    size = size or getattr(getattr(config, "vision_config", config), "image_size", 32)
    return torch.randn(1, 3, size, size)


def _series(config: Any) -> dict[str, torch.Tensor]:
    past = config.context_length + max(config.lags_sequence)
    return {
        "past_values": torch.randn(1, past),
        "past_time_features": torch.randn(1, past, config.num_time_features),
        "past_observed_mask": torch.ones(1, past),
        "future_values": torch.randn(1, config.prediction_length),
        "future_time_features": torch.randn(1, config.prediction_length, config.num_time_features),
    }


def _patches(config: Any, count: int = 16) -> torch.Tensor:
    return torch.randn(1, count, config.num_channels * config.patch_size**2)


# model type → its inputs, from its configuration
INPUTS: dict[str, Callable[[Any], dict[str, torch.Tensor]]] = {
    "autoformer": _series,
    "informer": _series,
    "time_series_transformer": _series,
    "patchtst": lambda config: {"past_values": torch.randn(1, config.context_length, config.num_input_channels)},
    "patchtsmixer": lambda config: {"past_values": torch.randn(1, config.context_length, config.num_input_channels)},
    "timesfm": lambda config: {
        "past_values": torch.randn(1, config.context_length),
        "past_values_padding": torch.zeros(1, config.context_length, dtype=torch.long),
        "freq": torch.zeros(1, 1, dtype=torch.long),
    },
    "timesfm2_5": lambda config: {
        "past_values": torch.randn(1, config.context_length),
        "past_values_padding": torch.zeros(1, config.context_length, dtype=torch.long),
    },
    "decision_transformer": lambda config: {
        "states": torch.randn(1, 4, config.state_dim),
        "actions": torch.randn(1, 4, config.act_dim),
        "rewards": torch.randn(1, 4, 1),
        "returns_to_go": torch.randn(1, 4, 1),
        "timesteps": torch.arange(4)[None],
        "attention_mask": torch.ones(1, 4),
    },
    "lxmert": lambda config: {
        "input_ids": _ids(),
        "visual_feats": torch.randn(1, 4, config.visual_feat_dim),
        "visual_pos": torch.rand(1, 4, 4),
    },
    "perceiver": lambda config: {"inputs": torch.randn(1, 8, config.d_model)},
    "blip_2_qformer": lambda config: {
        "query_embeds": torch.randn(1, 8, config.hidden_size),
        "encoder_hidden_states": torch.randn(1, 8, config.encoder_hidden_size),
    },
    "siglip": lambda config: {"input_ids": _ids(), "pixel_values": _image(config)},
    "siglip2": lambda config: {
        "input_ids": _ids(),
        "pixel_values": _patches(config.vision_config),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.int32),
        "spatial_shapes": torch.tensor([[4, 4]]),
    },
    "siglip2_vision_model": lambda config: {
        "pixel_values": _patches(config),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.int32),
        "spatial_shapes": torch.tensor([[4, 4]]),
    },
    "seggpt": lambda config: {
        "pixel_values": torch.randn(1, 3, config.image_size[0] // 2, config.image_size[1]),
        "prompt_pixel_values": torch.randn(1, 3, config.image_size[0] // 2, config.image_size[1]),
        "prompt_masks": torch.randn(1, 3, config.image_size[0] // 2, config.image_size[1]),
    },
    "speecht5": lambda config: {
        "input_values": torch.randn(1, 8, config.hidden_size),
        "decoder_input_values": torch.randn(1, 8, config.hidden_size),
    },
    "udop": lambda config: {
        "input_ids": _ids(),
        "bbox": torch.rand(1, 8, 4),
        "decoder_input_ids": _ids(),
    },
    "vilt": lambda config: {"input_ids": _ids(), "pixel_values": _image(config)},
    "bridgetower": lambda config: {
        "input_ids": _ids(),
        "attention_mask": torch.ones(1, 8, dtype=torch.long),
        "pixel_values": _image(config),
    },
    "clvp": lambda config: {"input_ids": _ids(), "input_features": torch.randn(1, 80, 64)},
    "clap": lambda config: {"input_ids": _ids(), "input_features": torch.randn(1, 1, 64, 64)},
    "xclip": lambda config: {
        "input_ids": _ids(),
        "pixel_values": torch.randn(1, config.vision_config.num_frames, 3, *2 * [config.vision_config.image_size]),
    },
    "tvp": lambda config: {
        "input_ids": _ids(),
        "attention_mask": torch.ones(1, 8, dtype=torch.long),
        "pixel_values": torch.randn(1, 1, 3, 448, 448),
    },
    "sam3": lambda config: {"input_ids": _ids(), "pixel_values": torch.randn(1, 3, 64, 64)},
    "idefics": lambda config: {
        "input_ids": _ids(),
        "pixel_values": torch.randn(1, 1, 3, *2 * [config.vision_config.image_size]),
        "image_attention_mask": torch.ones(1, 8, 1, dtype=torch.long),
    },
    "kosmos-2": lambda config: {
        "input_ids": _ids(config.latent_query_num + 8),
        "pixel_values": _image(config),
        "image_embeds_position_mask": (
            torch.arange(config.latent_query_num + 8)[None] < config.latent_query_num
        ).long(),
    },
    "kyutai_speech_to_text": lambda config: {
        "input_ids": torch.randint(5, 60, (1, 8, config.num_codebooks + 1)),
    },
    "granite_speech5_encoder": lambda config: {"input_features": torch.randn(1, 64, 320)},
    "granite_speech5_ctc": lambda config: {"input_features": torch.randn(1, 64, 320)},
    "gemma4_audio": lambda config: {"input_features": torch.randn(1, 64, 128)},
    "gemma4_vision": lambda config: {
        "pixel_values": torch.randn(1, 16, 3 * config.patch_size**2),
        "pixel_position_ids": torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).reshape(
            1, 16, 2
        ),
    },
    "gemma3n_audio": lambda config: {
        "audio_mel": torch.randn(1, 64, 128),
        "audio_mel_mask": torch.zeros(1, 64, dtype=torch.bool),
    },
    "fun_asr_nano_encoder": lambda config: {
        "input_features": torch.randn(1, 16, 560),
        "input_features_mask": torch.ones(1, 16, dtype=torch.long),
    },
    "qwen3_asr_encoder": lambda config: {
        "input_features": torch.randn(1, 128, 100),
        "input_features_mask": torch.ones(1, 100, dtype=torch.long),
    },
    "muse_spark_audio": lambda config: {"input_values": torch.randn(1, 3840)},
    "lightglue": lambda config: {"pixel_values": torch.randn(1, 2, 1, 64, 64)},
    "efficientloftr": lambda config: {"pixel_values": torch.randn(1, 2, 1, 64, 64)},
    "dia": lambda config: {
        "input_ids": _ids(),
        "decoder_input_ids": torch.randint(0, 9, (1, 4, config.decoder_config.num_channels)),
    },
    "instructblip": lambda config: {
        "input_ids": _ids(),
        "qformer_input_ids": _ids(),
        "pixel_values": _image(config),
        "decoder_input_ids": _ids(),
    },
    "neucodec": lambda config: {"input_values": torch.randn(1, 1, 1280), "input_features": torch.randn(1, 4, 160)},
    "xcodec2": lambda config: {"input_values": torch.randn(1, 1, 1280), "input_features": torch.randn(1, 4, 160)},
    "videoprism": lambda config: {"input_ids": _ids(), "pixel_values_videos": torch.randn(1, 16, 3, 32, 32)},
}
