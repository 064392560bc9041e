"""Networks of other packages, with random weights, for `architectures.py` to judge.

They come from `transformers` (small configurations), `pytorchcv` and `monai`, imported when a network is built. Widths,
heads, layers and tokens of one network are all different numbers, so that a mix-up of two axes is detected.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]  # two samples; a dict: keyword inputs

VOCABULARY, TOKENS = 101, 13


@dataclass(frozen=True, slots=True)
class Network:
    name: str
    source: str  # the package on PyPI
    build: Callable[[], tuple[nn.Module, Inputs]]


def _tokens(**more: int) -> dict[str, Tensor]:
    """Token ids; `more` adds sequences by name and length."""
    return {name: torch.randint(3, VOCABULARY, (2, n)) for name, n in {"input_ids": TOKENS, **more}.items()}


def _padded() -> dict[str, Tensor]:
    """Token ids of which the second sample's last four are padding."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, -4:] = 0
    return {**_tokens(), "attention_mask": mask}


def _pixels(height: int, width: int | None = None, channels: int = 3) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, channels, height, width or height)}


def _transformer(kind: str, inputs: Callable[[], Inputs], **settings: Any) -> Network:
    """A model class of `transformers` on a configuration with `settings`."""

    def build() -> tuple[nn.Module, Inputs]:
        cls = getattr(import_module("transformers"), kind)
        return cls(cls.config_class(**settings)), inputs()

    return Network(kind, "transformers", build)


def _encoder(kind: str, inputs: Callable[[], Inputs] = _padded, **settings: Any) -> Network:
    """BERT and its kin."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "intermediate_size": 144,
        "max_position_embeddings": 31,
        "num_labels": 7,
        "pad_token_id": 0,
    }
    return _transformer(kind, inputs, **{**sizes, **settings})


def _decoder(kind: str, **settings: Any) -> Network:
    """Llama and its kin: grouped queries, 6 heads of 16 on 2 key-value heads."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 144,
        "max_position_embeddings": 31,
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _transformer(kind, _tokens, **{**sizes, **settings})


def _vit(kind: str, **settings: Any) -> Network:
    """ViT and its kin: 36 patches."""
    sizes = {
        "hidden_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "intermediate_size": 144,
        "image_size": 48,
        "patch_size": 8,
        "num_labels": 7,
    }
    return _transformer(kind, partial(_pixels, 48), **{**sizes, **settings})


def _detr(kind: str) -> Network:
    """A detector on a small ResNet of `transformers`' own, which needs no timm."""
    backbone = {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 24, 32, 40],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage4"],
    }

    def build() -> tuple[nn.Module, Inputs]:
        package = import_module("transformers")
        cls = getattr(package, kind)
        config = cls.config_class(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=package.ResNetConfig(**backbone),
            d_model=80,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=5,
            decoder_attention_heads=5,
            encoder_ffn_dim=144,
            decoder_ffn_dim=112,
            num_queries=11,
            num_labels=7,
        )
        return cls(config), _pixels(96, 64)

    return Network(kind, "transformers", build)


_CLIP_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "intermediate_size": 144,
    "max_position_embeddings": 31,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CLIP_VISION = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 176,
    "image_size": 48,
    "patch_size": 8,
}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 80,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 5,
    "decoder_attention_heads": 5,
    "encoder_ffn_dim": 144,
    "decoder_ffn_dim": 112,
    "max_position_embeddings": 31,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_SPEECH = {
    "vocab_size": 31,
    "hidden_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "intermediate_size": 144,
    "conv_dim": [24, 32, 40],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
_EAGER = {"attn_implementation": "eager"}

_TRANSFORMERS = [
    # vision, convolutional
    _transformer(
        "ResNetForImageClassification",
        partial(_pixels, 64),
        embedding_size=16,
        hidden_sizes=[32, 48, 64, 80],
        depths=[1, 2, 2, 1],
        num_labels=7,
    ),
    _transformer("MobileNetV1ForImageClassification", partial(_pixels, 64), depth_multiplier=0.25, num_labels=7),
    _transformer("MobileNetV2ForImageClassification", partial(_pixels, 64), depth_multiplier=0.35, num_labels=7),
    _transformer(
        "ConvNextForImageClassification",
        partial(_pixels, 64),
        hidden_sizes=[16, 24, 40, 64],
        depths=[1, 2, 2, 1],
        num_labels=7,
    ),
    _transformer(
        "ConvNextV2ForImageClassification",
        partial(_pixels, 64),
        hidden_sizes=[16, 24, 40, 64],
        depths=[1, 2, 2, 1],
        num_labels=7,
    ),
    _transformer(
        "EfficientNetForImageClassification",
        partial(_pixels, 64),
        width_coefficient=0.5,
        depth_coefficient=0.5,
        hidden_dim=640,
        image_size=64,
        num_labels=7,
    ),
    _transformer(
        "RegNetForImageClassification",
        partial(_pixels, 64),
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 2, 2, 1],
        groups_width=8,
        num_labels=7,
    ),
    _transformer(
        "BitForImageClassification",
        partial(_pixels, 64),
        embedding_size=32,
        hidden_sizes=[64, 96, 128, 160],
        depths=[1, 1, 2, 1],
        num_groups=8,
        num_labels=7,
    ),
    _transformer(
        "PoolFormerForImageClassification",
        partial(_pixels, 64),
        hidden_sizes=[16, 24, 40, 64],
        depths=[1, 2, 2, 1],
        num_labels=7,
    ),
    # vision, with attention
    _vit("ViTForImageClassification"),
    _vit("DeiTForImageClassificationWithTeacher", **_EAGER),
    _vit("BeitForImageClassification"),
    _vit("Dinov2ForImageClassification", mlp_ratio=2),
    _vit("YolosForObjectDetection", image_size=[48, 64], num_detection_tokens=11),
    _transformer(
        "SwinForImageClassification",
        partial(_pixels, 64),
        image_size=64,
        patch_size=4,
        embed_dim=40,
        depths=[2, 2],
        num_heads=[5, 10],
        window_size=4,
        num_labels=7,
    ),
    _transformer(
        "Swinv2ForImageClassification",
        partial(_pixels, 64),
        image_size=64,
        patch_size=4,
        embed_dim=40,
        depths=[2, 2],
        num_heads=[5, 10],
        window_size=4,
        num_labels=7,
    ),
    _transformer(
        "SegformerForSemanticSegmentation",
        partial(_pixels, 64),
        hidden_sizes=[16, 32, 80, 96],
        depths=[1, 2, 1, 1],
        num_attention_heads=[1, 2, 5, 6],
        decoder_hidden_size=56,
        num_labels=7,
    ),
    _transformer(
        "PvtV2ForImageClassification",
        partial(_pixels, 64),
        image_size=64,
        hidden_sizes=[16, 32, 80, 96],
        depths=[1, 2, 1, 1],
        num_attention_heads=[1, 2, 5, 6],
        num_labels=7,
    ),
    _transformer(
        "MobileViTForImageClassification",
        partial(_pixels, 64),
        image_size=64,
        hidden_sizes=[48, 64, 80],
        neck_hidden_sizes=[8, 16, 24, 32, 40, 56, 160],
        num_labels=7,
    ),
    _transformer(
        "LevitForImageClassification",
        partial(_pixels, 64),
        image_size=64,
        hidden_sizes=[64, 96, 128],
        num_attention_heads=[4, 6, 8],
        depths=[1, 2, 1],
        key_dim=[16, 16, 16],
        num_labels=7,
    ),
    _detr("DetrForObjectDetection"),
    # text
    _encoder("BertForSequenceClassification"),
    _encoder("BertForMaskedLM", **_EAGER),
    _encoder("RobertaForSequenceClassification"),
    _encoder("ElectraForSequenceClassification", embedding_size=48, **_EAGER),
    _encoder("AlbertForSequenceClassification", embedding_size=48),
    _encoder("DebertaForSequenceClassification", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _encoder("DebertaV2ForSequenceClassification", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _encoder("MPNetForSequenceClassification"),
    _encoder("ModernBertForSequenceClassification", cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2),
    _transformer(
        "DistilBertForSequenceClassification",
        _padded,
        vocab_size=VOCABULARY,
        dim=80,
        n_layers=3,
        n_heads=5,
        hidden_dim=144,
        max_position_embeddings=31,
        num_labels=7,
        pad_token_id=0,
    ),
    _transformer(
        "GPT2LMHeadModel",
        _tokens,
        vocab_size=VOCABULARY,
        n_embd=80,
        n_layer=3,
        n_head=5,
        n_inner=144,
        n_positions=31,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
    _encoder("GPTNeoXForCausalLM", _tokens, use_cache=False, bos_token_id=1, eos_token_id=2),
    _transformer(
        "OPTForCausalLM",
        _tokens,
        vocab_size=VOCABULARY,
        hidden_size=80,
        num_hidden_layers=3,
        num_attention_heads=5,
        ffn_dim=144,
        max_position_embeddings=31,
        word_embed_proj_dim=80,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **_EAGER,
    ),
    _decoder("LlamaForCausalLM"),
    _decoder("MistralForCausalLM", **_EAGER),
    _decoder("Qwen2ForCausalLM", num_attention_heads=8, num_key_value_heads=4),
    _decoder("Qwen3ForCausalLM", head_dim=20),
    _decoder("GemmaForCausalLM", head_dim=20),
    _decoder("PhiForCausalLM"),
    _transformer(
        "T5ForConditionalGeneration",
        partial(_tokens, decoder_input_ids=9),
        vocab_size=VOCABULARY,
        d_model=80,
        d_kv=24,
        d_ff=144,
        num_layers=3,
        num_heads=5,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    ),
    _transformer("BartForConditionalGeneration", partial(_tokens, decoder_input_ids=9), **_SEQ2SEQ),
    # sound, and text with images
    _transformer(
        "WhisperForConditionalGeneration",
        lambda: {
            "input_features": torch.randn(2, 24, 44),
            "decoder_input_ids": torch.randint(3, VOCABULARY, (2, 9)),
        },
        **{**_SEQ2SEQ, "num_mel_bins": 24, "max_source_positions": 22, "max_target_positions": 31},
    ),
    _transformer(
        "ASTForAudioClassification",
        lambda: {"input_values": torch.randn(2, 44, 24)},
        hidden_size=80,
        num_hidden_layers=3,
        num_attention_heads=5,
        intermediate_size=144,
        patch_size=8,
        frequency_stride=4,
        time_stride=6,
        max_length=44,
        num_mel_bins=24,
        num_labels=7,
    ),
    _transformer("Wav2Vec2ForCTC", lambda: {"input_values": torch.randn(2, 1600)}, **_SPEECH),
    _transformer("HubertForCTC", lambda: {"input_values": torch.randn(2, 1600)}, **_SPEECH, **_EAGER),
    _transformer(
        "CLIPModel",
        lambda: {**_padded(), **_pixels(48)},
        text_config=_CLIP_TEXT,
        vision_config=_CLIP_VISION,
        projection_dim=56,
    ),
]


def _cv(family: str, kind: str, size: int = 224, **settings: Any) -> Network:
    """A model of `pytorchcv.models.<family>`; 224: those whose last pooling has the kernel of that input size."""

    def build() -> tuple[nn.Module, Inputs]:
        make = getattr(import_module(f"pytorchcv.models.{family}"), kind)  # model_provider would ask for torchvision
        return make(in_size=(size, size), **settings), torch.randn(2, 3, size, size)

    return Network(kind, "pytorchcv", build)


_PYTORCHCV = [
    _cv("alexnet", "alexnet"),
    _cv("vgg", "bn_vgg11"),
    _cv("squeezenet", "squeezenet_v1_1"),
    _cv("squeezenext", "sqnxt23_w1"),
    _cv("bninception", "bninception"),
    _cv("inceptionv3", "inceptionv3", 299),
    _cv("inceptionv4", "inceptionv4", 299),
    _cv("xception", "xception", 299),
    _cv("darknet", "darknet_tiny"),
    _cv("darknet53", "darknet53"),
    # residual
    _cv("resnet", "resnet10"),
    _cv("resnet", "resnetbc14b"),
    _cv("resneta", "resneta10", 64),
    _cv("preresnet", "preresnet10"),
    _cv("preresnet", "preresnetbc14b"),
    _cv("resnext", "resnext14_16x4d"),
    _cv("seresnet", "seresnet10"),
    _cv("sepreresnet", "sepreresnet10"),
    _cv("senet", "senet16"),
    _cv("resnesta", "resnestabc14", 64),
    _cv("sknet", "sknet50"),
    _cv("scnet", "scnet50"),
    _cv("ibnresnet", "ibn_resnet50"),
    _cv("airnet", "airnet50_1x64d_r16"),
    _cv("bamresnet", "bam_resnet18"),
    _cv("cbamresnet", "cbam_resnet18"),
    _cv("resattnet", "resattnet56"),
    _cv("diaresnet", "diaresnet10"),
    _cv("diracnetv2", "diracnet18v2"),
    _cv("sharesnet", "sharesnet18"),
    _cv("octresnet", "octresnet10_ad2"),
    _cv("bagnet", "bagnet9"),
    _cv("drn", "drnd22"),
    _cv("dpn", "dpn68"),
    _cv("dla", "dla34"),
    _cv("dla", "dla46xc"),
    _cv("fishnet", "fishnet99"),
    _cv("hrnet", "hrnet_w18_small_v1"),
    _cv("regnet", "regnetx002", 64),
    _cv("regnet", "regnety002", 64),
    _cv("tresnet", "tresnet_m", 64),
    _cv("revnet", "revnet38"),
    # concatenating
    _cv("densenet_cifar", "densenet40_k12_bc_cifar10", 32),
    _cv("xdensenet_cifar", "xdensenet40_2_k24_bc_cifar10", 32),
    _cv("condensenet", "condensenet74_c4_g4"),
    _cv("peleenet", "peleenet"),
    _cv("vovnet", "vovnet27s"),
    _cv("hardnet", "hardnet39ds"),
    # for telephones
    _cv("mobilenet", "mobilenet_wd4"),
    _cv("mobilenetv2", "mobilenetv2_wd4"),
    _cv("mobilenetv3", "mobilenetv3_small_w7d20"),
    _cv("igcv3", "igcv3_wd4"),
    _cv("ghostnet", "ghostnet"),
    _cv("mnasnet", "mnasnet_a1"),
    _cv("fbnet", "fbnet_cb"),
    _cv("efficientnet", "efficientnet_b0"),
    _cv("mixnet", "mixnet_s"),
    _cv("shufflenet", "shufflenet_g1_w1"),
    _cv("shufflenet", "shufflenet_g3_wd4"),
    _cv("shufflenetv2", "shufflenetv2_wd2"),
    _cv("shufflenetv2b", "shufflenetv2b_wd2"),
    _cv("menet", "menet108_8x1_g3"),
    _cv("channelnet", "channelnet"),
    _cv("espnetv2", "espnetv2_wd2"),
    # CIFAR-10
    _cv("nin_cifar", "nin_cifar10", 32),
    _cv("resnet_cifar", "resnet20_cifar10", 32),
    _cv("wrn_cifar", "wrn16_10_cifar10", 32),
    _cv("pyramidnet_cifar", "pyramidnet110_a48_cifar10", 32),
    _cv("ror_cifar", "ror3_56_cifar10", 32),
    _cv("rir_cifar", "rir_cifar10", 32),
    _cv("shakeshakeresnet_cifar", "shakeshakeresnet20_2x16d_cifar10", 32),
    _cv("fractalnet_cifar", "fractalnet_cifar10", 32),
    _cv("msdnet_cifar10", "msdnet22_cifar10", 32),
    # segmentation, key points, detection
    _cv("fcn8sd", "fcn8sd_resnetd50b_voc", 64),
    _cv("pspnet", "pspnet_resnetd50b_voc", 96),
    _cv("deeplabv3", "deeplabv3_resnetd50b_voc", 64),
    _cv("bisenet", "bisenet_resnet18_celebamaskhq", 64),
    _cv("icnet", "icnet_resnetd50b_cityscapes", 64),
    _cv("fastscnn", "fastscnn_cityscapes", 64),
    _cv("unet", "unet_cityscapes", 64),
    _cv("segnet", "segnet_cityscapes", 64),
    _cv("linknet", "linknet_cityscapes", 64),
    _cv("erfnet", "erfnet_cityscapes", 64),
    _cv("enet", "enet_cityscapes", 64),
    _cv("prnet", "prnet", 64),
    _cv("lwopenpose_cmupan", "lwopenpose2d_mobilenet_cmupan_coco", 64),
    _cv(
        "simplepose_coco", "simplepose_resnet18_coco", 64, return_heatmap=True
    ),  # else the network returns only the positions of the peaks
    _cv("centernet", "centernet_resnet18_voc", 64, return_heatmap=True),
    _cv("lffd", "lffd20x5s320v2_widerface", 128),
]


def _monai(name: str, shape: tuple[int, ...], *args: Any, kind: str = "", **settings: Any) -> Network:
    """A network of `monai.networks.nets` on one random volume or image of `shape` (channels first)."""

    def build() -> tuple[nn.Module, Inputs]:
        return getattr(import_module("monai.networks.nets"), kind or name)(*args, **settings), torch.randn(2, *shape)

    return Network(name, "monai", build)


_VOLUME, _SCAN, _PHOTO = (1, 32, 32, 32), (1, 64, 64), (3, 64, 64)

_MONAI = [
    _monai("UNet", _VOLUME, 3, 1, 2, channels=(8, 16, 32, 64), strides=(2, 2, 2), num_res_units=2),
    _monai("UNet-2d", _SCAN, 2, 1, 3, channels=(8, 16, 32), strides=(2, 2), kind="UNet"),
    _monai("BasicUNet", _VOLUME, 3, 1, 2, features=(8, 8, 16, 32, 64, 8)),
    _monai("BasicUNetPlusPlus", _SCAN, 2, 1, 2, features=(8, 8, 16, 32, 64, 8)),
    _monai("AttentionUnet", _SCAN, 2, 1, 2, channels=(8, 16, 32, 64), strides=(2, 2, 2)),
    _monai(
        "DynUNet",
        _SCAN,
        2,
        1,
        2,
        kernel_size=(3, 3, 3),
        strides=(1, 2, 2),
        upsample_kernel_size=(2, 2),
        filters=(16, 32, 64),
        res_block=True,
    ),
    _monai("FlexibleUNet", _PHOTO, 3, 2, "efficientnet-b0"),
    _monai("SegResNet", _VOLUME, 3, init_filters=8, in_channels=1, out_channels=2),
    _monai("SegResNetDS", _VOLUME, 3, init_filters=8, in_channels=1, out_channels=2),
    _monai("VNet", _VOLUME, 3, 1, 2),
    _monai("HighResNet", _SCAN, 2, 1, 2),
    _monai("DenseNet121", _PHOTO, 2, 3, 5),
    _monai("DenseNet-3d", _VOLUME, 3, 1, 5, init_features=16, growth_rate=8, block_config=(2, 3, 2), kind="DenseNet"),
    _monai("resnet10-3d", _VOLUME, spatial_dims=3, n_input_channels=1, num_classes=5, kind="resnet10"),
    _monai("SEResNet50", _PHOTO, spatial_dims=2, in_channels=3, num_classes=5),
    _monai("EfficientNetBN", _PHOTO, "efficientnet-b0", pretrained=False, num_classes=5),
    _monai("AutoEncoder", _SCAN, 2, 1, 1, channels=(8, 16, 32), strides=(2, 2, 2), num_res_units=1),
    _monai("VoxelMorphUNet", (2, 64, 64), 2, 2, 8, (8, 16, 16, 16, 16, 16), (16, 16, 16, 16, 16, 8)),
    _monai("ViT", (1, 48, 48), 1, 48, 8, 80, 144, 3, 5, classification=True, spatial_dims=2, num_classes=7),
    _monai("UNETR", _VOLUME, 1, 3, 32, 8, hidden_size=80, mlp_dim=144, num_heads=5),
    _monai("SwinUNETR", (1, 64, 64), 1, 3, feature_size=12, spatial_dims=2),
]

NETWORKS = {network.name: network for network in (*_TRANSFORMERS, *_PYTORCHCV, *_MONAI)}
