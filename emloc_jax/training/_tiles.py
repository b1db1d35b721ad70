"""Dynamic tiling: an image of any shape as tiles of one size, and itself made small."""

from __future__ import annotations

from PIL import Image

__all__ = ["cut_tiles", "tile_grid"]


def tile_grid(
    height: int, width: int, tile: tuple[int, int], *, least: int, most: int
) -> tuple[int, int]:
    """The grid of tiles whose shape is nearest to an image's (Chen et al. 2024, arXiv 2404.16821).

    Among grids of equally near shape a larger one is taken only while the image has more than half
    its pixels.

    Args:
        height: of the image.
        width: of the image.
        tile: (height, width) of a tile.
        least: smallest number of tiles.
        most: largest number of tiles.

    Returns:
        (rows, columns).

    Example:
        >>> tile_grid(300, 600, (448, 448), least=1, most=12)
        (1, 2)
        >>> tile_grid(1000, 1000, (448, 448), least=1, most=12)
        (3, 3)
    """
    shape, area = width / height, width * height
    grids = [
        (rows, columns)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if least <= rows * columns <= most
    ]
    best, difference = (1, 1), float("inf")
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        own = abs(shape - columns / rows)
        larger = own == difference and area > 0.5 * tile[0] * tile[1] * rows * columns
        if own < difference or larger:
            best, difference = (rows, columns), own
    return best


def cut_tiles(
    image: Image.Image,
    grid: tuple[int, int],
    tile: tuple[int, int],
    *,
    resample: int,
    thumbnail: bool = True,
) -> list[Image.Image]:
    """The tiles of an image, row by row.

    Args:
        image: of any size.
        grid: (rows, columns).
        tile: (height, width) of a tile.
        resample: Pillow's number of a filter.
        thumbnail: put the whole image, made as small as a tile, behind them if there are several.

    Returns:
        Images of the size of a tile.

    Example:
        >>> tiles = cut_tiles(Image.new("RGB", (90, 30)), (1, 3), (16, 16), resample=3)
        >>> len(tiles), tiles[0].size
        (4, (16, 16))
    """
    (rows, columns), (high, wide) = grid, tile
    whole = image.resize((wide * columns, high * rows), resample)
    tiles = [
        whole.crop((wide * column, high * row, wide * (column + 1), high * (row + 1)))
        for row in range(rows)
        for column in range(columns)
    ]
    if thumbnail and len(tiles) > 1:
        tiles.append(image.resize((wide, high), resample))
    return tiles
