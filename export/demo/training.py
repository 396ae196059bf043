"""What both trainings share: initial weights, optimisers, and a loop that logs, saves and resumes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def unit_gain_(module: nn.Module) -> None:
    """Weights of variance 1 / fan_in, biases zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv3d):
            fan_in = layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=fan_in**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def save(value: Any, path: Path) -> None:
    """torch.save under a temporary name, then renamed: a file that exists is whole."""
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    os.replace(partial, path)


class Checkpoint:
    """The training loop's memory: every `every` steps the state of all parts goes to `path`, atomically.

    Beside it `<path>.log.jsonl` gains one line of averaged measurements at each save.
    """

    def __init__(self, path: Path, parts: Mapping[str, Any], every: int):
        self.path, self.parts, self.every = path, parts, every
        self.log_path = path.with_suffix(".log.jsonl")
        self.recent: dict[str, list[float]] = {}
        self.done = 0
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.done = state.pop("step")
            for name, part in parts.items():
                part.load_state_dict(state[name])

    def steps(self, total: int, measures: Mapping[str, Callable[[], float]]) -> Iterator[int]:
        """Yields the steps that are left; saves and logs along the way."""
        start, first = time.time(), self.done
        for step in range(first, total):
            yield step
            if (step + 1) % self.every == 0 or step + 1 == total:
                self._save(step + 1)
                line = {name: sum(v) / len(v) for name, v in self.recent.items()}
                line |= {name: measure() for name, measure in measures.items()}
                line = {"step": step + 1, "steps_per_second": (step + 1 - first) / (time.time() - start), **line}
                self.recent.clear()
                with self.log_path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)

    def log(self, **values: float) -> None:
        for name, value in values.items():
            self.recent.setdefault(name, []).append(value)

    def _save(self, step: int) -> None:
        save({"step": step, **{name: part.state_dict() for name, part in self.parts.items()}}, self.path)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised for matrices by five Newton-Schulz steps (Jordan 2024), in fp32.

    torch.optim.Muon does the same in bf16, which most CPUs only emulate. A convolution counts as a matrix of its
    output channels against all else; parameters of one shape are updated together.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:  # an image passes by the convolutions over time
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for parameters in shapes.values():
                update = torch.stack([self._momentum(p, group["momentum"]).flatten(1) for p in parameters])
                scale = 0.2 * max(update.shape[1:]) ** 0.5  # the size of an AdamW step
                for parameter, direction in zip(parameters, self._orthogonal(update), strict=True):
                    parameter.add_(direction.reshape(parameter.shape), alpha=-group["lr"] * scale)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None
        buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)

    def _orthogonal(self, x: Tensor) -> Tensor:
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        a, b, c = self.COEFFICIENTS
        for _ in range(5):
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
        return x.mT if tall else x


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of a model's weights, which is what is kept in the end."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def mixed(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several weights of one model: better than each where one was trained on from another.

    Source: model soups, Wortsman et al. 2022, arXiv:2203.05482.
    """
    return {name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]}


def trapezoid(step: int, steps: int, flat: float) -> float:
    """A learning rate's share of its peak: up for 100 steps, flat for the share `flat` of all, then down to zero."""
    return min(1.0, (step + 1) / 100, (steps - step) / ((1 - flat) * steps))


class Optimizers:
    """Muon for the matrices inside the network, AdamW for its ends, norms and biases."""

    def __init__(self, model: nn.Module, muon_rate: float, adamw_rate: float):
        inner: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            is_matrix = name.endswith("weight") and parameter.ndim in (2, 5)
            is_end = any(end in name for end in ("conv_in", "conv_out", "embed", "_out", "time_", "bias"))
            (inner if is_matrix and not is_end else rest).append(parameter)
        self.rates = (muon_rate, adamw_rate)
        self.parts = (
            Muon(inner, muon_rate),
            torch.optim.AdamW(rest, adamw_rate, betas=(0.9, 0.97), weight_decay=0.0),
        )

    def step(self, factor: float) -> None:
        """One update at this share of the peak learning rates."""
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])
