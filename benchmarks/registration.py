"""Registration: shifts planted in real and made-up pairs of optical and radar tiles, pairs that do not belong, time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.timing import compare
from shards.register import Shift
from tests.conftest import REAL_DATA
from tests.registration import Pair, distance, made_up_pairs, planted_shifts, real_pairs

SHIFTS = [shift for seed in range(5) for shift in planted_shifts(seed)]


def run() -> None:
    """The tables of docs/registration.md; without real data only those of the made-up archive."""
    if REAL_DATA.is_dir():
        _real(real_pairs(REAL_DATA))
    else:
        print(f"\n{REAL_DATA} is absent: no real pairs")
    pairs = list(made_up_pairs(planted_shifts()))
    errors = [distance(found, rows, cols) for pair, rows, cols in pairs if (found := pair.shift())]
    print(f"\nMade-up pairs, 192 px, shift known exactly: {_spread(errors, len(pairs))}")
    print(f"Made-up pairs that do not belong: {_unrelated([pair for pair, _, _ in pairs])}")
    _time()


def _real(pairs: list[Pair]) -> None:
    by_length: dict[float, list[float]] = {}
    print("\nReal pairs: shift found, expected error, confidence; then errors of planted shifts, relative to it")
    for pair in pairs:
        own, errors = pair.shift(), []
        for rows, cols in SHIFTS if own else []:
            found = pair.planted(rows, cols).shift()
            if own and found:
                errors.append(distance(found, own.rows + rows, own.cols + cols))
                by_length.setdefault(round(float(np.hypot(rows, cols)), 1), []).append(errors[-1])
        print(f"  {pair.name:<26} {_text(own):<44} planted: {_spread(errors, len(SHIFTS)) if own else '-'}")
    print("\nThe same errors by length of the planted shift, pixels")
    for length, errors in sorted(by_length.items()):
        print(f"  {length:<4} median {np.median(errors):.2f}, 90 % below {np.quantile(errors, 0.9):.2f}")
    print(f"\nWindows against the whole tile: {_windows(pairs)}")
    print(f"Real pairs that do not belong: {_unrelated(pairs)}")


def _text(found: Shift | None) -> str:
    if found is None:
        return "none"
    return f"({found.rows:+.2f}, {found.cols:+.2f}) +- {found.error:.2f}, confidence {found.confidence:.1f}"


def _spread(errors: list[float], tried: int) -> str:
    if not errors:
        return f"0 of {tried} found"
    median, high = np.quantile(errors, [0.5, 0.9])
    return f"{len(errors)} of {tried} found, median {median:.2f}, 90 % below {high:.2f}, worst {max(errors):.2f}"


def _windows(pairs: list[Pair], size: int = 96) -> str:
    errors, tried = [], 0
    for pair in pairs:
        whole, side = pair.shift(), pair.optical.valid.shape[0]
        if whole is None or side < 2 * size:
            continue
        for row in range(0, side - size + 1, 32):
            for col in range(0, side - size + 1, 32):
                found, tried = pair.window(row, col, size).shift(), tried + 1
                errors += [distance(found, whole.rows, whole.cols)] if found else []
    return f"{size} px, {_spread(errors, tried)}"


def _unrelated(pairs: list[Pair], size: int = 96) -> str:
    found = tried = 0
    for a in pairs:
        for b in pairs:
            for turn in range(4) if a is not b else ():
                one, two = a.window(0, 0, size), b.window(0, 0, size)
                values, valid = np.rot90(two.radar.values, turn, (1, 2)), np.rot90(two.radar.valid, turn)
                radar = replace(two.radar, values=values, valid=valid)
                found += replace(one, radar=radar, radar_bands=b.radar_bands).shift() is not None
                tried += 1
    return f"{found} of {tried} given a shift ({size} px)"


def _time() -> None:
    pair, _, _ = next(made_up_pairs([(0.0, 0.0)], 512))
    sizes = {f"{size} px": pair.window(256 - size // 2, 256 - size // 2, size) for size in (256, 64, 128, 512)}
    compare("One pair, 3 + 2 bands", {name: window.shift for name, window in sizes.items()}, 21)
