"""Argument checks shared by the operations. They look at metadata only, so they also run on fake tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def math_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic is done in: float64 when an operand has it, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_float(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, not {dtype}")


def check_matrix(name: str, tensor: Tensor, *, strided: bool = False) -> None:
    """A float matrix; contiguous unless `strided`."""
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be a matrix [rows, columns], not of shape {tuple(tensor.shape)}")
    check_float(f"{name}.dtype", tensor.dtype)
    if not strided and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not of strides {tensor.stride()} for {tuple(tensor.shape)}")


def check_bits(name: str, bits: Tensor, rows: int, K: int, like: Tensor) -> None:
    """A packed mask of a [rows, K] matrix, on the device of `like`."""
    if bits.dtype != torch.int32:
        raise ValueError(f"{name} must be int32 words (see pack), not {bits.dtype}")
    if bits.dim() != 2 or bits.shape[0] != rows or bits.shape[1] != (K + 31) // 32:
        raise ValueError(
            f"{name} must have shape {(rows, (K + 31) // 32)} for a [{rows}, {K}] matrix, not {tuple(bits.shape)}"
        )
    if not bits.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not of strides {bits.stride()}")
    check_device(name, bits, like)


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} with the other arguments, not on {tensor.device}")


def check_starts(name: str, starts: Tensor | None, rows: int, like: Tensor) -> None:
    """Flat positions of the first entry of each row of a compact tensor: int64 [rows]."""
    if starts is None:
        raise ValueError(f"{name} is required where columns is None (the compact layout)")
    if starts.dtype != torch.int64 or starts.dim() != 1 or starts.shape[0] != rows or not starts.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous int64 vector of {rows} positions (see row_starts), "
            f"not {starts.dtype} of shape {tuple(starts.shape)}"
        )
    check_device(name, starts, like)


def row_panel(shape: Sequence[int], columns: Tensor | None, rows: int) -> bool:
    """Whether a theta-like tensor of `shape` holds chosen rows of a matrix of `rows` rows."""
    return columns is not None and shape[0] == columns.shape[0] and (shape[0], shape[1]) != (rows, columns.shape[0])


def check_layout(
    name: str,
    shape: Sequence[int],
    rows: int,
    row_start: Tensor | None,
    columns: Tensor | None,
    like: Tensor,
    K: int | None = None,
) -> None:
    """The shape of a theta-like tensor against its layout: compact (columns None) or a panel, of columns or of the rows
    of a matrix with K columns."""
    if len(shape) != 2:
        raise ValueError(f"{name} must have two dimensions, not shape {tuple(shape)}")
    if columns is None:
        check_starts("row_start", row_start, rows, like)
        if shape[0] != rows and shape[0] != 1:
            raise ValueError(f"{name} must have shape ({rows}, capacity) or (1, capacity), not {tuple(shape)}")
        return
    if columns.dtype != torch.int32 or columns.dim() != 1 or not columns.is_contiguous():
        raise ValueError(
            f"columns must be a contiguous int32 vector, not {columns.dtype} of shape {tuple(columns.shape)}"
        )
    check_device("columns", columns, like)
    n = columns.shape[0]
    if tuple(shape) not in ((rows, n), (n, K)):
        other = "" if K is None else f", or {(n, K)} for one of {n} rows"
        raise ValueError(f"{name} must have shape {(rows, n)} for a panel of {n} columns{other}, not {tuple(shape)}")


def check_theta(
    name: str,
    theta: Tensor,
    rows: int,
    row_start: Tensor | None,
    columns: Tensor | None,
    like: Tensor,
    K: int | None = None,
) -> None:
    """A contiguous theta-like tensor in the layout that row_start and columns describe."""
    check_matrix(name, theta)
    check_device(name, theta, like)
    check_layout(name, theta.shape, rows, row_start, columns, like, K)
