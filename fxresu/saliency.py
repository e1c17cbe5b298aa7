"""What weights are ranked by: magnitude, random, Wanda, Wanda++, gradient, SNIP, or a callable.

==========  ==========================================  =====================
name        score of a coordinate                       statistics
==========  ==========================================  =====================
magnitude   |W|                                         none
random      a hash of seed, weight and coordinate       none
wanda       |W| ‖X‖₂                                    inputs
wanda++     |W| (α mean g² + mean ‖X‖²), α = 100        inputs, squares
gradient    |mean g|                                    gradients
snip        |W| |mean g|                                gradients
==========  ==========================================  =====================

Sources: Wanda (Sun et al. 2023), Wanda++ in RESU's form (huy209vn/RESU), SNIP (Lee et al. 2019). At a commit W is the
effective weight, so that "snip" is RESU's |W||g| and "wanda" its |W|‖X‖.

A callable is score(weight, statistics) -> Tensor: weight is [rows, K] float32, statistics a `WeightStatistics` of what
its attribute `needs` (a subset of `NEEDS`, default none) asks for; larger |score| is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fxresu.errors import ConfigError
from fxresu.options import Named, import_callable, near
from fxresu.scores import RowScore, Score
from fxresu.weight_statistics import NEEDS, WeightStatistics

__all__ = ["SCORES", "needs_of", "score_of"]

_NEEDS: dict[str, tuple[str, ...]] = {
    "magnitude": (),
    "random": (),
    "wanda": ("inputs",),
    "wanda++": ("inputs", "squares"),
    "gradient": ("gradients",),
    "snip": ("gradients",),
}
SCORES = tuple(_NEEDS)
"""Names that `score_of` accepts."""

_GOLDEN, _MIX_1, _MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64, as int64


def needs_of(score: Named) -> frozenset[str]:
    """The statistics (of `NEEDS`) that a score is made from.

    Raises:
        ConfigError: an unknown score, or a callable whose `needs` names an unknown statistic.
    """
    function = _callable(score)
    if function is None:
        return frozenset(_NEEDS[str(score)])
    needs = getattr(function, "needs", ())
    needs = (needs,) if isinstance(needs, str) else tuple(needs)
    unknown = [n for n in needs if n not in NEEDS]
    if unknown:
        raise ConfigError(f"score {score!r}: needs={unknown[0]!r}; use {', '.join(NEEDS)}")
    return frozenset(needs)


def _callable(score: Named) -> Callable[..., Tensor] | None:
    if isinstance(score, str) and ":" in score:
        return import_callable(score, "score")
    if isinstance(score, str):
        if score not in _NEEDS:
            raise ConfigError(f"score={score!r} is unknown{near(score, SCORES)}; use one of {', '.join(SCORES)}")
        return None
    return score


@torch.no_grad()
def score_of(
    score: Named,
    name: str,
    weight: Tensor,
    statistics: WeightStatistics | None = None,
    *,
    alpha: float = 100.0,
    seed: int = 0,
) -> Score:
    """The score of one weight [rows, K]: the weight itself for "magnitude", else a matrix that is computed by rows.

    Args:
        name: FQN, for messages and the stream of "random".
        statistics: what `needs_of(score)` asks for; alpha: of "wanda++"; seed: of "random".

    Raises:
        ConfigError: an unknown score, missing statistics, or a callable that returns something else than a matrix of
            the weight's shape.
    """
    needs, function = needs_of(score), _callable(score)
    if needs:
        if statistics is None:
            raise ConfigError(
                f"score={score!r} needs statistics of weight {name!r} ({', '.join(sorted(needs))}); gather them with"
                " fxresu.calibrate(model, batches, score=...) and pass statistics="
            )
        statistics.check(name, needs, score)
    if function is not None:
        return _custom(function, name, weight, statistics)
    shape = (weight.shape[0], weight.shape[1])
    if score == "magnitude":
        return weight.detach()
    if score == "random":
        return RowScore(shape, weight.device, partial(_random, _stream(seed, name), shape[1], weight.device))
    assert statistics is not None
    return RowScore(shape, weight.device, partial(_CHUNKS[str(score)], weight.detach(), statistics, alpha))


def _custom(function: Callable[..., Tensor], name: str, weight: Tensor, statistics: WeightStatistics | None) -> Tensor:
    found = function(weight.detach().float(), statistics)
    if not isinstance(found, Tensor) or found.shape != weight.shape:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(f"the score function returned {got} for weight {name!r}; must be {list(weight.shape)}")
    return found.detach().to(weight.device)


def _wanda(weight: Tensor, statistics: WeightStatistics, alpha: float, first: int, last: int) -> Tensor:
    return weight[first:last].float().abs() * statistics.along(statistics.input_norm(), weight, first, last)


def _wanda_plus(weight: Tensor, statistics: WeightStatistics, alpha: float, first: int, last: int) -> Tensor:
    inputs = statistics.along(statistics.input_mean_square(), weight, first, last)
    squares = statistics.mean_square(weight, first, last)
    return weight[first:last].float().abs() * (alpha * squares + inputs)


def _gradient(weight: Tensor, statistics: WeightStatistics, alpha: float, first: int, last: int) -> Tensor:
    return statistics.mean_gradient(weight, first, last).abs()


def _snip(weight: Tensor, statistics: WeightStatistics, alpha: float, first: int, last: int) -> Tensor:
    return weight[first:last].float().abs() * statistics.mean_gradient(weight, first, last).abs()


_CHUNKS: dict[str, Callable[[Tensor, WeightStatistics, float, int, int], Tensor]] = {
    "wanda": _wanda,
    "wanda++": _wanda_plus,
    "gradient": _gradient,
    "snip": _snip,
}


def _stream(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _random(stream: int, k: int, device: torch.device, first: int, last: int) -> Tensor:
    """float32 [last - first, k] in [0, 1): splitmix64 (Steele et al. 2014) of the coordinate, the same on every device
    and for every division into chunks."""
    x = torch.arange(first * k, last * k, device=device, dtype=torch.int64).mul_(_GOLDEN).add_(stream)
    for shift, mix in ((30, _MIX_1), (27, _MIX_2)):
        x = (x ^ _shifted(x, shift)).mul_(mix)
    x = x ^ _shifted(x, 31)
    return (_shifted(x, 40).float() / (1 << 24)).view(last - first, k)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> by) & ((1 << (64 - by)) - 1)
