"""An online linear probe: how well a linear classifier does on the frozen features of a pretraining run, while it goes.

The features of a pixel are what the decoder gives and the head is given (Alain & Bengio 2016, arXiv 1610.01644, probe
layers that way). The classifier is least squares to one-hot classes, whose solution needs no steps, no learning rate
and no randomness, but one pass that adds up a matrix; so the number says something about the features alone, and two
runs can be compared by it.

Letters: B batch, H W pixels, C features, K classes, n labelled pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import ConfigError
from pipeline.batch import Batch
from pipeline.config import PretrainConfig, Where
from pipeline.engine import Engine
from pipeline.loop import Hook
from pipeline.metrics import confusion_matrix, scores
from pipeline.model.mcf_mamba import MCFMamba
from pipeline.ranks import Ranks
from pipeline.run import Run, adopt
from pipeline.scoring import classify, confusion, equally_many
from shards.contract import Contract, ContractError
from shards.manifest import ManifestError, Selection, select

RIDGE = 1e-6  # added to the variance of every feature, as a share of its mean square


class Linear(NamedTuple):
    """A linear classifier of pixels: weight [K, C] and bias [K], float64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """[B, C, H, W] -> logits float32 [B, K, H, W]."""
        x = features.float()
        # No convolution, for which torch takes TF32 on a GPU.
        return torch.einsum("bchw,kc->bkhw", x, self.weight.to(x)) + self.bias.to(x)[:, None, None]


def probe(run: Run, engine: Engine, config: PretrainConfig) -> Hook:
    """A hook that fits and scores a linear probe every `probe.every` steps and at the end; nothing without data.

    It gives probe/mIoU, probe/OA and probe/IoU/<class>, in percent as `pipeline.metrics.scores`, and leaves the
    training's state as it is.

    Raises:
        ConfigError: the data have no classes, no labelled samples in one of the two selections, or do not fit the run.
    """
    how = config.probe
    if how.data is None:
        return lambda numbers: {}
    train, test = (
        labelled(run, how.data, where, name).some(how.limit, config.seed)
        for name, where in (("train_where", how.train_where), ("test_where", how.test_where))
    )
    contract = adopt(run.contract, train.contract).restrict(train.contract.sensors)
    names = contract.classes.names if contract.classes else ()
    model, rest = partial(features, engine), (contract, engine.micro_batch, run.ranks, engine.device)

    def score(numbers: Mapping[str, Any]) -> Mapping[str, Any]:
        if numbers["step"] % how.every and numbers["step"] != config.steps:
            return {}
        linear = fit(products(model, train, *rest), len(names))
        found = scores(confusion(lambda *inputs: linear(model(*inputs)), test, *rest), names)
        return {f"probe/{name}": found[name] for name in ("mIoU", "OA", *(f"IoU/{name}" for name in names))}

    return score


def labelled(run: Run, data: str, where: Where, name: str) -> Selection:
    """The labelled samples of one of the probe's selections, with those of the run's modalities that they have.

    Raises:
        ConfigError: there is none, they have no classes, or do not mean what the run's modalities mean.
    """
    allowed = {**where, "labelled": [True]}
    try:
        known = select(data, where=allowed).contract.sensors
        common = [sensor for sensor in run.contract.sensors if sensor in known]
        if not common:
            raise ContractError(f"it has {', '.join(known)}, the run {', '.join(run.contract.sensors)}")
        selection = select(data, modalities=common, where=allowed)
        adopt(run.contract, selection.contract)
    except (ManifestError, ContractError) as error:
        raise ConfigError(
            f"probe.data={data}, probe.{name}={where}: {error}; name a dataset with labelled samples of the run's "
            "modalities, or write probe.data=null"
        ) from None
    if selection.contract.classes is None:
        raise ConfigError(f"probe.data={data} has no classes; name a labelled dataset, or write probe.data=null")
    return selection


@torch.no_grad()
def features(engine: Engine, images: Mapping[str, Tensor], hidden: Mapping[str, Tensor]) -> Tensor:
    """What the network gives its head for images and hidden tokens (as MCFMamba takes them), [B, C, H, W].

    The engine itself is called, and its head watched: under ZeRO 3 no part of the module can be called alone.
    """
    seen: list[Tensor] = []
    head = cast("MCFMamba", engine.module).head
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        engine(images, hidden)
    finally:
        hook.remove()
    return seen[0]


@torch.no_grad()
def products(
    model: Callable[..., Tensor],
    selection: Selection,
    contract: Contract,
    size: int,
    ranks: Ranks,
    device: torch.device,
) -> Tensor:
    """Z Z^T, float64 [C + K, C + K], Z [C + K, n] the features and one-hot classes of all labelled pixels. Collective.

    It holds all that least squares needs: as a pixel has one class, sums over pixels are sums over classes.

    Args:
        model: gives features [B, C, H, W] of images and hidden tokens.
        selection: labelled samples; each is taken by one rank.
        contract: how to normalise them, and the classes.
        size: samples per forward.
        ranks: who takes part.
        device: of the model.

    Raises:
        ContractError: no classes, a sample without a label, or a label code that is no class.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch, counted in equally_many(selection, contract, size, ranks):
        batch = batch.to(device)
        total = total + counted * _products(classify(model, batch), batch, contract)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total


def _products(found: Tensor, batch: Batch, contract: Contract) -> Tensor:
    """The same of one batch and its features [B, C, H, W]; sample by sample, since float64 takes memory."""
    if contract.classes is None or batch.label is None:
        raise ContractError(f"samples without a label among {', '.join(batch.keys)}; name labelled ones")
    count, ignore = len(contract.classes.names), contract.classes.ignore
    confusion_matrix(batch.label, batch.label, count, ignore)  # which refuses unknown codes
    total = found.new_zeros(found.shape[1] + count, found.shape[1] + count, dtype=torch.float64)
    for pixels, label in zip(found, batch.label, strict=True):  # [C, H, W], [H, W]
        there = label != ignore
        truth = F.one_hot(label[there], count).T  # [K, n]
        z = torch.cat([pixels[:, there].double(), truth.double()])
        total += z @ z.T
    return total


def fit(total: Tensor, classes: int) -> Linear:
    """Ridge regression from features to one-hot classes (Hastie et al. 2009, sections 3.4 and 4.2), its bias free.

    Args:
        total: from `products`.
        classes: K.

    Raises:
        ContractError: there was no labelled pixel.
    """
    total = total.cpu()  # the same solution everywhere
    squares, cross, counts = total[:-classes, :-classes], total[:-classes, -classes:], total.diagonal()[-classes:]
    pixels = counts.sum()
    if pixels == 0:
        raise ContractError("no labelled pixel to fit a probe on; check probe.train_where and the label's ignore value")
    mean, share = cross.sum(1) / pixels, counts / pixels  # [C], [K]
    variance = squares / pixels - torch.outer(mean, mean)  # [C, C]
    ridge = RIDGE * squares.diagonal().diag() / pixels
    # Not `solve`: features that are all 0 have a solution too, the most frequent class.
    inverse = torch.linalg.pinv(variance + ridge, hermitian=True)
    weight = (inverse @ (cross / pixels - torch.outer(mean, share))).T  # [K, C]
    return Linear(weight, share - weight @ mean)
