"""Scoring: a model over labelled samples, pooled into one confusion matrix over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.batch import Batch, collate
from pipeline.dataset import micro_batches, read_ahead
from pipeline.metrics import confusion_matrix
from pipeline.model.cmss import hidden_tokens
from pipeline.ranks import Ranks
from shards.contract import Contract, ContractError
from shards.manifest import Selection
from shards.stream import Share, Stream

METRICS = "metrics.json"  # in the run folder of an evaluation


def classify(model: Callable[..., Tensor], batch: Batch, hide: Collection[str] = ()) -> Tensor:
    """Logits [B, K, H, W] of a batch; tokens without a valid pixel are hidden from the model, and these modalities."""
    everywhere = torch.ones(len(batch), dtype=torch.bool, device=batch.positions.device)
    return model(batch.values, hidden_tokens({}, batch.valid, dict.fromkeys(hide, everywhere)))


@torch.no_grad()
def confusion(
    model: Callable[..., Tensor],
    selection: Selection,
    contract: Contract,
    size: int,
    ranks: Ranks,
    device: torch.device,
) -> NDArray[np.int64]:
    """Confusion matrix int64 [K, K] (rows: truth) of every labelled pixel of the selection. Collective.

    Args:
        model: takes images and hidden tokens, as MCFMamba does; in evaluation mode.
        selection: labelled samples; each is scored by one rank.
        contract: how to normalise them, and the classes.
        size: samples per forward.
        ranks: who takes part.
        device: of the model.

    Raises:
        ContractError: the contract has no classes, or a sample no label.
    """
    if contract.classes is None:
        raise ContractError("the data have no classes: scoring needs labelled samples")
    count, ignore = len(contract.classes.names), contract.classes.ignore
    matrix = torch.zeros(count, count, dtype=torch.int64, device=device)
    for batch, counted in equally_many(selection, contract, size, ranks):
        batch = batch.to(device)
        predicted = classify(model, batch).argmax(1)
        if batch.label is None:
            raise ContractError(f"samples without a label among {', '.join(batch.keys)}; write where.labelled=[true]")
        if counted:
            matrix += confusion_matrix(predicted, batch.label, count, ignore)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(matrix)
    return matrix.cpu().numpy()


def equally_many(selection: Selection, contract: Contract, size: int, ranks: Ranks) -> Iterator[tuple[Batch, bool]]:
    """This rank's batches and whether they count: ranks with fewer repeat one, since ZeRO 3's forward is collective."""
    stream = Stream(selection, 0, 1, Share(ranks.world, ranks.world, ranks.rank))
    number = 0
    for batch in read_ahead(micro_batches(stream.once(), size, contract)):
        number += 1
        last = batch
        yield batch, True
    largest_share = -(-len(selection) // ranks.world)
    for _ in range(-(-largest_share // size) - number):
        if not number:
            last = collate([(stream.row(0), 0)], contract)
        yield last, False
