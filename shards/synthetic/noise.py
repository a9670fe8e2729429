"""Random fields for the made-up landscape: noise with the roughness of terrain, blur, and Voronoi cells.

Random numbers come from numpy's Philox generator, keyed by (seed, place, use), so that a place depends on
nothing but its own key. Noise is shaped in the frequency domain: power falling as a power of the frequency
(spectral synthesis, Peitgen & Saupe, "The Science of Fractal Images", 1988, section 2.5). Letters in the
comments: H, W rows and columns.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.float32]
Mask = NDArray[np.bool_]


def generator(seed: int, place: int, use: int) -> np.random.Generator:
    """Random numbers of one `use` in one place: the same for ever, and independent of every other key."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, place, use])))


def fractal(rng: np.random.Generator, side: int, slope: float, longest: float = 256.0) -> Map:
    """Noise [side, side] of mean 0 and variance 1 that wraps around at the borders.

    Args:
        rng: where the numbers come from.
        side: pixels.
        slope: power falls as frequency ** -slope: 0 is white, 2 rugged, 4 smooth.
        longest: waves much longer than this many pixels are levelled.
    """
    spectrum = np.fft.rfft2(rng.standard_normal((side, side), dtype=np.float32))
    rows, cols = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :]
    spectrum *= ((rows**2 + cols**2 + longest**-2.0) ** (-slope / 4)).astype(np.float32)
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, s=(side, side)).astype(np.float32)
    return np.asarray(noise / noise.std(), dtype=np.float32)


def blur(field: Map, sigma: float) -> Map:
    """`field` [H, W] convolved with a Gaussian of `sigma` pixels, wrapping around."""
    rows, cols = np.fft.fftfreq(field.shape[0])[:, None], np.fft.rfftfreq(field.shape[1])[None, :]
    damping = np.exp(-2 * (np.pi * sigma) ** 2 * (rows**2 + cols**2)).astype(np.float32)
    return np.fft.irfft2(np.fft.rfft2(field) * damping, s=field.shape).astype(np.float32)


def cells(u: Map, v: Map, jitter: float, rng: np.random.Generator) -> tuple[NDArray[np.int32], Map]:
    """Voronoi cells around a jittered unit grid in the coordinates `u`, `v` [H, W].

    Returns:
        The number of each pixel's cell [H, W], from 0, and how far the pixel is from the nearest border of
        its cell [H, W], roughly, in units of the grid (0 on the border).
    """
    whole = np.floor(u).astype(np.int32), np.floor(v).astype(np.int32)
    i, j = (axis - axis.min() + 1 for axis in whole)
    rows, cols = int(i.max()) + 2, int(j.max()) + 2
    site_u, site_v = rng.random((2, rows * cols), dtype=np.float32) * np.float32(jitter) + np.float32(0.5 - jitter / 2)
    home, part_u, part_v = i * np.int32(cols) + j, u - whole[0], v - whole[1]
    nearest = np.full(u.shape, np.inf, dtype=np.float32)
    second, number = nearest.copy(), home.copy()
    for di, dj in np.ndindex(3, 3):  # the nearest site is at most one cell away
        cell = home + np.int32((di - 1) * cols + dj - 1)
        far_u, far_v = site_u[cell] + (di - 1) - part_u, site_v[cell] + (dj - 1) - part_v
        away = far_u**2 + far_v**2
        second = np.minimum(second, np.maximum(nearest, away))
        number = np.where(away < nearest, cell, number)
        nearest = np.minimum(nearest, away)
    return number, np.asarray((np.sqrt(second) - np.sqrt(nearest)) / 2, dtype=np.float32)


def turned(side: int, angle: float, step_u: float, step_v: float) -> tuple[Map, Map]:
    """Coordinates [side, side] of the grid turned by `angle` (radians), in steps of so many pixels."""
    y, x = np.mgrid[:side, :side].astype(np.float32)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return (u / step_u).astype(np.float32), (v / step_v).astype(np.float32)
