"""RoPE is a rotation: lengths stay, angles follow the formula, and scores depend on distances only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resmol.checks import Check, largest
from resmol.config.model_config import ModelConfig
from resmol.model import llama as architecture

DISTANCE = 7
FLOAT32_ROUNDING = 2.0**-24


def rotation_checks(config: ModelConfig) -> list[Check]:
    """Check the rotation by itself, at positions up to the last one, among them some above 256 and above 2048."""
    last = config.max_position_embeddings - 1
    distance = min(DISTANCE, last)
    starts = sorted({min(start, last - distance) for start in (0, 1, 300, 2500, last - distance)})
    generator = torch.Generator().manual_seed(2)
    query, key = torch.randn(2, config.head_dim, generator=generator, dtype=torch.float64)
    return [
        _keeps_lengths(config, query, starts),
        _is_relative(config, query, key, starts, distance),
        _has_the_right_angles(config, [start + distance for start in starts]),
    ]


def _turned(config: ModelConfig, vector: Tensor, position: int) -> Tensor:
    tables = architecture.rotation_tables(torch.tensor([position]), config.head_dim, config.rope_theta)
    return architecture.rotate(vector[None, None, None], tables)[0, 0, 0]


def _keeps_lengths(config: ModelConfig, query: Tensor, starts: list[int]) -> Check:
    stretch = largest(abs(float(_turned(config, query, start).norm() / query.norm()) - 1) for start in starts)
    moved = float((_turned(config, query, 1) - query).norm() / query.norm())
    allowed = 8 * FLOAT32_ROUNDING  # sine and cosine are rounded once each
    return Check(
        "rotation keeps lengths",
        stretch <= allowed and moved > 0.01,
        f"a query's length changes by {stretch:.1e}; position 1 turns it by {moved:.2f} of its length",
        f"at most {allowed:.1e} (tables in float32), and more than 0.01",
        "Interleaved pairs combined with tables for half-split pairs: not a rotation, so a query's length depends on "
        "its position. The original student's model did this. Or positions that are never applied.",
    )


def _is_relative(config: ModelConfig, query: Tensor, key: Tensor, starts: list[int], distance: int) -> Check:
    pairs = [(_turned(config, query, start + distance), _turned(config, key, start)) for start in starts]
    scores = [float(turned_query @ turned_key) for turned_query, turned_key in pairs]
    spread = largest(scores) + largest(-score for score in scores)
    # A float32 angle of up to p radians is off by p x 2^-24, twice; the score is bilinear in the two vectors.
    allowed = 4 * config.max_position_embeddings * FLOAT32_ROUNDING * float(query.norm() * key.norm())
    return Check(
        "rotation is relative",
        spread <= allowed,
        f"the score of two vectors {distance} apart varies by {spread:.1e} over positions {starts}",
        f"at most {allowed:.1e}: the rounding of float32 angles",
        "Rotation along the wrong axis, or positions in bfloat16: the score of two tokens would depend on where in the "
        "text they are.",
    )


def _has_the_right_angles(config: ModelConfig, positions: list[int]) -> Check:
    """Compare with cosine and sine of ``position x theta^(-2i / Dh)``, computed in double precision for each pair."""
    half, shares = config.head_dim // 2, [0.0]
    for position in positions:
        turned = torch.stack([_turned(config, row, position) for row in torch.eye(half, config.head_dim).double()])
        for pair in range(half):
            angle = position * config.rope_theta ** (-2 * pair / config.head_dim)
            found = float(turned[pair, pair]), float(turned[pair, pair + half])
            error = largest((abs(found[0] - math.cos(angle)), abs(found[1] - math.sin(angle))))
            # The exponent, its power, the product: each is rounded to float32, the first of them times ln theta.
            rounding = (abs(math.log(config.rope_theta)) + 4) * FLOAT32_ROUNDING * angle + 4 * FLOAT32_ROUNDING
            shares.append(error / rounding)
    worst = largest(shares)
    return Check(
        "rotation angles",
        worst <= 1.0,
        f"largest error {worst:.2f} of what float32 allows, {half} pairs at positions {positions}",
        f"at most 1: pair (i, i + {half}) turns by position x {config.rope_theta:g}^(-2i/{config.head_dim})",
        "Theta left at 10000, half of the head not rotated, or pairs (2i, 2i + 1): each is a rotation, so lengths and "
        "distances look right, but not the one that the published weights were trained with.",
    )
