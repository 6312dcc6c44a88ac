"""The network: a plain timm ViT (VisionTransformer or Eva), its starting point, its training
forward, its file format."""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.layers import set_fused_attn
from torch import nn

FORMAT = "fmupsample-backbone/1"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# dynamic_img_size: position embeddings are interpolated to whatever grid the input has.
DEFAULT_ARGS: dict = {"num_classes": 0, "dynamic_img_size": True, "img_size": 224}


def make_backbone(architecture: str, model_args: dict | None = None) -> nn.Module:
    """A timm model without weights. Only models with patch tokens, `blocks` and a final `norm` are
    accepted."""
    model = timm.create_model(
        architecture, pretrained=False, **(DEFAULT_ARGS if model_args is None else model_args)
    )
    missing = [
        name for name in ("patch_embed", "_pos_embed", "blocks", "norm") if not hasattr(model, name)
    ]
    if missing:
        raise ValueError(
            f"{architecture} has no {', '.join(missing)}; choose a timm ViT or EVA model"
        )
    if isinstance(model.norm, nn.Identity):
        raise ValueError(f"{architecture} has no norm on its patches; add use_fc_norm=false")
    return model


def patch_size(model: nn.Module) -> int:
    return model.patch_embed.patch_size[0]


def prefer_plain_attention(device: torch.device) -> None:
    """On CPUs, use matmul-softmax-matmul attention for training.

    At the 36..200 tokens used here torch's fused CPU attention spends 4 to 5 times longer in its
    backward pass than the three plain products (measured: 9,100 against 13,500 tokens/s for a whole
    ViT-Ti step on 2 cores).
    """
    set_fused_attn(device.type != "cpu")


def encode(
    model: nn.Module,
    images: torch.Tensor,  # [B, 3, H, W], normalised
    mask: torch.Tensor | None = None,  # [B, h, w] bool, True = replace by mask_token
    mask_token: torch.Tensor | None = None,  # [C]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefix tokens [B, P, C] and patch tokens [B, h, w, C] after the final norm."""
    x = model.patch_embed(images)  # [B, h, w, C] because of dynamic_img_size
    b, h, w, _ = x.shape
    if mask is not None:
        x = torch.where(mask[..., None], mask_token.to(x.dtype), x)
    x = model._pos_embed(x)
    x, rope = x if isinstance(x, tuple) else (x, None)
    x = model.norm_pre(x)
    for block in model.blocks:
        x = block(x) if rope is None else block(x, rope=rope)
    prefix = model.num_prefix_tokens
    x = model.norm(x)
    return x[:, :prefix], x[:, prefix:].reshape(b, h, w, -1)


@torch.no_grad()
def whiten_patch_embed(model: nn.Module, images: torch.Tensor) -> None:
    """Start the patch embedding at the whitened principal components of real patches.

    A random projection is dominated by the mean colour of a patch, since natural images hold most
    of their energy in the lowest frequencies; whitening gives edges and texture the same say from
    the first step. Classical (Olshausen and Field 1996 discuss the statistics); it only sets a
    starting point and is trained on.
    """
    p, weight = patch_size(model), model.patch_embed.proj.weight  # [C, 3, p, p]
    patches = images.unfold(2, p, p).unfold(3, p, p)  # [B, 3, h, w, p, p]
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * p * p).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    values, vectors = values.flip(0)[: len(weight)], vectors.flip(1)[:, : len(weight)]
    rows = (
        vectors / (values + 1e-3 * values[0]).sqrt()
    ).T  # unit variance, damped where there is only noise
    # Rotate, so that no single channel carries the loudest component; a wide network on small
    # patches has more channels than there are components.
    rotation = torch.linalg.qr(
        torch.randn(len(weight), len(rows), dtype=rows.dtype, device=rows.device)
    )[0]
    rows = 0.5 * (len(weight) / len(rows)) ** 0.5 * rotation @ rows
    weight.copy_(rows.view_as(weight))
    if model.patch_embed.proj.bias is not None:
        model.patch_embed.proj.bias.copy_(-(rows @ mean))


@torch.no_grad()
def wave_positions(model: nn.Module, amplitude: float = 0.4) -> None:
    """Start the learned position embedding at two-dimensional sines and cosines (as MAE fixes
    them).

    timm's start has a standard deviation of 0.02, far below the patch content: short runs hardly
    find out where they are.
    """
    if getattr(model, "pos_embed", None) is None:
        return
    (h, w), dim = model.patch_embed.grid_size, model.pos_embed.shape[-1]
    frequency = 100.0 ** -(torch.arange(dim // 4, device=model.pos_embed.device) / (dim // 4))
    waves = []
    for count in (h, w):
        angle = (
            (torch.arange(count, device=frequency.device) + 0.5)[:, None] / count * 14 * frequency
        )
        waves.append(torch.cat([angle.sin(), angle.cos()], 1))  # [count, dim / 2]
    grid = torch.cat([waves[0][:, None].expand(h, w, -1), waves[1][None].expand(h, w, -1)], -1)
    model.pos_embed.zero_()
    model.pos_embed[0, -h * w :, : grid.shape[-1]] = amplitude * grid.reshape(h * w, -1)


@torch.no_grad()
def mimetic_init(model: nn.Module, alpha: float = 0.7, beta: float = 0.7) -> None:
    """Start attention near what trained ViTs look like: query-key product ~ identity,
    value-projection ~ -identity.

    Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers"; it pays on small
    data. The factors come from an SVD of alpha * noise + beta * I per head (query, key) and of beta
    * noise - alpha * I (value, projection).
    """
    for block in model.blocks:
        attention = block.attn
        qkv, heads = getattr(attention, "qkv", None), attention.num_heads
        if qkv is None:  # EVA-02 keeps three projections when told so
            query, key, value = (
                attention.q_proj.weight,
                attention.k_proj.weight,
                attention.v_proj.weight,
            )
        else:
            query, key, value = qkv.weight.chunk(3)
        dim, size = query.shape[1], query.shape[0] // heads
        eye = torch.eye(dim, device=query.device)
        for head in range(heads):
            u, s, v = torch.linalg.svd(alpha * torch.randn_like(eye) / dim**0.5 + beta * eye)
            rows = slice(head * size, (head + 1) * size)
            root = s[:size].sqrt()[:, None]
            query[rows].copy_(root * u[:, :size].T)
            key[rows].copy_(root * v[:size])
        u, s, v = torch.linalg.svd(beta * torch.randn_like(eye) / dim**0.5 - alpha * eye)
        root = s.sqrt()
        value.copy_(root[:, None] * v)
        attention.proj.weight.copy_(u * root)


def save_embedded(
    path: Path,
    model: nn.Module,
    architecture: str,
    model_args: dict,
    tag: str,
    image_size: int,
    card: dict,
) -> None:
    """Write the deliverable: fp16 tensors under timm's names, everything needed to rebuild the
    model in the header."""
    state = {
        name: (value.half() if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    metadata = {
        "format": FORMAT,
        "architecture": architecture,
        "model_args": json.dumps(model_args),
        "tag": tag,
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
        "image_size": str(image_size),
        "card": json.dumps(card),
    }
    partial = path.with_name(path.name + ".partial")
    save_file(state, str(partial), metadata=metadata)
    partial.chmod(0o644)  # safetensors writes for the owner only
    partial.replace(path)
