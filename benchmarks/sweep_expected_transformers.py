"""What the definitions of transformers' model types say of their residual structure, in `sweep_transformers`' sizes.

Counted by hand from the library's source, not from what some run gave: two layers where nothing else is said, so four
sums for a stack of attention and MLP, and ten for an encoder and a decoder with cross-attention. A count that is not
named is zero; nested blocks count. The norm is the placement of the majority.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Expected:
    """Counts of one model type, None where nobody went through its definition; `because`: what is unusual.

    `norm`: where most of its norms stand; `onnx`: the counts of the export, where the exporter leaves something out.
    """

    counts: dict[str, int] | None
    norm: str | None = None
    because: str = ""
    onnx: dict[str, int] | None = None


def _of(norm: str | None = None, because: str = "", /, **counts: int) -> Expected:
    return Expected(counts, norm, because)


def _each(expected: Expected, names: str) -> dict[str, Expected]:
    return dict.fromkeys(names.split(), expected)


_STACKS: dict[str, Expected] = {
    # x = N(x + F(x))
    **_each(
        _of("post", identity=4),
        """albert bert bert-generation big_bird bros camembert convbert data2vec-text deberta deberta-v2
        distilbert electra ernie fnet flaubert gte ibert jina_embeddings_v3 layoutlm layoutlmv3 luke
        markuplm mpnet nomic_bert nystromformer openai-gpt rembert roberta roc_bert roformer splinter
        squeezebert tapas visual_bert xlm xlm-roberta xlnet yoso""",
    ),
    # x = x + F(N(x))
    **_each(
        _of("pre", identity=4),
        """aimv2_vision_model apertus arcee aria aria_text audio-spectrogram-transformer beit biogpt bitnet bloom
        chinese_clip_vision_model clip_text_model clip_vision_model cpmant ctrl data2vec-vision decision_transformer
        deepseek_v2 deepseek_v3 deit diffllama dinov2 dinov2_with_registers dinov3_vit ernie4_5 ernie4_5_moe esmc
        eurobert flex_olmo gemma glm gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox_japanese gpt_oss
        granite granitemoe helium hunyuan_v1_dense ijepa imagegpt internlm3 jais2 lfm2 llama llama4_text megatron-bert
        minicpm3 ministral mistral mixtral mlcd modernbert modernbert-decoder mpt nanochat nemotron olmo olmoe opt
        persimmon phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next recurrent_gemma roberta-prelayernorm rwkv
        seed_oss smollm3 stablelm starcoder2 videomae vit vit_mae vit_msn
        vitdet vivit xglm xlm-roberta-xl yolos youtu""",
    ),
    # x = x + N(F(N(x)))
    **_each(_of("sandwich", identity=4), "afmoe gemma2 gemma3_text glm4 "),
    # x = x + N(F(x))
    **_each(_of("branch", identity=4), "exaone4 olmo2 olmo3"),
    # x = x + A(N(x)) + F(N(x))
    **_each(_of("pre", parallel=2), "codegen cohere cohere2 cohere2_moe falcon gpt_neox gptj phi"),
    # encoder and decoder
    **_each(
        _of("post", identity=10),
        "bart blenderbot-small marian mvp plbart prophetnet speecht5 time_series_transformer",
    ),
    **_each(
        _of("pre", identity=10),
        """bigbird_pegasus blenderbot m2m_100 mbart moonshine mt5 nllb-moe pegasus seamless_m4t
        seamless_m4t_v2 speech_to_text switch_transformers t5 udop umt5 whisper""",
    ),
    **_each(_of("sandwich", identity=10), "t5gemma"),
    # text beside images
    **_each(_of("pre", identity=8), "aimv2 clip clipseg owlvit "),
    **_each(_of(identity=8), "altclip blip chinese_clip"),
}

_OTHERS: dict[str, Expected] = {
    # a convolution of the features is added to them as a position encoding
    **_each(_of("post", identity=5), "data2vec-audio hubert unispeech unispeech-sat wav2vec2 wavlm"),
    **_each(_of("post", "the features are pooled beside their convolution", identity=4, pool=1), "sew sew-d"),
    "pegasus_x": Expected(
        {"identity": 14},
        "pre",
        "each encoder layer adds to its global tokens as well; nothing reads those of the last, so an exporter drops "
        "its two sums on them",
        {"identity": 12},
    ),
    "vaultgemma": _of("pre", identity=4),
    "siglip": _of("pre", "an MLP behind the pooling attention", identity=9),
    "siglip2": _of("pre", "an MLP behind the pooling attention", identity=9),
    "siglip_vision_model": Expected(
        {"identity": 5},
        "pre",
        "an MLP behind the pooling attention, which is no part of the last hidden state: an exporter drops it",
        {"identity": 4},
    ),
    "siglip2_vision_model": Expected(
        {"identity": 5},
        "pre",
        "an MLP behind the pooling attention, which is no part of the last hidden state: an exporter drops it",
        {"identity": 4},
    ),
    "mra": _of("post", "without its kernels the attention is zero, so its sums add a constant", identity=2),
    "idefics": _of("pre", "two layers of vision, two of text with gated cross-attention before each", identity=12),
    "patchtst": _of("pre", identity=4),
    "patchtsmixer": _of("pre", "features and patches mixed in each of two layers", identity=4),
    "timesfm": _of("pre", "the input layer has a projection", identity=4, projection=1),
    "doge": _of("pre", "sums with a trained factor for each channel of the stream", identity=4),
    "llava": _of("pre", "text only", identity=4),
    "aya_vision": _of("pre", "text only", parallel=2),
    "cohere2_vision": _of("pre", "text only", parallel=2),
    "beam": _of("sandwich", "three layers", identity=6),
    "lilt": Expected(
        {"identity": 8},
        "post",
        "two streams, of text and of layout; nothing reads the layout behind its last attention, so an exporter drops "
        "the last layer's two sums on it",
        {"identity": 6},
    ),
    "exaone_moe": _of("pre", "three layers, for the first is dense", identity=6),
    "dac": Expected(
        {"identity": 41, "dense": 1},
        "none",
        "three units in each of eight stages; each of nine quantisers subtracts from the rest, and eight are added to "
        "what they go by; the codes' features are a list; the exporter drops the last rest, which nothing reads",
        {"identity": 40, "dense": 1},
    ),
    "detr": Expected(
        {"identity": 22, "projection": 4},
        None,
        "ResNet-50, two layers each; the decoder starts from zeros: an exporter makes constants of 0 + positions and "
        "of the values, so its first sum, 0 + attention, starts no stream",
        {"identity": 21, "projection": 4},
    ),
    "pp_doclayout_v4": Expected(
        None,
        None,
        "the closure A + A² + A³ of the reading order, a parallel block, is no part of the last hidden state: an "
        "exporter drops it",
        {"identity": 12, "projection": 4, "dense": 5, "long": 2, "branches": 12},
    ),
    "vjepa2": Expected(
        {"identity": 8},
        "pre",
        "two layers of the encoder, two of the predictor, which is no part of the last hidden state: an exporter "
        "drops it",
        {"identity": 4},
    ),
    "sam": Expected(
        None,
        None,
        "the decoder adds the points to its tokens before each attention, twice to tokens that did not change in "
        "between: of these equal sums an exporter makes one",
        {"identity": 16},
    ),
    "sam_hq": Expected(
        None,
        None,
        "the decoder adds the points to its tokens before each attention, twice to tokens that did not change in "
        "between: of these equal sums an exporter makes one",
        {"identity": 16},
    ),
    "sam3_tracker": Expected(
        None,
        None,
        "the decoder adds the points to its tokens before each attention, twice to tokens that did not change in "
        "between: of these equal sums an exporter makes one",
        {"identity": 16},
    ),
    "timesformer": Expected(
        {"identity": 2, "view": 4},
        "pre",
        "view: attention over time goes around the tokens behind the class token, attention over space around these "
        "with the class token put back; the exporter merges equal slices, so in ONNX the first fork is the slice",
        {"identity": 4, "view": 2},
    ),
    "xcodec": Expected(
        {"identity": 41, "parallel": 1},
        None,
        "each of eight quantisers subtracts from the rest; the exporter drops the last rest, which nothing reads",
        {"identity": 40, "parallel": 1},
    ),
    "higgs_audio_v2": Expected(
        {"identity": 2},
        None,
        "tokens of text and of sound pass MLPs of their own, selected by masks, and are written back: what is selected "
        "for the MLP is selected once more for the sum, which an exporter merges where the stream is still the same",
        {"identity": 4},
    ),
    **_each(
        _of(
            "inner",
            "four streams, mixed by a matrix that each position makes; two blocks in each of three layers",
            gated=6,
        ),
        "deepseek_v4 glm5_next glm5_next_text",
    ),
    # state spaces: the skip D·x beside the scan is nested in the mixer's branch
    "mamba": _of("pre", identity=4),
    "falcon_mamba": _of("pre", identity=4),
    "jamba": _of("pre", "two layers with mixers, D·x in each", identity=6),
    "bamba": _of("pre", "D·x is padded to whole chunks", identity=4, pad=2),
    "falcon_h1": _of("pre", "attention beside a mixer", identity=2, parallel=2, pad=2),
    "granitemoehybrid": _of("pre", identity=4, pad=2),
    "mamba2": _of("pre", identity=2, pad=2),
    "nemotron_h": _of("pre", "one sum a layer, four sorts of layers", identity=4, pad=1),
    "minimax": _of("post", "α·x + β·F(x)", identity=4),
    "kimi_linear": _of("pre", "three sorts of layers", identity=6),
    "bailing_hybrid": _of("pre", "three sorts of layers", identity=6),
    # conformers: half an MLP, attention, convolution, half an MLP
    "wav2vec2-conformer": _of("pre", identity=8),
    "wav2vec2-bert": _of("pre", identity=8),
    "canary": _of("pre", "a conformer of two layers, a decoder of two", identity=14),
    "cohere_asr": _of("pre", "a conformer of two layers, a decoder of two", identity=14),
    "mobilebert": _of(
        "none",
        "bottlenecks: attention, three stacked MLPs, the MLP, the way out; NoNorm is no norm",
        identity=10,
        projection=2,
    ),
    "perceiver": _of("pre", "cross-attention with an MLP, two self-attentions with one each", identity=6),
    "lxmert": _of("post", "two layers of text, two of images, and two that attend to each other", identity=20),
    "canine": _of(
        "post",
        "four layers in three stacks; dense: characters beside what was made of groups of them",
        identity=8,
        dense=1,
    ),
    "axk2": _of("pre", "dense: queries beside what was made of them, for the gate", identity=4, dense=2),
    # vision in stages
    "convnext": _of("inner", identity=8),
    "convnextv2": _of("inner", identity=8),
    "dinov3_convnext": _of("inner", identity=8),
    "cvt": _of("pre", identity=26),
    "swin": _of("pre", "four stages of two layers", identity=16),
    "swinv2": _of("branch", "four stages of two layers", identity=16),
    "dab-detr": _of(
        None, "the scale of positions that each encoder layer computes is a nested sum", identity=24, projection=4
    ),
    "maskformer": Expected(
        {"identity": 22, "long": 3},
        "pre",
        "Swin, a decoder of two layers, three levels of FPN; the decoder starts from zeros, as DETR's",
        {"identity": 21, "long": 3},
    ),
    "focalnet": _of("pre", identity=16),
    "hiera": _of(
        "pre", "where a stage begins, the shortcut is a linear and a maximum over windows", identity=13, projection=3
    ),
    "levit": _of("branch", "each stage two layers, an MLP behind each of the two shrinking attentions", identity=14),
    "mobilevitv2": _of("pre", identity=19),
    "pvt": _of("pre", identity=16),
    "pvt_v2": _of("pre", identity=16),
    "poolformer": _of("pre", "the mixer's pool(n) - n is nested in the first of each two", identity=24),
    "resnet": _of("branch", identity=4, projection=4),
    "regnet": _of("branch", identity=4, projection=4),
    "segformer": _of("pre", identity=16),
    # detection: ResNet-50 and post-norm stacks
    "deformable_detr": _of(None, identity=22, projection=4),
    "conditional_detr": _of(None, identity=22, projection=4),
    "table-transformer": _of(None, identity=22, projection=4),
    "mask2former": _of(
        "pre", "Swin, a deformable encoder, a decoder of one layer, one level of FPN", identity=23, long=1
    ),
}

EXPECTED: dict[str, Expected] = {**_STACKS, **_OTHERS}
