"""What the definitions of architectures say of their residual structure: counts that detection has to reach.

Counted by hand from the library's source, not from what some run gave. Keys are those of the vocabulary: `identity`,
`projection`, `pad`, `pool`, `view` are blocks of kind `add` by their shortcut, the others kinds. A count that is not
named is zero. Nested blocks count.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.sweep_expected_transformers import EXPECTED as TRANSFORMERS


@dataclass(frozen=True)
class Expected:
    """Counts of one model, None where nobody went through its definition; `because`: why, or how.

    `onnx`: the counts of the export, where the exporter loses something.
    """

    counts: dict[str, int] | None
    onnx: dict[str, int] | None = None
    because: str = ""


def _of(because: str = "", onnx: dict[str, int] | None = None, /, **counts: int) -> Expected:
    return Expected(counts, onnx, because)


def _staged(*depths: int) -> Expected:
    """Stages of residual blocks, each of which begins with a projection."""
    return _of(identity=sum(depths) - len(depths), projection=len(depths))


_RESNET_18 = _of(identity=5, projection=3)
_RESNET_26 = _staged(2, 2, 2, 2)
_RESNET_50 = _staged(3, 4, 6, 3)
_PART = "dense: a concatenation of a part of the fork, left as it is, with what was made of another part"
_POOLING = "the mixer's pool(n) − n is a sum with the normalised fork: a block nested in the first of each two"
_SEPARABLE = (
    "where channels or extent change, the shortcut is a depthwise and a pointwise convolution without activation"
)

_TIMM: dict[str, Expected] = {
    # transformers of two sums a layer
    **dict.fromkeys(
        (
            "beit_base_patch16_224",
            "beitv2_base_patch16_224",
            "convit_tiny",
            "deit_tiny_patch16_224",
            "deit_tiny_distilled_patch16_224",
            "deit3_small_patch16_224",
            "eva02_tiny_patch14_224",
            "vit_small_patch16_rope_224",
            "vit_small_patch16_rope_mixed_224",
            "vit_tiny_patch16_dinov3_qkvb",
            "vit_tiny_patch16_224",
            "vit_small_patch14_dinov2",
            "vit_base_patch32_clip_224",
            "vit_tiny_r_s16_p8_224",
            "vit_relpos_small_patch16_224",
            "vit_relpos_small_patch16_rpn_224",
            "vit_srelpos_small_patch16_224",
            "vit_relpos_medium_patch16_cls_224",
            "samvit_base_patch16_224",
            "naflexvit_base_patch16_gap",
            "naflexvit_base_patch16_par_gap",
            "qwen3_vit_88m",
            "pit_ti_224",
            "pit_ti_distilled_224",
            "nest_tiny",
            "nest_tiny_jx",
            "focalnet_tiny_srf",
            "focalnet_tiny_lrf",
            "swin_tiny_patch4_window7_224",
            "swin_s3_tiny_224",
            "swinv2_tiny_window8_256",
            "swinv2_cr_tiny_224",
            "swinv2_cr_tiny_ns_224",
            "gmixer_12_224",
            "resmlp_12_224",
        ),
        _of(identity=24),
    ),
    "deepseek_vit_412m": _of(identity=8),
    "gemma4_vit_167m": _of(identity=8),
    "vit_pe_core_tiny_patch16_384": _of("the attention pool's x + mlp(norm(x)) besides 24", identity=25),
    "test_vit3": _of("the attention pool's x + mlp(norm(x)) besides 18", identity=19),
    "test_vit4": _of(identity=18),
    "vit_dwee_patch16_reg1_gap_256": _of(identity=28),
    "vit_dpwee_patch16_reg1_gap_256": _of("attention and MLP leave through one linear: one branch", identity=16),
    "vit_pwee_patch16_reg1_gap_256": _of("parallel: attention and MLP of one linear's parts", parallel=16),
    "vit_base_patch16_xp_224": _of("parallel: attention and MLP of one linear's parts", parallel=12),
    "vit_small_patch16_18x2_224": _of("18 layers of two attentions side by side, then two MLPs", parallel=36),
    "vit_small_resnet50d_s16_224": _of("three stages of ResNet-50 under 8 layers", identity=26, projection=3),
    "cait_xxs24_224": _of(identity=52),
    "mixer_s32_224": _of(identity=16),
    "gmlp_ti16_224": _of(identity=30),
    "pvt_v2_b0": _of(identity=16),
    "pvt_v2_b2_li": _of(identity=32),
    "twins_svt_small": _of("18 layers of two, and four position-encoding convolutions x + conv(x)", identity=40),
    "twins_pcpvt_small": _of("16 layers of two, and four position-encoding convolutions x + conv(x)", identity=36),
    "nasnetalarge": Expected(
        None,
        {"identity": 18, "pool": 4, "projection": 2, "dense": 18},
        "each of 18 normal cells adds two average pools of one value, branches that are merged where an exporter makes "
        "one of the two: what is left is x + x",
    ),
    "mvitv2_small_cls": _of(
        "the shortcuts that change the stage pool the tokens behind the class token", identity=45, projection=3
    ),
    "coat_tiny": _of(
        "24 as in coat_lite_tiny; 6 blocks of three streams, each with a position encoding, attention and MLP",
        identity=78,
    ),
    "davit_tiny": _of("12 blocks of x + conv(x), attention, x + conv(x), MLP", identity=48),
    "coat_lite_tiny": _of(
        "8 layers of two, and before each the position-encoding convolution x + conv(x)", identity=24
    ),
    "crossvit_tiny_240": _of("view: the class token alone is the skip of a cross-attention", identity=30, view=6),
    "crossvit_9_dagger_240": _of("view: the class token alone is the skip of a cross-attention", identity=24, view=6),
    "volo_d1_224": _of("view: the class token alone is the skip of class attention", identity=38, view=2),
    "xcit_nano_12_p16_224": _of("12 layers of three, 2 of class attention", identity=40),
    "xcit_tiny_12_p16_224": _of("12 layers of three, 2 of class attention", identity=40),
    "visformer_tiny": _of("7 layers without attention, 8 with", identity=23),
    "gcvit_xxtiny": _of("12 layers of two, 11 fused MBConv", identity=35),
    "tiny_vit_5m_224": _of("10 layers of two, 2 MBConv", identity=22),
    "sequencer2d_s": _of(identity=18, recurrent=18),
    "mvitv2_tiny": _of(
        "the attention's residual pooling, pool(q) + attn(q, k, v), is nested", identity=27, projection=3
    ),
    "hiera_tiny_224": _of(
        "where the stage changes, the shortcut is a linear and a max pool", identity=21, projection=3
    ),
    "hiera_small_abswin_256": _of(
        "where the stage changes, the shortcut is [max, mean] of a window", identity=29, pool=3
    ),
    "sam2_hiera_tiny": _of(
        "where the stage changes, the shortcut is a linear and a max pool", identity=21, projection=3
    ),
    "hieradet_small": _of(
        "where the stage changes, the shortcut is a linear and a max pool", identity=29, projection=3
    ),
    "swiftformer_xs": _of(
        "12 encoders, 4 blocks of three, the attention's own x + proj(x·g); branches: the mean of two heads",
        identity=28,
        branches=1,
    ),
    "poolformer_s12": _of(_POOLING, identity=36),
    "poolformerv2_s12": _of(_POOLING, identity=36),
    "csatv2": _of(identity=68),
    "cpubone_nano": _of("long: attention at half the resolution, brought back", identity=8, long=1),
    "cpubone_b1_dwnorm": _of("long: attention at half the resolution, brought back", identity=25, long=5),
    "lowformer_e1": _of(identity=8),
    "caformer_s18": _of(identity=36),
    "convformer_s18": _of(identity=36),
    "efficientformer_l1": _of(
        "x + γ·(pool(x) − x) is one block; branches: the mean of two linear heads", identity=30, branches=1
    ),
    "efficientformerv2_s0": _of(
        "long: attention at half the resolution, brought back; projection: beside the strided attention a convolution, "
        "and inside it one of the values; branches: its query, of a convolution and a pool, and the mean of two heads",
        identity=16,
        long=2,
        projection=2,
        branches=2,
    ),
    "nextvit_small": _of("dense: [x, P(x)] between the two halves of a transformer block", identity=44, dense=4),
    "edgenext_xx_small": _of(
        "split attention: hierarchical sums with a view shortcut, and a part left as it is",
        identity=15,
        view=3,
        dense=3,
    ),
    "edgenext_base": _of(
        "split attention: hierarchical sums with a view shortcut, and a part left as it is",
        identity=21,
        view=3,
        dense=3,
    ),
    "levit_128s": _of("branches: the mean of two linear heads", identity=20, branches=1),
    "levit_conv_128s": _of("branches: the mean of two linear heads", identity=20, branches=1),
    "levit_256d": _of(identity=38),
    "vitamin_small_224": _of(identity=32, pool=1, projection=1),
    "efficientvit_m0": _of(
        "view: each head adds the head before to its part of the channels; dense: heads beside those made from them",
        identity=38,
        view=18,
        dense=6,
    ),
    "efficientvit_b0": _of("dense: the queries beside their aggregation", identity=11, dense=4),
    "efficientvit_l1": _of("dense: the queries beside their aggregation", identity=21, dense=6),
    "efficientvim_m1": _of(
        "(1 − α)·x + α·F(x) with a trained constant α, four a block, and two sums in each of two mergings", identity=28
    ),
    # convolution and attention: avg pool with or without a 1×1 where the stage changes
    "coatnet_pico_rw_224": _of(identity=15, pool=1, projection=3),
    "coatnet_nano_cc_224": _of(identity=19, pool=1, projection=3),
    "coatnext_nano_rw_224": _of(identity=21, pool=1, projection=3),
    "coatnet_0_224": _of(identity=15, projection=4),
    "coatnet_rmlp_nano_rw_224": _of(identity=21, pool=1, projection=3),
    "maxvit_pico_rw_256": _of(identity=51, pool=1, projection=3),
    "maxvit_rmlp_pico_rw_256": _of(identity=51, pool=1, projection=3),
    "maxxvit_rmlp_nano_rw_256": _of(identity=31, pool=1, projection=3),
    "maxxvitv2_nano_rw_256": _of(identity=17, pool=1, projection=3),
    "maxvit_tiny_tf_224": _of(identity=51, pool=1, projection=3),
    "maxvit_tiny_pm_256": _of(identity=40, pool=1, projection=3),
    # ResNets
    **dict.fromkeys(
        ("resnet18", "resnet18d", "resnetblur18", "seresnet18", "resnetv2_18", "legacy_seresnet18", "skresnet18"),
        _RESNET_18,
    ),
    **dict.fromkeys(
        (
            "resnet26t",
            "ecaresnext26t_32x4d",
            "resnext26ts",
            "eca_resnext26ts",
            "seresnext26ts",
            "legacy_seresnext26_32x4d",
            "lambda_resnet26t",
            "nf_resnet26",
            "nf_seresnet26",
            "nf_ecaresnet26",
        ),
        _RESNET_26,
    ),
    **dict.fromkeys(
        (
            "resnet50",
            "resnet50_gn",
            "resnet50_clip",
            "resnetblur50",
            "resnetaa50d",
            "seresnet50",
            "resnetrs50",
            "ecaresnetlight",
            "resnext50_32x4d",
            "resnetv2_50",
            "resnetv2_50d",
            "resnetv2_50d_gn",
            "resnetv2_50x1_bit",
            "resnetv2_50d_evos",
            "resnetv2_50d_frn",
            "resnest50d_1s4x24d",
            "skresnet50",
            "skresnext50_32x4d",
        ),
        _RESNET_50,
    ),
    "resnet10t": _of(identity=1, projection=3),
    "resnest14d": _staged(1, 1, 1, 1),
    "resnetaa34d": _of(identity=13, projection=3),
    "resnet33ts": _staged(2, 3, 3, 2),
    "resnet51q": _staged(2, 4, 6, 4),
    "halonet26t": _of(identity=4, projection=4),
    "botnet26t_256": _of(identity=4, projection=4),
    "eca_halonext26ts": _of(identity=4, projection=4),
    "haloregnetz_b": _of(identity=18),
    "lamhalobotnet50ts_256": _of(identity=12, projection=4),
    "gcresnext26ts": _of("the global context is added to every position: 8 nested", identity=12, projection=4),
    "bat_resnext26ts": _of("the bilinear attention's own sum: 8 nested", identity=12, projection=4),
    "gernet_s": _staged(1, 3, 7, 2, 1),
    "tresnet_m": _of(identity=18, projection=3),
    "tresnet_v2_l": _of(identity=29, projection=4),
    "nf_regnet_b0": _of(identity=12, projection=4),
    "eca_nfnet_l0": _of(identity=8, projection=4),
    "dm_nfnet_f0": _of(identity=8, projection=4),
    "regnetx_002": _of(identity=9, projection=4),
    "regnety_002": _of(identity=9, projection=4),
    "regnetz_005": _of("without a shortcut where the stage changes", identity=17),
    "regnetz_b16": _of("without a shortcut where the stage changes", identity=18),
    "regnetz_b16_evos": _of("without a shortcut where the stage changes", identity=18),
    "regnetz_d8": _of("without a shortcut where the stage changes", identity=21),
    "regnetv_040": _of(identity=18, projection=4),
    # convolutions
    "convmixer_768_32": _of(identity=32),
    "convnext_atto": _of(identity=12),
    "convnext_zepto_rms": _of(identity=10),
    "convnext_atto_ols": _of(identity=12),
    "convnextv2_atto": _of(identity=12),
    "test_convnext2": _of(identity=4),
    "inception_next_atto": _of(_PART, identity=12, dense=12),
    "fasternet_t0": _of(_PART, identity=13, dense=13),
    "mambaout_femto": _of(_PART, identity=18, dense=18),
    "shvit_s1": _of(_PART, identity=39, dense=9),
    "starnet_s050": _of(identity=6),
    "inception_v3": _of(),
    "inception_v4": _of(),
    "inception_resnet_v2": _of(identity=40),
    "legacy_xception": _of(identity=8, projection=4),
    "xception41": _of("the last module has no shortcut", identity=8, projection=4),
    "xception41p": _of("the last module has no shortcut", identity=8, projection=4),
    "xception65": _of("the last module has no shortcut", identity=16, projection=4),
    "vgg11": _of(),
    "vgg11_bn": _of(),
    "darknet53": _of(identity=23),
    "darknetaa53": _of(identity=23),
    "sedarknet21": _of(identity=7),
    "cspresnet50": _of(_PART, identity=13, dense=4),
    "cspresnext50": _of(_PART, identity=13, dense=4),
    "cspdarknet53": _of(_PART, identity=23, dense=5),
    "cs3darknet_s": _of(_PART, identity=9, dense=4),
    "cs3darknet_focus_s": _of(_PART, identity=9, dense=4),
    "cs3sedarknet_l": _of(_PART, identity=21, dense=4),
    "cs3edgenet_x": _of(_PART, identity=24, dense=4),
    "cspnext_tiny": _of(
        "the last stage's block has no shortcut; dense: the pyramid of pools beside its input", identity=3, dense=1
    ),
    "dla34": _of(
        "12 blocks, 4 begin a wider level; dense: a root for each of 6 trees", identity=8, projection=4, dense=6
    ),
    "dla46_c": _of(
        "as dla34; a level of the same width begins with the pool alone", identity=8, projection=3, pool=1, dense=6
    ),
    "dla60": _of("16 blocks in 8 trees", identity=12, projection=4, dense=8),
    "dla60_res2net": _of(
        "8 roots, and 12 blocks that leave a part as it is", identity=12, projection=4, view=24, dense=20
    ),
    "dla60_res2next": _of(
        "8 roots, and 12 blocks that leave a part as it is", identity=12, projection=4, view=24, dense=20
    ),
    "dpn48b": _of(
        "16 dual paths: a sum in some channels, a concatenation of the others", projection=4, view=12, dense=12
    ),
    "dpn68": _of(
        "22 dual paths: a sum in some channels, a concatenation of the others", projection=4, view=18, dense=18
    ),
    "hrnet_w18_small": _of(
        "branches: streams of 2, 3 and 4 resolutions, fused at each; three sums in the head",
        identity=18,
        projection=5,
        branches=12,
    ),
    "hrnet_w18_ssld": _of(
        "branches: streams of 2, 3 and 4 resolutions, fused at each; three sums in the head",
        identity=107,
        projection=5,
        branches=29,
    ),
    "iformer_t": _of(identity=26),
    "lcnetv2_small": _of("6 depthwise layers of several kernels", identity=1, branches=6),
    "mobilenetv5_base": _of("long: the last two stages, brought to one size and concatenated", identity=35, long=1),
    "densenet121": _of(dense=58),
    "densenetblur121d": _of(dense=58),
    "rdnet_tiny": _of("seven stages of three layers", dense=21),
    "ese_vovnet19b_dw": _of("dense: one-shot aggregation, a concatenation a module", dense=4),
    "ese_vovnet19b_slim": _of("dense: one-shot aggregation, a concatenation a module", dense=4),
    "vovnet39a": _of("dense: one-shot aggregation, a concatenation a module", dense=6),
    "eca_vovnet39b": _of("dense: one-shot aggregation, a concatenation a module", identity=2, dense=6),
    "ese_vovnet39b": _of("dense: one-shot aggregation, a concatenation a module", identity=2, dense=6),
    "hgnet_tiny": _of("dense: one-shot aggregation, a concatenation a module", identity=1, dense=5),
    "hgnetv2_b0": _of("dense: one-shot aggregation, a concatenation a module", identity=1, dense=5),
    "hgnetv2_b4": _of("dense: one-shot aggregation, a concatenation a module", identity=2, dense=6),
    "selecsls42": _of("dense: [d1, d2(d1), d3(d2), ...]", dense=6),
    "selecsls42b": _of("dense: [d1, d2(d1), d3(d2), ...]", dense=6),
    "res2net50_26w_4s": _of(
        "hierarchical sums with a view shortcut; the last part of the channels is left as it is where the stride is 1",
        identity=12,
        projection=4,
        view=24,
        dense=12,
    ),
    "res2net50d": _of(identity=12, projection=4, view=24, dense=12),
    "res2next50": _of(identity=12, projection=4, view=24, dense=12),
    "rexnet_100": _of(view=11),
    "rexnetr_100": _of(view=11),
    # mobile networks: an identity wherever neither channels nor extent change
    **{
        name: _of(identity=count)
        for name, count in {
            "mobilenetv2_035": 10,
            "mobilenetv1_100": 0,
            "mnasnet_050": 10,
            "semnasnet_050": 9,
            "mixnet_s": 11,
            "tf_mixnet_s": 11,
            "tinynet_e": 3,
            "efficientnet_b0": 9,
            "efficientnet_lite0": 9,
            "efficientnet_es": 12,
            "efficientnet_em": 17,
            "efficientnet_blur_b0": 9,
            "tf_efficientnet_b0": 9,
            "efficientnet_b0_gn": 9,
            "efficientnet_b0_g16_evos": 9,
            "efficientnet_cc_b0_4e": 9,
            "tf_efficientnetv2_b0": 15,
            "efficientnetv2_rw_t": 34,
            "gc_efficientnetv2_rw_t": 34,
            "mobilenet_edgetpu_100": 15,
            "mobilenet_edgetpu_v2_xs": 13,
            "fbnetc_100": 15,
            "spnasnet_100": 14,
            "efficientnet_x_b3": 19,
            "hardcorenas_a": 5,
            "mobilenetv3_small_050": 7,
            "tf_mobilenetv3_small_minimal_100": 6,
            "lcnet_035": 0,
            "mobilenetv4_conv_small": 10,
            "mobilenetv4_conv_aa_medium": 18,
            "mobilenetv4_hybrid_medium": 27,
            "fbnetv3_b": 23,
            "mobilevitv2_050": 19,
        }.items()
    },
    "mobilevit_xxs": _of("dense: a block's input beside what its transformer made of it", identity=21, dense=3),
    "ghostnet_050": _of(_SEPARABLE + "; dense: features beside their cheap maps", identity=11, projection=5, dense=32),
    "ghostnetv3_050": _of(
        _SEPARABLE + "; branches: two sums of convolutions in each of 32 modules, one in each of four strided blocks",
        identity=11,
        projection=5,
        dense=32,
        branches=68,
    ),
    "ghostnetv2_100": _of(
        _SEPARABLE + "; dense: features beside their cheap maps", identity=11, projection=5, dense=32
    ),
    # re-parameterisable networks in training form
    "repvgg_a0": _of(branches=22),
    "mobileone_s0": _of(branches=43),
    "mobileone_s1": _of("four pointwise layers have one branch only", branches=39),
    "fastvit_t8": _of(
        "10 mixers of two; branches: 10 mixers, 3 in the stem, 2 in each of 3 embeddings, the last layer",
        identity=20,
        branches=20,
    ),
    "fastvit_sa12": _of(
        "10 mixers of two, 2 layers of attention, a position encoding; branches as in fastvit_t8",
        identity=25,
        branches=20,
    ),
    "fastvit_mci0": _of(
        "18 mixers of two, 2 layers of attention, a position encoding; branches as in fastvit_t8",
        identity=41,
        branches=28,
    ),
    "repvit_m0_9": _of(
        "x + c3(x) + c1(x): branches inside a block, 23 times; 26 MLPs; the mean of two linear heads",
        identity=49,
        branches=24,
    ),
    "repvit_m1": _of(
        "x + c3(x) + c1(x): branches inside a block, 23 times; 26 MLPs; the mean of two linear heads",
        identity=49,
        branches=24,
    ),
    "repghostnet_050": _of(_SEPARABLE, identity=11, projection=5, branches=32),
}

# maxvit_t: 2, 2, 5, 2 layers, in each an MBConv (a stage's first with avg pool and 1×1) and twice attention and MLP.
_FLOW = (
    "two encoders of six blocks; twelve refinements: gated: the state; identity: the coordinates, which start from a "
    "grid; dense: the flow beside features of it, the state beside what was made of it, from the second refinement on"
)

_TORCHVISION: dict[str, Expected] = {
    "raft_small": _of(_FLOW, identity=19, projection=4, gated=12, dense=22),
    "raft_large": _of(
        _FLOW + "; two gated steps, along rows and columns", identity=19, projection=4, gated=24, dense=22
    ),
    "alexnet": _of(),
    "vgg11": _of(),
    "vgg11_bn": _of(),
    "googlenet": _of(),
    "inception_v3": _of(),
    "squeezenet1_0": _of(),
    "resnet18": _RESNET_18,
    "resnet34": _of(identity=13, projection=3),
    "resnet50": _RESNET_50,
    "resnext50_32x4d": _RESNET_50,
    "wide_resnet50_2": _RESNET_50,
    "densenet121": _of(dense=58),
    "mobilenet_v2": _of(identity=10),
    "mobilenet_v3_large": _of(identity=10),
    "mobilenet_v3_small": _of(identity=6),
    "mnasnet0_5": _of(identity=10),
    "efficientnet_b0": _of(identity=9),
    "efficientnet_v2_s": _of("sum of repeats (2, 4, 4, 6, 9, 15) less the five that begin a wider stage", identity=35),
    "shufflenet_v2_x0_5": _of(dense=13),
    "shufflenet_v2_x1_0": _of(dense=13),
    "convnext_tiny": _of(identity=18),
    "swin_t": _of(identity=24),
    "swin_v2_t": _of(identity=24),
    "swin3d_t": _of(identity=24),
    "vit_b_32": _of(identity=24),
    "regnet_x_400mf": _staged(1, 2, 7, 12),
    "regnet_y_400mf": _staged(1, 3, 6, 6),
    "maxvit_t": _of(identity=51, projection=4),
    "mvit_v2_s": _of(
        "view: the attention's residual pooling of the tokens behind the class token; the exporter merges equal "
        "slices, so in ONNX the fork is the slice itself",
        {"identity": 45, "projection": 3},
        identity=29,
        projection=3,
        view=16,
    ),
    "r3d_18": _RESNET_18,
    "mc3_18": _RESNET_18,
    "r2plus1d_18": _RESNET_18,
    "s3d": _of(),
    "ssdlite320_mobilenet_v3_large.backbone": _of(identity=10),
    "fcn_resnet50": _RESNET_50,
    "deeplabv3_resnet50": _RESNET_50,
    "deeplabv3_mobilenet_v3_large": _of(identity=10),
    "lraspp_mobilenet_v3_large": _of(identity=10, long=1),
    "fasterrcnn_resnet50_fpn.backbone": _of(identity=12, projection=4, long=3),
    "fasterrcnn_resnet50_fpn_v2.backbone": _of(identity=12, projection=4, long=3),
    "fcos_resnet50_fpn.backbone": _of("the pyramid has three levels", identity=12, projection=4, long=2),
    "retinanet_resnet50_fpn.backbone": _of("the pyramid has three levels", identity=12, projection=4, long=2),
    "fasterrcnn_mobilenet_v3_large_fpn.backbone": _of(
        "the two levels have one size: their sum is no long skip but one with a projection", identity=10, projection=1
    ),
    "ssd300_vgg16.backbone": _of(),
}

EXPECTED: dict[str, Expected] = {
    **{f"timm:{name}": expected for name, expected in _TIMM.items()},
    **{f"torchvision:{name}": expected for name, expected in _TORCHVISION.items()},
    **{
        f"transformers:{name}": Expected(entry.counts, entry.onnx, entry.because)
        for name, entry in TRANSFORMERS.items()
    },
}
