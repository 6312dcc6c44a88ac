"""A short name for a set of tensors (weights, a basis), by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """12 hex digits of a SHA-256 over names, dtypes, shapes and bytes of a state dict."""
    entries = sorted(state.items())

    def digest(tensor: Tensor) -> bytes:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return hashlib.sha256(data.numpy()).digest()

    # hashlib lets go of the interpreter lock: a large model is hashed on all cores.
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(digest, (tensor for _, tensor in entries)))
    whole = hashlib.sha256()
    for (name, tensor), part in zip(entries, digests, strict=True):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        whole.update(part)
    return whole.hexdigest()[:12]
