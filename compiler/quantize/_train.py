"""Train one unit against its float output: a quantized region and caches in, learned layers out.

The loop that AdaRound, BRECQ, QDrop and Genie-M share; what they differ in are `TrainOptions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from dfqc.compiler.contracts import Progress
from dfqc.compiler.quantize._learned import DropMasks, LearnedGrid
from dfqc.compiler.quantize._micro import rows_at_once
from dfqc.compiler.quantize._rounding import FlexRounding, LearnedWeight, SoftRounding
from dfqc.compiler.quantize._stream import Rows
from dfqc.compiler.steps import Steps, cosine


class TrainOptions(BaseModel):
    """What the published methods differ in, within one unit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounding: Literal["soft", "flex"] = Field("soft", description="AdaRound's or FlexRound")
    iterations: int = Field(500, ge=1, description="per unit")
    batch_size: int = Field(32, ge=1)
    inputs: Literal["quantized", "float", "mixed"] = Field(
        "mixed", description="of the unit: as the quantized layers before it give, float, or drawn"
    )
    drop: float = Field(0.5, ge=0, lt=1, description="share of elements left unquantized (QDrop)")
    error_weight: float = Field(1.0, ge=0, description="of the error; 0 leaves only `penalty`")
    norm: float = Field(2.0, gt=0, description="of the error")
    round_weight: float = Field(1.0, ge=0, description="weight of the loss that decides rounding")
    undecided: float = Field(
        1.0, gt=0, le=1, description="share of a layer's weights, nearest to halfway, that may flip"
    )
    warm_up: float = Field(0.2, ge=0, lt=1, description="share without that loss")
    power_start: float = Field(20.0, gt=0)
    power_end: float = Field(2.0, gt=0)
    lr_rounding: float = Field(1e-3, ge=0)
    lr_weight_scale: float = Field(1e-4, ge=0)
    lr_act_scale: float = Field(4e-5, ge=0)
    lr_bias: float = Field(0.0, ge=0)
    relative: bool = Field(
        False, description="rates of scales and biases are parts of their own size"
    )


@dataclass(frozen=True)
class UnitData:
    """Rows of one unit: its float input, its input behind quantized layers, its float output."""

    exact: Rows
    quantized: Rows
    target: Rows
    weighting: Rows | None = None  # of the error, like `target` (Fisher)


@dataclass(frozen=True)
class Trained:
    """What the training of a unit says of itself."""

    iterations: int
    shortened: bool
    first_loss: float
    loss: float
    flipped: float  # share of the weights that end on another code than they began on


def train_unit(
    region: nn.Module,
    layers: Sequence[LearnedWeight],
    grids: Sequence[LearnedGrid],
    data: UnitData,
    options: TrainOptions,
    *,
    rng: torch.Generator,
    device: torch.device,
    seconds: float | None,
    progress: Progress,
    penalty: Callable[[Tensor, Tensor], Tensor] | None = None,
    limit: int | None = None,
) -> Trained:
    """Learn rounding, steps and biases of a unit, and leave its layers hard.

    Args:
        region: computes the unit's output from its input, through `layers` and `grids`.
        layers: the unit's weights.
        grids: the unit's activation grids whose scale is to be learned.
        data: rows to train on.
        options: the method.
        rng: of the rows and masks, on `device`.
        device: where it runs.
        seconds: time for it; fewer iterations go through the whole schedule.
        progress: called per iteration.
        penalty: (output, rows' numbers) -> loss to add, for a term on the network's output.
        limit: bytes that a batch's activations may take; beyond it, it goes through in parts.
    """
    before = [layer.quantized().codes for layer in layers]
    optimizers = _optimizers(layers, grids, options)
    if not optimizers:  # nothing that may change: neither weights nor steps
        return Trained(0, False, 0.0, 0.0, 0.0)
    rates = [(group, group["lr"]) for o in optimizers for group in o.param_groups]
    masks = DropMasks(options.drop, rng) if options.drop else None
    for layer in layers:
        layer.soft = options.lr_rounding > 0  # what is not decided here stays as it is
    for grid in grids:
        grid.masks = masks
    steps = Steps(options.iterations, seconds)
    # Written in place: thousands of small tensors among large ones would tear memory to pieces.
    losses = torch.zeros(options.iterations, device=device)
    at_once = len(data.exact)
    for index in _batches(len(data.exact), options.batch_size, steps, rng):
        if steps.done == 0 and limit is not None:
            x, _ = _inputs(data, index[:1], options, None, device)
            at_once = rows_at_once(region, x, limit)
        for part in index.split(at_once):
            x, target = _inputs(data, part, options, masks, device)
            loss = _loss(region(x), target, part, data, options, penalty)
            loss = loss * (len(part) / len(index))
            losses[steps.done] += loss.detach()
            loss.backward()
        deciding = options.round_weight and options.lr_rounding
        if deciding and steps.fraction >= options.warm_up:
            power = _power(steps.fraction, options)
            soft = [layer.undecided(power) for layer in layers if isinstance(layer, SoftRounding)]
            if soft:
                (options.round_weight * torch.stack(soft).sum()).backward()
        for group, rate in rates:
            group["lr"] = rate * (cosine(steps.fraction) if group["falls"] else 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for layer in layers:
            layer.hold_scale()
        for grid in grids:
            grid.hold_scale()
        progress(steps.done + 1, steps.total, "")
    for layer in layers:
        layer.soft = False
    for grid in grids:
        grid.masks = None
    after = [layer.quantized().codes for layer in layers]
    flips = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    few = max(1, steps.done // 20)
    return Trained(
        steps.done,
        steps.shortened,
        losses[:few].mean().item(),
        losses[steps.done - few : steps.done].mean().item(),
        flips / max(1, sum(codes.numel() for codes in after)),
    )


def _loss(
    output: Tensor,
    target: Tensor,
    index: Tensor,
    data: UnitData,
    options: TrainOptions,
    penalty: Callable[[Tensor, Tensor], Tensor] | None,
) -> Tensor:
    """Return what some rows lose: the unit's error, and what the network's output adds."""
    difference = output - target
    if data.weighting is not None:
        difference = difference * data.weighting.read(index, target.device)
    square = options.norm == 2
    error = difference.square() if square else difference.abs().pow(options.norm)
    if error.ndim > 1:  # of channels: tokens have theirs last; one number per image has none
        error = error.sum(-1 if error.ndim == 3 else 1)
    loss = options.error_weight * error.mean()
    return loss if penalty is None else loss + penalty(output, index)


def _optimizers(
    layers: Sequence[LearnedWeight], grids: Sequence[LearnedGrid], options: TrainOptions
) -> list[torch.optim.Optimizer]:
    """Return Adam on what is learned; a rate of 0 freezes its group."""
    rounding: list[nn.Parameter] = []
    for layer in layers:
        if isinstance(layer, SoftRounding):
            rounding.append(layer.position)
        elif isinstance(layer, FlexRounding):
            shared = [layer.rows, layer.columns] if layer.together else []
            rounding += [layer.factors, *shared]
    biases = [layer.bias_ratio for layer in layers if layer.bias_ratio is not None]
    chosen = (
        (rounding, options.lr_rounding, options.rounding == "flex"),
        ([layer.scale_ratio for layer in layers], options.lr_weight_scale, True),
        ([grid.ratio for grid in grids], options.lr_act_scale, True),
        (biases, options.lr_bias, True),
    )
    groups = []
    for parameters, rate, falls in chosen:
        for parameter in parameters:
            parameter.requires_grad_(rate > 0)
        if rate > 0 and parameters:
            groups.append({"params": parameters, "lr": rate, "falls": falls})
    return [torch.optim.Adam(groups)] if groups else []


def _batches(rows: int, size: int, steps: Steps, rng: torch.Generator) -> Iterator[Tensor]:
    """Yield row numbers, every row once before any comes again."""
    size = min(size, rows)
    order = torch.empty(0, dtype=torch.long)
    for _ in steps:
        if len(order) < size:
            order = torch.randperm(rows, generator=rng, device=rng.device).cpu()
        yield order[:size]
        order = order[size:]


def _inputs(
    data: UnitData,
    index: Tensor,
    options: TrainOptions,
    masks: DropMasks | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return the unit's input and its target for some rows."""
    target = data.target.read(index, device)
    if options.inputs == "float":
        return data.exact.read(index, device), target
    x = data.quantized.read(index, device)
    if options.inputs == "mixed" and masks is not None and data.exact is not data.quantized:
        x = torch.lerp(x, data.exact.read(index, device), masks.draw(x.shape))
    return x, target


def _power(fraction: float, options: TrainOptions) -> float:
    """Return the exponent of the rounding loss, which falls linearly after the warm-up."""
    share = (fraction - options.warm_up) / (1 - options.warm_up)
    return options.power_end + (options.power_start - options.power_end) * max(0.0, 1 - share)
