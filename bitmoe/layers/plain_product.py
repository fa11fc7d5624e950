"""Unquantized products split over tensor-parallel ranks: the bf16 baseline (``quant.weights = none``)."""

import torch
import torch.distributed as dist

from bitmoe.layers.collectives import gather_first_dim, sum_over_ranks

# Shapes: S = sequence, B = batch, H = hidden, O = output rows on this rank, F = input features on this rank.


class PlainColumnProduct(torch.autograd.Function):
    """x W^T with output rows split over ranks; the backward gathers x again."""

    @staticmethod
    def forward(ctx, x_SBH: torch.Tensor, w_OH: torch.Tensor, group: dist.ProcessGroup, sequence_parallel: bool):
        ctx.save_for_backward(x_SBH, w_OH)
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        return (gather_first_dim(x_SBH, group) if sequence_parallel else x_SBH) @ w_OH.T

    @staticmethod
    def backward(ctx, grad_SBO):
        x_SBH, w_OH = ctx.saved_tensors
        grad_x_SBH = sum_over_ranks(grad_SBO @ w_OH, ctx.group, scatter=ctx.sequence_parallel)
        x_SBH = gather_first_dim(x_SBH, ctx.group) if ctx.sequence_parallel else x_SBH
        return grad_x_SBH, grad_SBO.flatten(0, -2).T @ x_SBH.flatten(0, -2), None, None


class PlainRowProduct(torch.autograd.Function):
    """x W^T with input features split over ranks, added over them."""

    @staticmethod
    def forward(ctx, x_SBF, w_HF, group: dist.ProcessGroup, sequence_parallel: bool, deterministic: bool):
        ctx.save_for_backward(x_SBF, w_HF)
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        return sum_over_ranks(x_SBF @ w_HF.T, group, scatter=sequence_parallel, deterministic=deterministic)

    @staticmethod
    def backward(ctx, grad_SBH):
        x_SBF, w_HF = ctx.saved_tensors
        if ctx.sequence_parallel:
            grad_SBH = gather_first_dim(grad_SBH, ctx.group)
        return grad_SBH @ w_HF, grad_SBH.flatten(0, -2).T @ x_SBF.flatten(0, -2), None, None, None
