"""Where the first value that is not finite comes from: parameters, images, a layer's output, or its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.average import piece
from pipeline.batch import Batch
from pipeline.engine import Engine
from pipeline.ranks import agree, everyone


def diagnose(engine: Engine, loss: Callable[[Batch], Tensor], batches: Iterable[Batch]) -> str:
    """Say which layer was the first with values that are not finite. Collective; spoils the engine's gradients.

    Args:
        engine: as it was when things went wrong.
        loss: runs the model on a micro-batch; its mean loss.
        batches: this rank's micro-batches of the step, as many on every rank.
    """
    found = list(_parameters(engine.module))
    with _watched(engine.module) as seen:
        for batch in batches:
            found += _images(batch)
            value = loss(batch.to(engine.device))
            if not seen and not torch.isfinite(value):
                seen.append("the loss, though the output of every layer is finite")
            # All ranks or none: a backward is collective.
            if not agree(bool(found or seen)):
                engine.backward(value)
            if agree(bool(found or seen)):
                break
    found += seen
    reports = [f"rank {rank}: {first}" for rank, first in enumerate(everyone(found[0] if found else None)) if first]
    return "; ".join(reports) or "none, every parameter, output and gradient is finite"


def _parameters(module: nn.Module) -> Iterator[str]:
    """Under ZeRO 3 every rank looks at its own share."""
    for name, parameter in module.named_parameters():
        if not torch.isfinite(piece(parameter)).all():
            yield f"parameter {name}"


def _images(batch: Batch) -> Iterator[str]:
    for name, image in batch.values.items():
        finite = torch.isfinite(image).flatten(1).all(1)  # [B]
        for key, fine in zip(batch.keys, finite.tolist(), strict=True):
            if not fine:
                yield f"image {name} of sample {key}"


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[str]]:
    """A list that grows by the layers with values that are not finite, in the order in which they appear."""
    seen: list[str] = []

    def check(what: str, values: Tensor) -> None:
        if not torch.isfinite(values).all():
            seen.append(what)

    def watch(name: str, layer: nn.Module) -> Any:
        def look(_layer: nn.Module, _inputs: object, output: object) -> None:
            for tensor in output if isinstance(output, list | tuple) else [output]:
                if isinstance(tensor, Tensor):
                    check(f"output of {name} ({type(layer).__name__})", tensor)
                    if tensor.requires_grad:
                        tensor.register_hook(lambda grad: check(f"gradient at the output of {name}", grad))  # type: ignore[no-untyped-call]

        return layer.register_forward_hook(look)

    handles = [watch(name or "the whole", layer) for name, layer in module.named_modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
