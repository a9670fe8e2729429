"""Modules whose parameters stay in fp32 whatever happens to the network around them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


class KeepPrecision(nn.Module):
    """A module that ignores the dtype of `.half()`, `.bfloat16()` and of engines that convert whole networks.

    Moves between devices and conversions to float64 take place.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype in HALF else result

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast switched off for a block; nothing where it is off already, so that torch.export need not record it."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


class LayerNorm(KeepPrecision, nn.LayerNorm):
    """LayerNorm over the last axis, computed in at least fp32, eps 1e-5.

    Under autocast the result stays in that precision, so that the residual stream does; elsewhere it has the
    dtype of the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        if x.is_meta:  # which torch.autocast does not know
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        with full_precision(x.device):
            y = F.layer_norm(wide, self.normalized_shape, self.weight, self.bias, self.eps)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)
