"""The vision models of a sweep: torchvision and timm, one or a few of each family, the small ones."""

# ruff: noqa: SIM905 (a list of 270 names reads better as words than as 270 lines)
from __future__ import annotations

import dataclasses
import functools
import hashlib
from contextlib import ExitStack
from itertools import zip_longest
from typing import Any
from unittest import mock

from benchmarks.corpus import import_torchvision

_SIDE = 224

# One or more of each family of torchvision; detectors by their backbone, what surrounds it depends on tensor values.
_TORCHVISION = (
    "alexnet convnext_tiny deeplabv3_mobilenet_v3_large deeplabv3_resnet50 densenet121 efficientnet_b0 "
    "efficientnet_v2_s fasterrcnn_mobilenet_v3_large_fpn.backbone fasterrcnn_resnet50_fpn.backbone "
    "fasterrcnn_resnet50_fpn_v2.backbone fcn_resnet50 fcos_resnet50_fpn.backbone googlenet inception_v3 "
    "lraspp_mobilenet_v3_large maxvit_t mc3_18 mnasnet0_5 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small "
    "mvit_v1_b mvit_v2_s r2plus1d_18 r3d_18 raft_small raft_large regnet_x_400mf regnet_y_400mf resnet18 resnet34 "
    "resnet50 resnext50_32x4d retinanet_resnet50_fpn.backbone s3d shufflenet_v2_x0_5 shufflenet_v2_x1_0 squeezenet1_0 "
    "ssd300_vgg16.backbone ssdlite320_mobilenet_v3_large.backbone swin3d_t swin_t swin_v2_t vgg11 vgg11_bn vit_b_32 "
    "wide_resnet50_2"
).split()

# One or more of each module of timm: the smallest of each structure.
_TIMM = (
    "beit_base_patch16_224 beitv2_base_patch16_224 halonet26t botnet26t_256 lambda_resnet26t eca_halonext26ts "
    "haloregnetz_b lamhalobotnet50ts_256 gernet_s repvgg_a0 mobileone_s0 mobileone_s1 regnetz_b16 regnetz_b16_evos "
    "resnext26ts eca_resnext26ts seresnext26ts gcresnext26ts bat_resnext26ts resnet33ts resnet51q resnet50_clip "
    "regnetz_d8 cait_xxs24_224 coat_tiny coat_lite_tiny convit_tiny convmixer_768_32 convnext_atto convnext_zepto_rms "
    "convnext_atto_ols convnextv2_atto test_convnext2 cpubone_nano cpubone_b1_dwnorm crossvit_tiny_240 "
    "crossvit_9_dagger_240 csatv2 cspresnet50 cspresnext50 cspdarknet53 darknet53 darknetaa53 cs3darknet_s "
    "cs3darknet_focus_s cs3sedarknet_l sedarknet21 cs3edgenet_x cspnext_tiny davit_tiny deepseek_vit_412m "
    "deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224 densenet121 densenetblur121d dla34 "
    "dla46_c dla60 dla60_res2net dla60_res2next dpn48b dpn68 edgenext_xx_small edgenext_base efficientformer_l1 "
    "efficientformerv2_s0 mobilenetv2_035 mobilenetv1_100 mnasnet_050 semnasnet_050 mixnet_s tf_mixnet_s tinynet_e "
    "efficientnet_b0 efficientnet_lite0 efficientnet_es efficientnet_em efficientnet_blur_b0 tf_efficientnet_b0 "
    "efficientnet_b0_gn efficientnet_b0_g16_evos efficientnet_cc_b0_4e tf_efficientnetv2_b0 efficientnetv2_rw_t "
    "gc_efficientnetv2_rw_t mobilenet_edgetpu_100 mobilenet_edgetpu_v2_xs fbnetc_100 spnasnet_100 efficientnet_x_b3 "
    "efficientvim_m1 efficientvit_b0 efficientvit_l1 efficientvit_m0 eva02_tiny_patch14_224 "
    "vit_small_patch16_rope_224 vit_tiny_patch16_dinov3_qkvb vit_pe_core_tiny_patch16_384 "
    "vit_small_patch16_rope_mixed_224 fasternet_t0 fastvit_t8 fastvit_sa12 fastvit_mci0 focalnet_tiny_srf "
    "focalnet_tiny_lrf gcvit_xxtiny gemma4_vit_167m ghostnet_050 ghostnetv2_100 ghostnetv3_050 hardcorenas_a "
    "hgnet_tiny hgnetv2_b0 hgnetv2_b4 hiera_tiny_224 hiera_small_abswin_256 sam2_hiera_tiny hieradet_small "
    "hrnet_w18_small hrnet_w18_ssld iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 "
    "lcnetv2_small levit_128s levit_conv_128s levit_256d lowformer_b0 lowformer_e1 mambaout_femto coatnet_pico_rw_224 "
    "coatnet_nano_cc_224 coatnext_nano_rw_224 coatnet_0_224 coatnet_rmlp_nano_rw_224 maxvit_pico_rw_256 "
    "maxvit_rmlp_pico_rw_256 maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256 maxvit_tiny_tf_224 maxvit_tiny_pm_256 "
    "poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18 gmlp_ti16_224 gmixer_12_224 resmlp_12_224 "
    "mixer_s32_224 mobilenetv3_small_050 lcnet_035 mobilenetv4_conv_small mobilenetv4_conv_aa_medium "
    "mobilenetv4_hybrid_medium tf_mobilenetv3_small_minimal_100 fbnetv3_b mobilenetv5_base mobilevit_xxs "
    "mobilevitv2_050 mvitv2_tiny mvitv2_small_cls naflexvit_base_patch16_gap naflexvit_base_patch16_par_gap "
    "nasnetalarge nest_tiny nest_tiny_jx nextvit_small nf_regnet_b0 nf_resnet26 nf_seresnet26 nf_ecaresnet26 "
    "eca_nfnet_l0 dm_nfnet_f0 pit_ti_224 pit_ti_distilled_224 pnasnet5large pvt_v2_b0 pvt_v2_b2_li qwen3_vit_88m "
    "rdnet_tiny regnetx_002 regnety_002 regnetz_005 regnetv_040 repghostnet_050 repvit_m0_9 repvit_m1 "
    "res2net50_26w_4s res2next50 res2net50d resnest14d resnest50d_1s4x24d resnet10t resnet18 resnetblur18 resnet18d "
    "seresnet18 ecaresnext26t_32x4d ecaresnetlight resnet26t resnetaa34d resnext50_32x4d resnet50 resnet50_gn "
    "resnetblur50 resnetaa50d seresnet50 resnetrs50 resnetv2_50 resnetv2_50d resnetv2_50d_gn resnetv2_50x1_bit "
    "resnetv2_50d_evos resnetv2_50d_frn resnetv2_18 rexnet_100 rexnetr_100 selecsls42 selecsls42b legacy_seresnet18 "
    "legacy_seresnext26_32x4d sequencer2d_s shvit_s1 skresnet18 skresnet50 skresnext50_32x4d starnet_s050 "
    "swiftformer_xs swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 "
    "swinv2_cr_tiny_ns_224 tiny_vit_5m_224 tnt_s_patch16_224 tnt_s_legacy_patch16_224 tresnet_m tresnet_v2_l "
    "twins_svt_small twins_pcpvt_small vgg11 vgg11_bn visformer_tiny vit_tiny_patch16_224 "
    "vit_dwee_patch16_reg1_gap_256 vit_dpwee_patch16_reg1_gap_256 vit_pwee_patch16_reg1_gap_256 "
    "vit_small_patch14_dinov2 vit_small_patch16_18x2_224 vit_base_patch16_xp_224 vit_base_patch32_clip_224 test_vit3 "
    "test_vit4 vit_tiny_r_s16_p8_224 vit_small_resnet50d_s16_224 vit_relpos_small_patch16_224 "
    "vit_relpos_small_patch16_rpn_224 vit_srelpos_small_patch16_224 vit_relpos_medium_patch16_cls_224 "
    "samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_dw ese_vovnet19b_slim vovnet39a "
    "eca_vovnet39b ese_vovnet39b legacy_xception xception41 xception41p xception65 xcit_nano_12_p16_224 "
    "xcit_tiny_12_p16_224"
).split()

# Stacks of one block are cut to a few: the structure stays, the weights fit.
_SHORTENED: dict[str, dict[str, Any]] = {
    "deepseek_vit_412m": {"depth": 4},
    "gemma4_vit_167m": {"depth": 4},
}

# Parameters of the largest model whose weights are made, and of the largest for which there is memory.
_LARGEST = 100_000_000
_LARGEST_EMPTY = 1_000_000_000


class _Torchvision:
    def names(self, everything: bool = False) -> list[str]:
        """The list above, or every model but the quantised ones and the detectors, whose backbones are in the list."""
        if not everything:
            return list(_TORCHVISION)
        models = import_torchvision().models
        detectors = set(models.list_models(module=models.detection))
        others = [name for name in models.list_models() if name not in detectors and not name.startswith("quantized_")]
        return sorted({*others, *_TORCHVISION})

    def build(self, name: str) -> tuple[Any, tuple[Any, ...]]:
        """A model, or a part of it after a dot, with images, clips or pairs of images."""
        import torch

        models = import_torchvision().models
        whole, _, part = name.partition(".")
        options: dict[str, Any] = {"weights": None}
        if any(whole in models.list_models(module=library) for library in (models.detection, models.segmentation)):
            options["weights_backbone"] = None
        if whole in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        model = models.get_model(whole, **options)
        module = getattr(model, part) if part else model
        return module.eval(), tuple(torch.randn(shape) for shape in self._shapes(whole, models))

    def _shapes(self, name: str, models: Any) -> list[tuple[int, ...]]:
        if name in models.list_models(module=models.optical_flow):
            return [(1, 3, 128, 128)] * 2
        if name in models.list_models(module=models.video):
            side = 112 if "18" in name else _SIDE
            return [(1, 3, 16, side, side)]
        side = {"inception_v3": 299, "ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}.get(name, _SIDE)
        return [(1, 3, side, side)]


class _Timm:
    def names(self, everything: bool = False) -> list[str]:
        """The list above; then, of `everything`, the others, one of each module after the other."""
        if not everything:
            return list(_TIMM)
        import_torchvision()
        import timm

        listed = set(_TIMM)
        by_module = [
            [name for name in timm.list_models(module=module) if name not in listed] for module in timm.list_modules()
        ]
        rounds = zip_longest(*by_module)
        return [*_TIMM, *dict.fromkeys(name for turn in rounds for name in turn if name is not None)]

    def build(self, name: str) -> tuple[Any, tuple[Any, ...]]:
        """A model with an image of the size that it is made for.

        A large one's weights have no values, a very large one's no memory either: it is on the device "meta".
        """
        import torch

        import_torchvision()
        import timm

        options = _SHORTENED.get(name, {})
        with torch.device("meta"):
            model = timm.create_model(name, **options)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if parameters <= _LARGEST:
            model = timm.create_model(name, **options)
        elif parameters <= _LARGEST_EMPTY:
            model = model.to_empty(device="cpu")
        channels, height, width = model.pretrained_cfg.get("input_size", (3, _SIDE, _SIDE))
        device = next(model.parameters()).device
        return model.eval(), (torch.randn(1, channels, height, width, device=device),)

    def structure(self, name: str) -> str:
        """A digest of what the library would build the model from, but for numbers: widths, depths, kernels."""
        import_torchvision()
        import timm.models

        with mock.patch.multiple(timm.models._builder, build_model_with_cfg=_told):
            patched = [module for module in vars(timm.models).values() if hasattr(module, "build_model_with_cfg")]
            with ExitStack() as stack:
                for module in patched:
                    stack.enter_context(mock.patch.object(module, "build_model_with_cfg", _told))
                built: Any = timm.models.model_entrypoint(name)()
        return built if isinstance(built, str) else ""


def _told(model_cls: Any, variant: str, pretrained: bool, *args: Any, **kwargs: Any) -> str:
    """In place of a model: what it was to be built from."""
    outline = repr((model_cls.__name__, _outline(args), _outline(kwargs)))
    return hashlib.sha1(outline.encode()).hexdigest()[:16]


_NAMES = ("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_filter_fn", "feature_cfg", "img_size", "window_size")


def _outline(value: Any) -> Any:
    """A setting without its numbers; of a sequence each sort of entry once."""
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int | float):
        return "one" if value == 1 else "none" if value == 0 else "some"
    if isinstance(value, dict):
        return {key: _outline(entry) for key, entry in sorted(value.items()) if key not in _NAMES}
    if dataclasses.is_dataclass(value):
        return _outline(vars(value))
    if isinstance(value, list | tuple):
        return sorted({repr(_outline(entry)) for entry in value})
    if isinstance(value, functools.partial):
        return _outline((value.func, value.keywords))
    return getattr(value, "__qualname__", type(value).__qualname__)


TORCHVISION = _Torchvision()
TIMM = _Timm()
