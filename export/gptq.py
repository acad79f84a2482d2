"""int4 by GPTQ: each column's rounding error is made good in the columns that are still to be rounded, as far as the inputs of the layer allow."""

from __future__ import annotations

import numpy as np
import torch

from .int4 import Blocks, round_to_nearest

DAMPING = 0.01  # of the mean square of an input, added to each: inputs that never vary apart would make the errors' way out unbounded


def gptq(weight: np.ndarray, products: torch.Tensor, block_size: int) -> Blocks:
    """float32[N, K] and the sum of x xᵀ over the layer's inputs x, [K, K] -> symmetric blocks that keep the layer's outputs, not its weights.

    Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1: with U the upper Cholesky factor of the inverse of `products`, the error of column j over
    U[j,j] leaves by row j of U. A block's scale is chosen as round_to_nearest chooses it, from the weights as they stand when the block's turn comes.
    """
    rows, columns = weight.shape
    factor = _factor(products)
    rest = torch.from_numpy(np.array(weight.T, np.float32, order="C"))  # [K, N], a column of the weight a row; they take up the errors of those before
    blocks = -(-columns // block_size)
    codes, scales = np.zeros((rows, blocks, block_size), np.int8), np.empty((rows, blocks), np.float32)
    for number in range(blocks):
        start, end = number * block_size, min((number + 1) * block_size, columns)
        scales[:, number] = round_to_nearest(rest[start:end].T.numpy(), block_size).scales[:, 0]
        scale = torch.from_numpy(scales[:, number].copy())
        errors = torch.empty(end - start, rows)
        for column in range(start, end):
            code = (rest[column] / scale).round_().clamp_(-8, 7)
            codes[:, number, column - start] = code.numpy()
            errors[column - start] = (rest[column] - code * scale) / factor[column, column]
            rest[column:end].addr_(factor[column, column:end], errors[column - start], alpha=-1)
        rest[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return Blocks(codes, scales)


def _factor(products: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor float32[K, K] of the damped products' inverse."""
    damped = products.double().clone()
    diagonal = damped.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal.add_(DAMPING * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
