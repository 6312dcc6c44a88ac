"""Neighbour reassembly: per output pixel, a weighted sum of K x K neighbours on the LR grid.

``out[v, P] = sum_d weights[d, P] * sample(value[v], P, d)``, d over the K x K offsets in LR cells,
row-major, centred. Two kinds of neighbours:

* *fractional* (ReSFU): ``sample`` is the bilinear sample of the value map at the LR coordinate of
  ``P`` plus ``d``, clamped to the map;
* *integer* (SAPA, CARAFE, joint bilateral): ``sample`` is the cell that holds ``P``, moved by ``d``
  cells, clamped to the map.

This file gives the operators their meaning to PyTorch: checks, shapes, gradients. They are bilinear
in value and weights, so their gradients are expressed by one another, to any order.
What computes them is chosen per device, see :mod:`fmupsample.ops.backend`.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from fmupsample.errors import ShapeError
from fmupsample.ops.backend import implementation
from fmupsample.ops.memory import empty_map


def reassemble(value: Tensor, weights: Tensor, *, fractional: bool = True) -> Tensor:
    """Weighted neighbours of a value map.

    Args:
        value: ``[B, V, h, w]``, any floating dtype, any strides.
        weights: ``[B, K*K, H, W]``, K odd, H >= h, W >= w, any floating dtype.
        fractional: bilinear samples (ReSFU) or whole cells (SAPA, CARAFE, JBU).

    Returns:
        ``[B, V, H, W]`` in the dtype of ``value``.

    Raises:
        ShapeError: the shapes do not fit.
    """
    check_kernels("reassemble", value, weights)
    if weights.shape[2] < value.shape[2] or weights.shape[3] < value.shape[3]:
        raise ShapeError(
            f"weights {list(weights.shape)} are smaller than the value map {list(value.shape)}"
        )
    return torch.ops.fmupsample.reassemble(value, weights, fractional)


def similarity(query: Tensor, key: Tensor, kernel_size: int, *, fractional: bool = True) -> Tensor:
    """Inner products of every output pixel's query with the keys of its neighbours.

    The adjoint of :func:`reassemble` in its weights, and so the same operator serves it; the
    neighbours are the same ones. Neighbours outside the map are the cells at its border.

    Args:
        query: ``[B, E, H, W]``, any floating dtype.
        key: ``[B, E, h, w]``, H >= h, W >= w.
        kernel_size: K, odd.

    Returns:
        ``[B, K*K, H, W]``, in at least float32.

    Raises:
        ShapeError: the shapes do not fit.
    """
    check_similarity("similarity", query, key, kernel_size)
    if query.shape[2] < key.shape[2] or query.shape[3] < key.shape[3]:
        raise ShapeError(f"queries {list(query.shape)} are fewer than the keys {list(key.shape)}")
    return torch.ops.fmupsample.reassemble_grad_weights(query, key, kernel_size, fractional)


def check_kernels(name: str, value: Tensor, weights: Tensor) -> None:
    """Raise a ShapeError unless these are values and K x K weights of one batch, K odd."""
    if value.ndim != 4 or weights.ndim != 4 or value.shape[0] != weights.shape[0]:
        raise ShapeError(
            f"{name} needs value [B, V, h, w] and weights [B, K*K, H, W] of one batch, got "
            f"{list(value.shape)} and {list(weights.shape)}"
        )
    k = isqrt(weights.shape[1])
    if k * k != weights.shape[1] or k % 2 == 0:
        raise ShapeError(f"{name} needs an odd square number of weights, got {weights.shape[1]}")


def check_similarity(name: str, query: Tensor, key: Tensor, kernel_size: int) -> None:
    """Raise a ShapeError unless these are queries and keys of one batch and width, K odd."""
    if query.ndim != 4 or key.ndim != 4 or query.shape[:2] != key.shape[:2]:
        raise ShapeError(
            f"{name} needs query [B, E, H, W] and key [B, E, h, w] of one batch and width, got "
            f"{list(query.shape)} and {list(key.shape)}"
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ShapeError(f"kernel_size must be odd and positive, not {kernel_size}")


@torch.library.custom_op("fmupsample::reassemble", mutates_args=())
def _reassemble(value: Tensor, weights: Tensor, fractional: bool) -> Tensor:
    return implementation(value.device).reassemble(value, weights, fractional)


@_reassemble.register_fake
def _(value: Tensor, weights: Tensor, fractional: bool) -> Tensor:
    return empty_map(value, *weights.shape[2:])


@torch.library.custom_op("fmupsample::reassemble_grad_value", mutates_args=())
def _grad_value(grad: Tensor, weights: Tensor, h: int, w: int, fractional: bool) -> Tensor:
    """Gradient for the value map ``[B, V, h, w]``, in the dtype of ``grad``."""
    return implementation(grad.device).grad_value(grad, weights, h, w, fractional)


@_grad_value.register_fake
def _(grad: Tensor, weights: Tensor, h: int, w: int, fractional: bool) -> Tensor:
    return empty_map(grad, h, w)


@torch.library.custom_op("fmupsample::reassemble_grad_weights", mutates_args=())
def _grad_weights(grad: Tensor, value: Tensor, kernel_size: int, fractional: bool) -> Tensor:
    """Gradient for the weights ``[B, K*K, H, W]``, in at least float32."""
    return implementation(grad.device).grad_weights(grad, value, kernel_size, fractional)


@_grad_weights.register_fake
def _(grad: Tensor, value: Tensor, kernel_size: int, fractional: bool) -> Tensor:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    return grad.new_empty(grad.shape[0], kernel_size**2, *grad.shape[2:], dtype=dtype)


# Only what the wanted gradients need is saved: with frozen features, the weights are not.


def _reassemble_context(ctx, inputs, output) -> None:
    value, weights, ctx.fractional = inputs
    wants_value, wants_weights = ctx.needs_input_grad[:2]
    ctx.save_for_backward(value if wants_weights else None, weights if wants_value else None)
    ctx.grid, ctx.k, ctx.dtype = value.shape[2:], isqrt(weights.shape[1]), weights.dtype


def _reassemble_backward(ctx, grad: Tensor):
    value, weights = ctx.saved_tensors
    ops = torch.ops.fmupsample
    return (
        None
        if weights is None
        else ops.reassemble_grad_value(grad, weights, *ctx.grid, ctx.fractional),
        None
        if value is None
        else ops.reassemble_grad_weights(grad, value, ctx.k, ctx.fractional).to(ctx.dtype),
        None,
    )


_reassemble.register_autograd(_reassemble_backward, setup_context=_reassemble_context)


def _grad_value_context(ctx, inputs, output) -> None:
    grad, weights, _, _, ctx.fractional = inputs
    ctx.save_for_backward(grad, weights)


def _grad_value_backward(ctx, second: Tensor):
    grad, weights = ctx.saved_tensors
    ops, k = torch.ops.fmupsample, isqrt(weights.shape[1])
    return (
        ops.reassemble(second, weights, ctx.fractional) if ctx.needs_input_grad[0] else None,
        ops.reassemble_grad_weights(grad, second, k, ctx.fractional).to(weights.dtype)
        if ctx.needs_input_grad[1]
        else None,
        None,
        None,
        None,
    )


_grad_value.register_autograd(_grad_value_backward, setup_context=_grad_value_context)


def _grad_weights_context(ctx, inputs, output) -> None:
    grad, value, _, ctx.fractional = inputs
    ctx.save_for_backward(grad, value)


def _grad_weights_backward(ctx, second: Tensor):
    grad, value = ctx.saved_tensors
    ops = torch.ops.fmupsample
    return (
        ops.reassemble(value, second, ctx.fractional) if ctx.needs_input_grad[0] else None,
        ops.reassemble_grad_value(grad, second, *value.shape[2:], ctx.fractional)
        if ctx.needs_input_grad[1]
        else None,
        None,
        None,
    )


_grad_weights.register_autograd(_grad_weights_backward, setup_context=_grad_weights_context)
