"""Where the kept weights are counted: within every row, over a layer, over all layers, in groups of m, or in blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from fxresu.errors import ConfigError

__all__ = ["Granularity", "parse_granularity"]

_VALID = (
    '"row", "layer", "global", "2:4" (two of every four inputs and of every four outputs), "n:m" (n kept of every m '
    'consecutive inputs, such as "1:4", or "2:4-rows" for that of 2:4) or "block:HxW" '
    '(whole blocks of H rows by W columns, such as "block:4x16")'
)


@dataclass(frozen=True)
class Granularity:
    """A parsed granularity: `n`, `m` belong to kind "n:m", `block_rows`, `block_cols` to kind "block"; else 0.

    `transposable` (of 2:4): the pattern holds along rows and along columns, so that products with the weight and with
    its transpose can both run on sparse tensor cores.
    """

    kind: str
    n: int = 0
    m: int = 0
    block_rows: int = 0
    block_cols: int = 0
    transposable: bool = False

    def __str__(self) -> str:
        """The text that `parse_granularity` reads back."""
        if self.kind == "n:m":
            return f"{self.n}:{self.m}" + ("-rows" if (self.n, self.m) == (2, 4) and not self.transposable else "")
        if self.kind == "block":
            return f"block:{self.block_rows}x{self.block_cols}"
        return self.kind

    @property
    def pattern_sparsity(self) -> float | None:
        """The only sparsity above 0 that the pattern allows (1 - n/m); None where any is allowed."""
        return float(1 - Fraction(self.n, self.m)) if self.kind == "n:m" else None

    def allows(self, sparsity: float) -> bool:
        """Whether masks of this granularity can have this sparsity. n:m: 0 (everything kept) or 1 - n/m, to 1e-6."""
        pattern = self.pattern_sparsity
        return pattern is None or sparsity == 0.0 or abs(sparsity - pattern) <= 1e-6

    def check(self, name: str, rows: int, k: int, sparsity: float | None = None) -> None:
        """Raise ConfigError if weight `name`, [rows, k], cannot be pruned like this (to `sparsity`, if given)."""
        if self.kind == "n:m" and k % self.m:
            raise ConfigError(
                f"granularity={str(self)!r} needs groups of m={self.m} inputs, but weight {name!r} has K={k} inputs "
                f"and {k} is not a multiple of {self.m}; exclude this weight or choose an m that divides K"
            )
        if self.transposable and rows % 4:
            raise ConfigError(
                f"granularity='2:4' keeps two of four outputs too, but weight {name!r} has {rows} rows (outputs): "
                "not a multiple of 4; exclude this weight or use '2:4-rows'"
            )
        if self.kind == "block" and (rows % self.block_rows or k % self.block_cols):
            raise ConfigError(
                f"granularity={str(self)!r}: weight {name!r} of {rows} rows and K={k} inputs does not divide into "
                f"{self.block_rows}x{self.block_cols} blocks; exclude it or choose a block that divides its shape"
            )
        if sparsity is not None and not self.allows(sparsity):
            raise ConfigError(
                f"sparsity={sparsity!r} contradicts granularity={str(self)!r} (weight {name!r}), which fixes it at "
                f"{self.pattern_sparsity!r}; use that, or 0 to keep everything"
            )


def parse_granularity(value: str | Granularity) -> Granularity:
    """Read "row", "layer", "global", "2:4", "2:4-rows", "n:m" or "block:HxW". Raises ConfigError for anything else."""
    if isinstance(value, Granularity):
        return value
    if not isinstance(value, str):
        raise ConfigError(f"granularity={value!r} is not a string; use {_VALID}")
    if value in ("row", "layer", "global"):
        return Granularity(value)
    if value in ("2:4", "2:4-rows"):
        return Granularity("n:m", n=2, m=4, transposable=value == "2:4")
    if match := re.fullmatch(r"(\d+):(\d+)", value):
        n, m = int(match[1]), int(match[2])
        if not 1 <= n < m:
            raise ConfigError(f"granularity={value!r}: n:m needs 1 <= n < m, got n={n} and m={m}")
        return Granularity("n:m", n=n, m=m)
    if match := re.fullmatch(r"block:(\d+)x(\d+)", value):
        height, width = int(match[1]), int(match[2])
        if height < 1 or width < 1 or height * width < 2:
            raise ConfigError(f"granularity={value!r}: a block holds at least 2 weights, such as 'block:4x16'")
        return Granularity("block", block_rows=height, block_cols=width)
    if value == "block":
        raise ConfigError(
            "granularity='block' does not say how large the blocks are; use 'block:HxW', such as 'block:4x16'"
        )
    raise ConfigError(f"granularity={value!r} is unknown; use {_VALID}")
