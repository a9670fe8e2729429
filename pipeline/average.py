"""The moving average of a model's parameters, held in the same pieces as the engine holds the parameters.

Averaged weights generalise better than the last ones (Polyak & Juditsky 1992); the decay is raised slowly, min(decay,
(1 + n) / (10 + n)) after n updates, so that the random start is soon forgotten. Under ZeRO 3 a rank holds and averages
its piece of every parameter alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Average:
    """fp32, by parameter name. Made when the engine holds the parameters, of which it begins as a copy."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay, self._parameters = decay, dict(module.named_parameters())
        self._pieces = {name: piece(parameter).detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the parameters after this many updates."""
        weight = 1 - min(self._decay, (1 + updates) / (10 + updates))
        now = [piece(parameter) for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._pieces.values()), now, weight)

    def full(self, name: str) -> Tensor:
        """The average of a whole parameter. Collective under ZeRO 3."""
        own, parameter = self._pieces[name], self._parameters[name]
        shape = full_shape(parameter)
        if own.shape == shape:
            return own
        pieces = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(pieces, own)
        return torch.cat(pieces)[: shape.numel()].view(shape)

    def load(self, name: str, value: Tensor) -> None:
        """Go on from a whole parameter's average; every rank gives the same."""
        own = self._pieces[name]
        if own.shape != value.shape:
            rank, flat = torch.distributed.get_rank(), value.flatten()
            value = torch.zeros_like(own)
            mine = flat[rank * own.numel() : (rank + 1) * own.numel()]
            value[: mine.numel()] = mine
        own.copy_(value)


def piece(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: all of it, or under ZeRO 3 its equal share of the flat values, padded."""
    held: Tensor = getattr(parameter, "ds_tensor", parameter.data)
    return held


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter, also where ZeRO 3 has partitioned it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
