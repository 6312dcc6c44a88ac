"""Short names for the backbones people use most.

A table and nothing else: listing it, and completing names on the command line, must not import
torch. Channels, stride and parameters are those of the default layer; the tests compare them with
the models.
"""

from __future__ import annotations

from typing import NamedTuple


class Alias(NamedTuple):
    """One row: what the short name stands for."""

    tag: str  # timm's full name: architecture.tag
    description: str
    params: float  # millions, without classifier
    channels: int
    stride: int  # pixels per feature cell

    @property
    def repository(self) -> str:
        """Hub repository of the weights. OpenAI's are the same files for both activations."""
        return f"timm/{self.tag.replace('_quickgelu', '')}"

    @property
    def download_bytes(self) -> int:
        """Size of the download in bytes, about: float32 parameters."""
        return int(self.params * 4e6)


# fmt: off
ALIASES: dict[str, Alias] = {
    "dinov2-s": Alias("vit_small_patch14_dinov2.lvd142m", "DINOv2 ViT-S/14", 22.1, 384, 14),
    "dinov2-b": Alias("vit_base_patch14_dinov2.lvd142m", "DINOv2 ViT-B/14", 86.6, 768, 14),
    "dinov2-l": Alias("vit_large_patch14_dinov2.lvd142m", "DINOv2 ViT-L/14", 304.4, 1024, 14),
    "dinov2-g": Alias("vit_giant_patch14_dinov2.lvd142m", "DINOv2 ViT-g/14", 1136.5, 1536, 14),
    "dinov2-s-reg": Alias(
        "vit_small_patch14_reg4_dinov2.lvd142m", "DINOv2 ViT-S/14 with registers", 22.1, 384, 14
    ),
    "dinov2-b-reg": Alias(
        "vit_base_patch14_reg4_dinov2.lvd142m", "DINOv2 ViT-B/14 with registers", 86.6, 768, 14
    ),
    "dinov2-l-reg": Alias(
        "vit_large_patch14_reg4_dinov2.lvd142m", "DINOv2 ViT-L/14 with registers", 304.4, 1024, 14
    ),
    "dinov2-g-reg": Alias(
        "vit_giant_patch14_reg4_dinov2.lvd142m", "DINOv2 ViT-g/14 with registers", 1136.5, 1536, 14
    ),
    "dinov3-s": Alias("vit_small_patch16_dinov3.lvd1689m", "DINOv3 ViT-S/16", 21.6, 384, 16),
    "dinov3-s-plus": Alias(
        "vit_small_plus_patch16_dinov3.lvd1689m", "DINOv3 ViT-S+/16", 28.7, 384, 16
    ),
    "dinov3-b": Alias("vit_base_patch16_dinov3.lvd1689m", "DINOv3 ViT-B/16", 85.6, 768, 16),
    "dinov3-l": Alias("vit_large_patch16_dinov3.lvd1689m", "DINOv3 ViT-L/16", 303.1, 1024, 16),
    "dinov3-convnext-t": Alias("convnext_tiny.dinov3_lvd1689m", "DINOv3 ConvNeXt-T", 27.8, 384, 16),
    "dinov3-convnext-b": Alias("convnext_base.dinov3_lvd1689m", "DINOv3 ConvNeXt-B", 87.6, 512, 16),
    "dino-s16": Alias("vit_small_patch16_224.dino", "DINO ViT-S/16", 21.7, 384, 16),
    "dino-s8": Alias("vit_small_patch8_224.dino", "DINO ViT-S/8", 21.7, 384, 8),
    "dino-b16": Alias("vit_base_patch16_224.dino", "DINO ViT-B/16", 85.8, 768, 16),
    "dino-b8": Alias("vit_base_patch8_224.dino", "DINO ViT-B/8", 85.8, 768, 8),
    "clip-b16": Alias(
        "vit_base_patch16_clip_quickgelu_224.openai", "CLIP ViT-B/16 (OpenAI)", 85.8, 768, 16
    ),
    "clip-b32": Alias(
        "vit_base_patch32_clip_quickgelu_224.openai", "CLIP ViT-B/32 (OpenAI)", 87.5, 768, 32
    ),
    "clip-l14": Alias(
        "vit_large_patch14_clip_quickgelu_224.openai", "CLIP ViT-L/14 (OpenAI)", 303.2, 1024, 14
    ),
    "clip-b16-laion": Alias(
        "vit_base_patch16_clip_224.laion2b", "CLIP ViT-B/16 (LAION-2B)", 85.8, 768, 16
    ),
    "clip-b16-datacomp": Alias(
        "vit_base_patch16_clip_224.datacompxl", "CLIP ViT-B/16 (DataComp)", 85.8, 768, 16
    ),
    "siglip-b16": Alias(
        "vit_base_patch16_siglip_512.webli", "SigLIP ViT-B/16 at 512", 93.5, 768, 16
    ),
    "siglip2-b16": Alias(
        "vit_base_patch16_siglip_512.v2_webli", "SigLIP 2 ViT-B/16 at 512", 93.5, 768, 16
    ),
    "siglip2-so400m": Alias(
        "vit_so400m_patch14_siglip_378.v2_webli", "SigLIP 2 SO400M/14 at 378", 428.2, 1152, 14
    ),
    "mae-b": Alias("vit_base_patch16_224.mae", "MAE ViT-B/16", 85.8, 768, 16),
    "mae-l": Alias("vit_large_patch16_224.mae", "MAE ViT-L/16", 303.3, 1024, 16),
    "beit-b": Alias("beitv2_base_patch16_224.in1k_ft_in22k", "BEiT v2 ViT-B/16", 85.8, 768, 16),
    "eva02-s": Alias("eva02_small_patch14_224.mim_in22k", "EVA-02 ViT-S/14", 21.6, 384, 14),
    "eva02-b": Alias("eva02_base_patch14_224.mim_in22k", "EVA-02 ViT-B/14", 85.8, 768, 14),
    "sam-b": Alias("samvit_base_patch16.sa1b", "SAM image encoder ViT-B/16", 89.7, 256, 16),
    "sam-l": Alias("samvit_large_patch16.sa1b", "SAM image encoder ViT-L/16", 308.3, 256, 16),
    "pe-spatial-s": Alias(
        "vit_pe_spatial_small_patch16_512.fb", "Perception Encoder spatial ViT-S/16", 22.0, 384, 16
    ),
    "pe-spatial-b": Alias(
        "vit_pe_spatial_base_patch16_512.fb", "Perception Encoder spatial ViT-B/16", 86.4, 768, 16
    ),
    "radio-b": Alias("vit_base_patch16_radio_v3.c_radio", "C-RADIO v3 ViT-B/16", 86.5, 768, 16),
    "deit3-s": Alias(
        "deit3_small_patch16_224.fb_in22k_ft_in1k", "DeiT III ViT-S/16, supervised", 21.7, 384, 16
    ),
    "vit-s16": Alias(
        "vit_small_patch16_224.augreg_in21k", "ViT-S/16, supervised (AugReg)", 21.7, 384, 16
    ),
    "vit-b16": Alias(
        "vit_base_patch16_224.augreg_in21k", "ViT-B/16, supervised (AugReg)", 85.8, 768, 16
    ),
    "naflexvit-b16": Alias(
        "naflexvit_base_patch16_siglip.v2_webli", "SigLIP 2 NaFlex ViT-B/16", 92.9, 768, 16
    ),
    "convnext-t": Alias("convnext_tiny.fb_in22k", "ConvNeXt-T, supervised", 27.8, 384, 16),
    "convnextv2-t": Alias(
        "convnextv2_tiny.fcmae", "ConvNeXt V2-T, masked autoencoder", 27.9, 384, 16
    ),
    "swin-t": Alias("swin_tiny_patch4_window7_224.ms_in22k", "Swin-T, supervised", 27.5, 384, 16),
    "resnet50": Alias("resnet50.a1_in1k", "ResNet-50, supervised", 23.5, 1024, 16),
    "mobilenetv4-s": Alias(
        "mobilenetv4_conv_small.e2400_r224_in1k", "MobileNetV4 small, supervised", 2.5, 96, 16
    ),
    "efficientnet-b0": Alias(
        "efficientnet_b0.ra_in1k", "EfficientNet-B0, supervised", 4.0, 112, 16
    ),
}
# fmt: on

# What these models are called in other libraries, so that whoever knows them by that is helped.
_SIZES = ("small", "base", "large", "giant")
OTHER_NAMES: dict[str, str] = {
    **{f"facebook/dinov2-{size}": f"dinov2-{size[0]}" for size in _SIZES},
    **{f"facebook/dinov2-with-registers-{size}": f"dinov2-{size[0]}-reg" for size in _SIZES},
    **{f"dinov2_vit{size}14": f"dinov2-{size}" for size in "sblg"},
    **{f"dinov2_vit{size}14_reg": f"dinov2-{size}-reg" for size in "sblg"},
    **{f"dinov3_vit{size}16": f"dinov3-{size}" for size in "sbl"},
    **{f"facebook/dinov3-vit{size}16-pretrain-lvd1689m": f"dinov3-{size}" for size in "sbl"},
    **{f"dino_vit{size}": f"dino-{size}" for size in ("s16", "s8", "b16", "b8")},
    **{f"facebook/dino-vit{size}": f"dino-{size}" for size in ("s16", "s8", "b16", "b8")},
    "openai/clip-vit-base-patch16": "clip-b16",
    "openai/clip-vit-base-patch32": "clip-b32",
    "openai/clip-vit-large-patch14": "clip-l14",
    "google/siglip-base-patch16-512": "siglip-b16",
    "google/siglip2-base-patch16-512": "siglip2-b16",
    "facebook/vit-mae-base": "mae-b",
    "facebook/vit-mae-large": "mae-l",
    "facebook/sam-vit-base": "sam-b",
    "facebook/sam-vit-large": "sam-l",
}
