"""How far two modalities of one tile lie off each other, to a fraction of a pixel, from their edges alone.

Optical, radar and elevation share no intensities, not even the sign of a contrast; what they share is where edges lie
and along which line they run. Each pixel votes with its normalised gradient, squared as a complex number: the angle
doubles, so that a gradient and its opposite become equal, and edges count nearly alike whatever their contrast. The
correlation of two such fields is, up to a constant, the sum over pixels of (n1 . n2)^2, the similarity of normalised
gradient fields (Haber & Modersitzki 2006, doi 10.1007/11866763_89). Like that of denser descriptors (CFOG, Ye et al.
2019, doi 10.1109/TGRS.2019.2924684), it is computed for all shifts at once by FFT. What others do, and what error to
expect: docs/registration.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.sample import Tile
from shards.sensors import SENSORS

REACH = 12  # pixels: the largest shift whose score is computed, in rows and in columns
SMOOTHING = 0.8  # pixels, standard deviation of the Gaussian under the gradient
FLOOR = 0.2  # of the mean squared gradient: weaker edges count by their strength, stronger ones alike
POOLING = 1.1  # pixels, standard deviation of the Gaussian over the scores: edges of two modalities meet only nearly
CUT = 2.5  # standard deviations at which these Gaussians end
PEAK = 5  # pixels around the best score that belong to it
MIN_PIXELS = 1024  # that vote in both tiles
MIN_CONFIDENCE = 2.5  # reached by 2 in 1,000 pairs that do not belong together

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Shift:
    """Where the content of a tile lies relative to the reference.

    What the reference shows at [row, col], the other tile shows at [row + rows, col + cols]. So with `rows` > 0 the
    other lies too far down, with `cols` > 0 too far right, and moving its content by (-rows, -cols) puts it right.

    Args:
        rows: pixels, within 12.
        cols: pixels, within 12.
        error: expected error in pixels, one standard deviation in the direction that is known least.
        confidence: how far the best score stands above every score elsewhere, in standard deviations of those; at
            least 2.5.
    """

    rows: float
    cols: float
    error: float
    confidence: float


def stand_ins(sensor: str) -> tuple[int, ...]:
    """Indices of the bands whose mean stands for `sensor`: those of its colour picture (VV and VH for s1), or all."""
    row = SENSORS[sensor]
    return tuple(row.band_names.index(name) for name in row.rgb or row.band_names)


def shift(
    reference: Tile, other: Tile, reference_bands: Sequence[int] = (), other_bands: Sequence[int] = ()
) -> Shift | None:
    """By how much `other` lies off `reference`; see `Shift` for the sign.

    Args:
        reference: values [C, H, W], radar in dB; invalid pixels, and those beside them, do not vote.
        other: values [D, H, W], the same H x W.
        reference_bands: indices of the bands whose mean is looked at, such as `stand_ins(sensor)`; empty: all.
        other_bands: the same for `other`.

    Returns:
        None where nothing can be said: fewer than 1,024 pixels that vote in both, no edges, or no shift within
        12 pixels that is clearly the best.

    Raises:
        ValueError: the tiles differ in height or width.
    """
    if reference.valid.shape != other.valid.shape:
        raise ValueError(
            f"tiles of {reference.valid.shape} and {other.valid.shape} pixels: give two tiles of equal height and width"
        )
    if np.count_nonzero(reference.valid & other.valid) < MIN_PIXELS:
        return None
    a, votes_a = _edges(reference, reference_bands)
    b, votes_b = _edges(other, other_bands)
    if np.count_nonzero(votes_a & votes_b) < MIN_PIXELS or not a.any() or not b.any():
        return None
    pad = round(CUT * POOLING)
    return _peak(_blur(_correlate(a, b, REACH + pad), POOLING)[pad:-pad, pad:-pad])


def _edges(tile: Tile, bands: Sequence[int]) -> tuple[Floats, Bools]:
    """Squared normalised gradients [2, H - 2, W - 2] (real and imaginary part) and which pixels vote [H - 2, W - 2]."""
    values = tile.values[list(bands)] if bands else tile.values
    image: Floats = np.where(tile.valid, values.mean(axis=0, dtype=np.float32), np.float32(0))  # [H, W]
    smooth, covered = _blur(image, SMOOTHING), tile.valid
    if not covered.all():  # only where the whole Gaussian lies on valid pixels
        covered = _blur(covered.astype(np.float32), SMOOTHING) > 0.999
    votes = covered[1:-1, 2:] & covered[1:-1, :-2] & covered[2:, 1:-1] & covered[:-2, 1:-1]
    x = (smooth[1:-1, 2:] - smooth[1:-1, :-2]) * votes
    y = (smooth[2:, 1:-1] - smooth[:-2, 1:-1]) * votes
    strength = x * x + y * y
    # A flat tile has zeros above the fraction line and must not have them under it.
    strength += FLOOR * strength.sum() / max(1, np.count_nonzero(votes)) or np.float32(1)
    return np.stack([(x * x - y * y) / strength, 2 * x * y / strength]), votes


def _blur(image: Floats, sigma: float) -> Floats:
    """`image` [H, W] under a Gaussian; beyond the edges their pixels repeat."""
    reach = round(CUT * sigma)
    kernel = np.exp(-0.5 * (np.arange(reach + 1) / sigma) ** 2)
    kernel = (kernel / (2 * kernel.sum() - 1)).astype(np.float32)
    padded = np.pad(image, reach, mode="edge")
    for axis in (0, 1):
        taps = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis)
        padded = kernel[0] * taps[..., reach]
        for step in range(1, reach + 1):
            padded += kernel[step] * (taps[..., reach - step] + taps[..., reach + step])
    return padded


def _correlate(a: Floats, b: Floats, reach: int) -> Floats:
    """Sum over channels and pixels of a(x) b(x + s) for shifts s from -reach to reach [2 reach + 1, 2 reach + 1]."""
    # Zeros beyond the edges, so that no pixel meets one of the opposite edge; multiples of 24 are quick to transform.
    height, width = (-(-(size + reach) // 24) * 24 for size in a.shape[1:])
    padding = ((0, 0), (0, height - a.shape[1]), (0, width - a.shape[2]))
    one, two = (np.fft.rfft2(np.pad(field, padding)) for field in (a, b))
    product = (one.conj() * two).sum(axis=0)
    wanted = np.arange(-reach, reach + 1)
    rows = np.fft.ifft(product, axis=0)[wanted]
    return np.fft.irfft(rows, width, axis=1)[:, wanted].astype(np.float32)


def _peak(scores: Floats) -> Shift | None:
    """The top of a parabola through the best score and its eight neighbours; None where it is not single.

    Scores away from the peak tell the noise: slopes like theirs, at the peak, would move it by slope over curvature.
    That is `error`.
    """
    row, col = divmod(int(scores.argmax()), scores.shape[1])
    if not (0 < row < 2 * REACH and 0 < col < 2 * REACH):
        return None
    rows, cols = np.ogrid[: scores.shape[0], : scores.shape[1]]
    away = (rows - row) ** 2 + (cols - col) ** 2 > PEAK**2
    noise, slopes = float(scores[away].std()), np.array(np.gradient(scores))[:, away]
    slope, curvature = _derivatives(scores[row - 1 : row + 2, col - 1 : col + 2].astype(np.float64))
    flattest = -float(np.linalg.eigvalsh(curvature).max())
    if noise <= 0 or flattest <= 0:
        return None
    confidence = float(scores[row, col] - scores[away].max()) / noise
    error = float(np.sqrt(np.square(slopes).mean())) / flattest
    top = np.linalg.solve(curvature, -slope)
    if confidence < MIN_CONFIDENCE or np.abs(top).max() > 1:
        return None
    return Shift(float(row - REACH + top[0]), float(col - REACH + top[1]), error, confidence)


def _derivatives(s: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Slope [2] and curvature [2, 2] in the middle of `s` [3, 3], by central differences."""
    slope = np.array([s[2, 1] - s[0, 1], s[1, 2] - s[1, 0]]) / 2
    down, right = s[2, 1] + s[0, 1] - 2 * s[1, 1], s[1, 2] + s[1, 0] - 2 * s[1, 1]
    mixed = (s[2, 2] + s[0, 0] - s[2, 0] - s[0, 2]) / 4
    return slope, np.array([[down, mixed], [mixed, right]])
