"""Which tiles attention's kernels work in, by architecture, size of an element and head dim.

The largest that compile without a spill, found on a machine without a GPU: a start, not a tuning result.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """A launch: BR query rows and BC key columns a tile, warps a program, stages of the load pipeline.

    And how fp32 factors are multiplied: "ieee" by plain FMA, "tf32x3" in three parts on tensor cores.
    """

    BR: int
    BC: int
    warps: int
    stages: int
    precision: str = "ieee"


class Tiles(NamedTuple):
    forward: Tile
    key_value: Tile
    query: Tile
    bias: Tile
    fused: Tile | None = None  # dq along with dk and dv; None: does not fit without a spill


# (architecture, bytes an element, head dim up to) -> tiles. 2 bytes run on tensor cores, 4 on plain FMA.
CONFIGURATIONS = {
    (80, 2, 64): Tiles(
        Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 128, 8, 2)
    ),
    (80, 2, 128): Tiles(
        Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)
    ),
    (80, 2, 256): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 16, 8, 1)),
    (80, 4, 64): Tiles(
        Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)
    ),
    (80, 4, 128): Tiles(
        Tile(32, 16, 8, 1), Tile(32, 16, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(32, 16, 8, 1)
    ),
    (80, 4, 256): Tiles(
        Tile(32, 32, 16, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)
    ),
    (90, 2, 64): Tiles(
        Tile(128, 64, 8, 3),
        Tile(64, 128, 8, 2),
        Tile(128, 64, 8, 3),
        Tile(128, 64, 8, 3),
        Tile(64, 128, 8, 2),
    ),
    (90, 2, 128): Tiles(
        Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 128, 8, 2)
    ),
    (90, 2, 256): Tiles(Tile(128, 32, 8, 2), Tile(32, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 1)),
    (90, 4, 64): Tiles(
        Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 8, 1)
    ),
    (90, 4, 128): Tiles(
        Tile(32, 16, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)
    ),
    (90, 4, 256): Tiles(
        Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)
    ),
}

# Where windows, biases and the like need registers of their own.
GENERAL = {
    (80, 2, 64): CONFIGURATIONS[80, 2, 64]._replace(key_value=Tile(32, 128, 8, 1)),
    (80, 2, 256): CONFIGURATIONS[80, 2, 256]._replace(query=Tile(32, 32, 8, 1)),
    (80, 4, 64): CONFIGURATIONS[80, 4, 64]._replace(forward=Tile(64, 32, 8, 1), fused=Tile(16, 32, 8, 1)),
    (80, 4, 256): CONFIGURATIONS[80, 4, 256]._replace(query=Tile(16, 16, 8, 2)),
    (90, 2, 128): CONFIGURATIONS[90, 2, 128]._replace(
        forward=Tile(128, 32, 8, 3), query=Tile(128, 32, 8, 2), fused=Tile(32, 64, 8, 2)
    ),
    (90, 2, 256): CONFIGURATIONS[90, 2, 256]._replace(forward=Tile(128, 16, 8, 2), query=Tile(128, 16, 8, 2)),
    (90, 4, 128): CONFIGURATIONS[90, 4, 128]._replace(
        forward=Tile(32, 16, 4, 1), key_value=Tile(16, 32, 8, 1), query=Tile(16, 16, 8, 1)
    ),
}


# Where tiles come through tensor descriptors (TMA), and the registers of their addresses go into larger ones.
DESCRIBED = {
    (90, 2, 64): CONFIGURATIONS[90, 2, 64]._replace(query=Tile(64, 64, 4, 3), fused=Tile(128, 128, 8, 2)),
    (90, 2, 128): CONFIGURATIONS[90, 2, 128]._replace(
        forward=Tile(128, 128, 8, 2), key_value=Tile(64, 128, 8, 2), fused=Tile(64, 128, 8, 2)
    ),
    (90, 2, 256): CONFIGURATIONS[90, 2, 256]._replace(forward=Tile(128, 64, 8, 2)),
    (90, 4, 64): CONFIGURATIONS[90, 4, 64]._replace(
        forward=Tile(128, 32, 8, 2, "tf32x3"),
        key_value=Tile(32, 128, 8, 1, "tf32x3"),
        query=Tile(64, 32, 4, 2, "tf32x3"),
        fused=None,
    ),
}
