"""Pictures of what a dataset holds: a modality in colour, classes in theirs. No pyplot, no global state.

Letters in the comments: C bands; H, W pixels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from shards.contract import Classes, Modality
from shards.sensors import SENSORS

Picture = NDArray[np.float32]
"""A colour picture [H, W, 3], 0 to 1."""

GREY = 0.6  # where a picture has nothing to show


@dataclass(frozen=True)
class Stretch:
    """Per channel of a picture, the values [channels] that become black and full colour.

    In between, brightness is the share of the way to the power of `gamma`; None: that which suits the kind of sensor.
    """

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    gamma: float | None = None

    @staticmethod
    def of(modality: Modality, values: NDArray[Any], valid: NDArray[np.bool_]) -> Stretch:
        """2nd and 98th percentile of the valid pixels of each channel; the clip range where there is none."""
        channels = _channels(modality, np.asarray(values, dtype=np.float32))
        if not valid.any():
            low, high = (np.array([limit], dtype=np.float32) for limit in modality.clip)
            return Stretch(low, high)
        low, high = np.percentile(channels[:, valid], (2, 98), axis=1).astype(np.float32)
        return Stretch(low, np.maximum(high, low + 1e-4 * (modality.clip[1] - modality.clip[0])))


def picture(
    modality: Modality, values: NDArray[Any], valid: NDArray[np.bool_], stretch: Stretch | None = None
) -> Picture:
    """Physical `values` [C, H, W] as a colour picture [H, W, 3]; grey where not `valid` [H, W].

    Optical: the sensor's true colour bands. Radar: VV, VH and their ratio. Elevation: shaded relief. The stretch is
    that of the valid pixels, unless one is given (to show two arrays in the same colours).
    """
    values = np.asarray(values, dtype=np.float32)
    stretch = stretch or Stretch.of(modality, values, valid)
    channels = _channels(modality, values)
    shape = (-1, 1, 1)
    image = (channels - stretch.low.reshape(shape)) / (stretch.high - stretch.low).reshape(shape)
    usual = 0.7 if SENSORS[modality.sensor].kind == "optical" else 1.0  # clouds leave land dark
    image = image.clip(0, 1) ** (stretch.gamma or usual)
    image = np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0)
    return np.where(valid[..., None], image, np.float32(GREY)).astype(np.float32)


def _channels(modality: Modality, values: Picture) -> Picture:
    """The one or three channels [1 or 3, H, W] that show `values` [C, H, W] best."""
    sensor = SENSORS[modality.sensor]
    bands = [modality.bands.index(name) for name in sensor.rgb if name in modality.bands]
    if sensor.kind == "elevation":
        return _relief(values[0])[None]
    if len(bands) == 3:
        return values[bands]
    if len(bands) == 2:  # two polarisations in dB: their difference is the ratio of the powers
        return np.stack([values[bands[0]], values[bands[1]], values[bands[0]] - values[bands[1]]])
    return values[:1]


def _relief(height: Picture) -> Picture:
    """Shade [H, W] of a surface in metres, lit from the upper left."""
    down, right = np.gradient(height)
    return np.asarray(right + down, dtype=np.float32)


def terrain(height: NDArray[Any], valid: NDArray[np.bool_], limits: tuple[float, float], steep: float) -> Picture:
    """Heights [H, W] in metres as shaded relief with a tint of height [H, W, 3], lit from the upper left.

    Args:
        height: of the surface.
        valid: where `height` is one; slopes beside other pixels count as flat.
        limits: the heights that get the lowest and the highest colour.
        steep: metres per pixel that are drawn as a slope of 45 degrees.
    """
    down, right = slopes(height, valid) / max(steep, 1e-6)
    # Lambert's cosine law for light from 45 degrees above the horizon: (-1, -1, sqrt 2) / 2 in columns, rows, height.
    light = ((down + right) / 2 + 0.5**0.5) / np.sqrt(1 + down**2 + right**2)
    low, high = limits
    tint = _tint((np.where(valid, height, low) - low) / max(high - low, 1e-6))
    image = tint * (0.28 + 0.76 * light.clip(0, 1))[..., None]  # flat ground is darker than slopes in the light
    return np.asarray(image.clip(0, 1), dtype=np.float32)


def _tint(share: NDArray[Any]) -> Picture:
    """Colours [..., 3] of heights, 0 the lowest and 1 the highest: green, yellow, brown, white; no blue, no water."""
    stops = np.array([[110, 160, 105], [205, 210, 140], [214, 176, 115], [165, 122, 90], [240, 234, 226]]) / 255
    places = np.linspace(0, 1, len(stops))
    channels = [np.interp(share, places, stops[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


def slopes(height: NDArray[Any], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Rise per pixel [2, H, W] of heights [H, W], downwards and to the right; 0 beside invalid pixels.

    Of a smoothed surface: heights in whole metres, and those of larger pixels, are staircases.
    """
    whole = np.pad(valid, 1, mode="edge")
    inside = whole[1:-1, 2:] & whole[1:-1, :-2] & whole[2:, 1:-1] & whole[:-2, 1:-1] & valid
    weight = _smoothed(valid.astype(np.float32))
    surface = _smoothed(np.where(valid, height, 0).astype(np.float32)) / np.maximum(weight, np.float32(1e-6))
    return np.asarray(np.stack([np.gradient(surface, axis=axis) for axis in (0, 1)]) * inside, dtype=np.float32)


def _smoothed(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """`image` [H, W] under a Gaussian of two pixels; beyond the edges their pixels repeat."""
    reach = np.arange(-5, 6)
    kernel = np.exp(-0.5 * (reach / 2.0) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for axis in (0, 1):
        padded = np.pad(image, [(5, 5) if axis == side else (0, 0) for side in (0, 1)], mode="edge")
        image = np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis) @ kernel
    return image


def coloured(numbers: NDArray[Any], classes: Classes) -> Picture:
    """Class numbers [H, W] as a picture in the colours of the classes; other numbers grey."""
    table = np.full((256, 3), GREY, dtype=np.float32)
    table[: len(classes.palette)] = np.array(classes.palette, dtype=np.float32) / 255
    return table[np.asarray(numbers, dtype=np.uint8)]


def plain(text: str) -> str:
    """`text` as it is, also where it holds the dollar signs that matplotlib reads as formulas."""
    return text.replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """The figure as a PNG file; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi="figure", metadata={"Software": None})
    return buffer.getvalue()
