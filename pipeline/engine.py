"""Engine: the model, its optimiser and its share of the work under DeepSpeed. The only file that imports deepspeed.

Three things are done here so that nobody else has to know them:

- State leaves and enters **by parameter name, in fp32**, whatever the ZeRO stage and the number of ranks. Parameters
  are put into the module before DeepSpeed takes it over (setting its master copy afterwards would leave the first
  forward on stale weights). Moments do not exist before the first step, so one step is made with zero loss at learning
  rate 0, and then they are overwritten. ZeRO 1 and 2 link moments to parameters during the first step, when only the
  first parameter group has any; they are linked again here.
- bf16 and fp16 are autocast over fp32 parameters. DeepSpeed's own modes would cast A, D, dt and norms as well; a
  guard refuses any parameter that is not fp32.
- At a start only rank 0 has read the checkpoint; parameters, moments and average are sent to the others one by one.
- DeepSpeed would compile a shared-memory operator for CPUs at the first start; it is switched off, so that no compiler
  is needed.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from configs import ConfigError
from pipeline.average import Average, full_shape
from pipeline.config import BatchSize, EngineConfig, Optim
from pipeline.optim import parameter_groups
from pipeline.ranks import Ranks, broadcast, device

MOMENTS = ("exp_avg", "exp_avg_sq")
HALF = {"bf16": "bfloat16", "fp16": "float16"}
OFFLOADED = {"optimizer": ("offload_optimizer",), "all": ("offload_optimizer", "offload_param")}


class PrecisionError(TypeError):
    """A parameter that must be float32 is not."""


@dataclass(frozen=True)
class State:
    """What an engine must remember: fp32 on the CPU, by parameter name.

    `moments` has the keys `NAME.exp_avg` and `NAME.exp_avg_sq`; `updates` counts the optimiser's steps (AdamW corrects
    its bias by it); `average` is of the parameters, empty where none is kept.
    """

    parameters: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    updates: int
    average: Mapping[str, Tensor] = field(default_factory=dict)


class Engine:
    """A module in training. Call it like the module; then `backward` per micro-batch and `step` per global batch."""

    def __init__(self, module: nn.Module, optim: Optim, settings: EngineConfig, batch: BatchSize, ranks: Ranks) -> None:
        """Hand `module`, which already holds its parameters, to DeepSpeed.

        Raises:
            ConfigError: the global batch cannot be split over the ranks, the settings need a GPU, or DeepSpeed came to
                other settings than ours.
            PrecisionError: a parameter is not fp32 afterwards.
        """
        self.micro_batch, self.accumulation = batch.split(ranks.world)
        self.ranks, self.zero, self._added = ranks, settings.zero, 0
        self.device = device(ranks)
        check_device(settings, self.device.type)
        deepspeed = _import_deepspeed()
        optimiser = torch.optim.AdamW(parameter_groups(module, optim), lr=optim.lr, betas=optim.betas)
        config = deepspeed_config(optim, settings, batch, ranks.world)
        self._deepspeed = deepspeed.initialize(model=module.to(self.device), optimizer=optimiser, config=config)[0]
        self._optimiser = optimiser
        guard_precision(self.module)
        check_agreement(self._deepspeed, config)
        self.average = Average(self.module, optim.ema) if optim.ema else None
        self._updates = 0

    @property
    def module(self) -> nn.Module:
        """The module as DeepSpeed holds it (under ZeRO 3 its parameters are partitioned)."""
        module: nn.Module = self._deepspeed.module
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward, in the precision of the config."""
        output: Tensor = self._deepspeed(*args, **kwargs)
        return output

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss; over ranks and accumulation the mean is taken."""
        self._deepspeed.backward(loss)
        self._added += 1
        if self._added < self.accumulation:
            self._deepspeed.step()

    def step(self, lr: float) -> float:
        """Update the parameters at learning rate `lr` after the last micro-batch; the gradient's norm before clipping.

        Raises:
            RuntimeError: not as many micro-batches as the accumulation asks for.
        """
        if self._added != self.accumulation:
            raise RuntimeError(f"step() after {self._added} of the global batch's {self.accumulation} micro-batches")
        self._added = 0
        for group in self._optimiser.param_groups:
            group["lr"] = lr * group["lr_scale"]
        norm = self._plain_norm() if self.zero == 0 else None
        self._deepspeed.step()
        self._updates += 1
        if self.average:
            self.average.update(self._updates)
        return float(self._deepspeed.get_global_grad_norm() if norm is None else norm)

    def drop(self, loss: Callable[[], Tensor]) -> None:
        """Forget the micro-batches of a global batch that is not to be trained on. Collective.

        DeepSpeed keeps gradients in other places for every ZeRO stage and empties them all in a step. So it makes one,
        in which the optimiser does nothing.

        Args:
            loss: gives a finite loss for each micro-batch that is missing; of what samples does not matter.
        """
        if not self._added:
            return
        while self._added < self.accumulation:
            self.backward(loss() * 0.0)
        self._added = 0
        self._optimiser.step = lambda *_: None  # type: ignore[method-assign]
        try:
            self._deepspeed.step()
        finally:
            del self._optimiser.step

    def _plain_norm(self) -> float:
        """Norm of the gradient under ZeRO 0, which keeps none."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def gather(self) -> State | None:
        """The whole state on rank 0, None elsewhere. Collective: every rank must call it."""
        self._link_moments()
        parameters, moments, average = {}, {}, {}
        for name, parameter in self.module.named_parameters():
            values = self._full(name, parameter)
            if self.ranks.rank == 0:
                kept = {kind: value.detach().float().cpu().clone() for kind, value in values.items()}
                parameters[name] = kept.pop("value")
                average.update({name: kept.pop("average")} if self.average else {})
                moments.update({f"{name}.{kind}": value for kind, value in kept.items()})
        if self.ranks.rank:
            return None
        return State(parameters, moments, int(next(iter(self._optimiser.state.values()))["step"]), average)

    def _link_moments(self) -> None:
        """Under ZeRO 1 and 2: tell every parameter where its moments lie in the flat partitions."""
        if self.zero not in (1, 2):
            return
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        optimiser = self._deepspeed.optimizer
        for group, flat in zip(optimiser.bit16_groups, optimiser.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, optimiser.optimizer.state)

    def _full(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Value, moments (of one that is trained) and average of one parameter."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not parameter.requires_grad:
            found = {"value": self._frozen(parameter)}
        elif self.zero == 0:
            found = {"value": parameter, **{kind: self._optimiser.state[parameter][kind] for kind in MOMENTS}}
        else:
            found = {"value": safe_get_full_fp32_param(parameter)}
            found |= {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}
        return found | ({"average": self.average.full(name)} if self.average else {})

    def _frozen(self, parameter: nn.Parameter) -> Tensor:
        """Value of a parameter that is not trained, of which DeepSpeed keeps no master copy."""
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], enabled=self.zero == 3):
            return parameter.detach().clone()

    def load(self, state: State, blank: Mapping[str, Tensor]) -> None:
        """Take over moments, average and step count of `state`, whose parameters the module was built with. Collective.

        Args:
            state: from `gather`; only rank 0 needs its tensors.
            blank: any input of the module, for the one step that brings the moments into being.

        Raises:
            ValueError: a moment is missing.
        """
        trained = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]
        names = [f"{name}.{kind}" for name in trained for kind in MOMENTS]
        if missing := [name for name in names if name not in state.moments and self.ranks.rank == 0]:
            raise ValueError(f"the optimiser state lacks {len(missing)} moments of this model, such as {missing[0]}")
        for _ in range(self.accumulation):
            self.backward(self({name: image.to(self.device) for name, image in blank.items()}).sum() * 0.0)
        self.step(lr=0.0)
        self._link_moments()
        for name, parameter in self.module.named_parameters():
            for kind in MOMENTS if parameter.requires_grad else ():
                self._set(parameter, kind, self._sent(parameter, state.moments.get(f"{name}.{kind}")))
            if self.average:  # a run that keeps one only from now on begins with its parameters
                known = state.average.get(name, state.parameters.get(name))
                self.average.load(name, self._sent(parameter, known))
        for slot in self._optimiser.state.values():
            slot["step"].fill_(float(state.updates))
        self._updates = state.updates

    def _sent(self, parameter: nn.Parameter, value: Tensor | None) -> Tensor:
        """Rank 0's value, of the parameter's whole shape, on every rank."""
        there = torch.empty(full_shape(parameter), device=self.device)
        if self.ranks.rank == 0 and value is not None:
            there.copy_(value)
        return broadcast(there)

    def _set(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if self.zero == 0:
            self._optimiser.state[parameter][kind].copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)


def deepspeed_config(optim: Optim, settings: EngineConfig, batch: BatchSize, world: int) -> dict[str, Any]:
    """DeepSpeed's JSON for these settings; the user's own keys are laid under ours."""
    micro_batch, accumulation = batch.split(world)
    config = {
        "steps_per_print": 2**31,
        **settings.deepspeed,
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.clip,
        "zero_optimization": {**settings.deepspeed.get("zero_optimization", {}), "stage": settings.zero},
    }
    if settings.precision != "fp32":
        config["torch_autocast"] = {"enabled": True, "dtype": HALF[settings.precision]}
    if settings.offload != "none":
        config["zero_force_ds_cpu_optimizer"] = False  # its own AdamW has to be compiled
        for what in OFFLOADED[settings.offload]:
            config["zero_optimization"].setdefault(what, {"device": "cpu"})
    return config


def check_device(settings: EngineConfig, kind: str) -> None:
    """Refuse what only a GPU can do.

    Raises:
        ConfigError: fp16 or offloading on a CPU.
    """
    asked = {"engine.precision=fp16": settings.precision == "fp16", "engine.offload": settings.offload != "none"}
    if kind != "cuda" and (found := [name for name, given in asked.items() if given]):
        raise ConfigError(f"{', '.join(found)}: needs a CUDA GPU, this is a {kind}; bf16 and fp32 run everywhere")


def check_agreement(engine: Any, config: Mapping[str, Any]) -> None:
    """Compare what DeepSpeed made of the config with what it was told.

    Raises:
        ConfigError: a key of `engine.deepspeed` changed what a field of ours decides.
    """
    told = {
        "train_batch_size": engine.train_batch_size(),
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "gradient_clipping": engine.gradient_clipping(),
        "zero_optimization.stage": engine.zero_optimization_stage(),
    }
    wanted = {**config, "zero_optimization.stage": config["zero_optimization"]["stage"]}
    if wrong := [f"{key}: {found!r}, not {wanted[key]!r}" for key, found in told.items() if found != wanted[key]]:
        raise ConfigError(f"engine.deepspeed: DeepSpeed runs with {'; '.join(wrong)}; take out the key that does this")


def guard_precision(module: nn.Module) -> None:
    """Refuse a module with any parameter (A, D, the bias of dt and norms above all) that is not fp32.

    Raises:
        PrecisionError: names the first such parameter and its type.
    """
    for name, parameter in module.named_parameters():
        if parameter.dtype != torch.float32:
            raise PrecisionError(
                f"{name} became {parameter.dtype}: parameters must stay float32 and bf16 comes from autocast; write "
                "engine.precision=bf16 and take the key that casts the model out of engine.deepspeed"
            )


def precision_line(found: Mapping[str, torch.dtype], products: str) -> str:
    """What the guard found, in a line: data types of A_log, D, the bias of dt and norms, with how many have each.

    Args:
        found: data type by parameter name, from `MCFMamba.precision`.
        products: precision of the matrix products.
    """
    kinds = {"A_log": "A_log", "D": "D", "dt_bias": "dt bias"}
    counts = Counter((kinds.get(name.rsplit(".", 1)[-1], "norms"), str(kind)) for name, kind in found.items())
    parts = [f"{kind} {dtype.removeprefix('torch.')} ({count})" for (kind, dtype), count in sorted(counts.items())]
    return f"precision: {', '.join(parts)}; matrix products {products}"


def _import_deepspeed() -> Any:
    """DeepSpeed, quiet, without the operator that it would compile, and connected even where there is one rank."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch 2.13 deprecates names that DeepSpeed 0.19 calls at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False)
    return deepspeed
