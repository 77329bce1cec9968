"""One training loop for all stages: bfloat16 on a GPU with float32 masters, an average of the weights, a time budget.

The learning rate follows the share of the stage's time that is over, so any budget gives a whole cosine. On a GPU the
step is recorded as a CUDA graph, for the networks are so small that launching their kernels takes longest; where
recording fails the same step runs as it is.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)
REPORTED = 10.0
"""Seconds between two lines of progress."""
ENOUGH = 0.97
"""Share of a stage after which it counts as done: what is left isn't worth another start."""

everywhere_bfloat16 = False
"""Compute on a CPU as on a GPU, to try that out."""


def compute_dtype(device: torch.device) -> torch.dtype:
    """What networks compute in while they are trained."""
    return torch.bfloat16 if device.type == "cuda" or everywhere_bfloat16 else torch.float32


@dataclass
class Budget:
    """How long a stage may still run, and how much of its whole it had before.

    Attributes:
        seconds: of the whole stage over all calls.
        spent: seconds of it in earlier calls.
        until: moment (``time.monotonic()``) at which this call must save.
        max_steps: an end by steps, for trying out.
    """

    seconds: float
    spent: float
    until: float
    max_steps: int | None = None
    begun: float = field(default_factory=time.monotonic)

    def share(self, steps: int) -> float:
        """Part of the stage that is over, 0 to 1."""
        if self.max_steps is not None:
            return min(1.0, steps / self.max_steps)
        return min(1.0, self.total() / self.seconds)

    def total(self) -> float:
        """Seconds spent on the stage, those of earlier calls too."""
        return self.spent + time.monotonic() - self.begun

    def done(self, steps: int) -> bool:
        """Whether the stage as a whole has had its time."""
        return self.share(steps) >= ENOUGH

    def over(self, steps: int) -> bool:
        """Whether this call must end the stage or leave it."""
        return self.share(steps) >= 1.0 or time.monotonic() >= self.until


def learning_rate(share: float, steps: int, peak: float, warm_up: int) -> float:
    """Half a cosine over the stage, after a rise over the first steps of a call."""
    return peak * min(1.0, (steps + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * share)) + 1e-7


class Trainer:
    """AdamW on float32 masters of the modules' weights.

    Args:
        modules: what is trained; their weights are the start. They are brought to ``dtype`` in place.
        loss: of a batch; a dict of scalars, of which ``loss`` is minimised. It must not wait for the device.
        peak: highest learning rate.
        device: where all this is.
        decay: of the average of the weights.
        weight_decay: of matrices and convolutions.
        slow: by how much the rates of some modules are lower, by name.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        loss: Callable[[Batch], dict[str, Tensor]],
        peak: float,
        device: torch.device,
        decay: float = 0.999,
        weight_decay: float = 0.01,
        warm_up: int = 200,
        slow: Mapping[str, float] | None = None,
    ) -> None:
        self.modules = dict(modules)
        self.loss = loss
        self.peak, self.decay, self.warm_up = peak, decay, warm_up
        self.device = device
        self.gpu = device.type == "cuda"
        dtype = compute_dtype(device)
        self.names: list[str] = []
        self.parameters: list[Tensor] = []
        scales, decays = [], []
        masters: list[Tensor] = []
        for name, module in self.modules.items():
            originals = {n: p.detach().to(device, torch.float32).clone() for n, p in module.named_parameters()}
            module.to(device, dtype).train().requires_grad_(True)
            for n, parameter in module.named_parameters():
                self.names.append(f"{name}.{n}")
                self.parameters.append(parameter)
                masters.append(originals[n])
                scales.append((slow or {}).get(name, 1.0))
                decays.append(weight_decay if parameter.ndim > 1 else 0.0)
        self.masters = masters
        self.average = [m.clone() for m in masters]
        self.first = [torch.zeros_like(m) for m in masters]
        self.second = [torch.zeros_like(m) for m in masters]
        self.scales, self.decays = scales, decays
        # what changes from step to step lies on the device, so that a recorded step reads it
        self.rates = [torch.zeros((), device=device) for _ in sorted(set(scales))]
        self.corrections = torch.ones(2, device=device)
        self.keep = torch.zeros((), device=device)
        self.steps = 0
        self.penalty = 1.0
        self.results: dict[str, Tensor] = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: Batch = {}
        self._try_graph = self.gpu
        self._good = [m.clone() for m in masters]

    # one step ---------------------------------------------------------------------------------------------------------

    def _compute(self, batch: Batch) -> dict[str, Tensor]:
        results = self.loss(batch)
        found = torch.autograd.grad(results["loss"], self.parameters, allow_unused=True)
        gradients = [torch.zeros_like(m) if g is None else g.float() for g, m in zip(found, self.masters, strict=True)]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (1.0 / (norm + 1e-6)).clamp(max=1.0))
        torch._foreach_lerp_(self.first, gradients, 0.1)
        torch._foreach_mul_(self.second, 0.99)
        torch._foreach_addcmul_(self.second, gradients, gradients, 0.01)
        # update = first / c1 / (sqrt(second / c2) + eps)
        size = torch._foreach_sqrt(self.second)
        torch._foreach_mul_(size, self.corrections[1])
        torch._foreach_add_(size, 1e-8)
        update = torch._foreach_div(self.first, size)
        torch._foreach_mul_(update, self.corrections[0])
        decayed = torch._foreach_mul(self.masters, self.decays)
        torch._foreach_add_(update, decayed)
        for rate, scale in zip(self.rates, sorted(set(self.scales)), strict=True):
            chosen = [u for u, s in zip(update, self.scales, strict=True) if s == scale]
            torch._foreach_mul_(chosen, rate)
        torch._foreach_sub_(self.masters, update)
        torch._foreach_copy_([p.detach() for p in self.parameters], self.masters)
        torch._foreach_mul_(self.average, self.keep)
        torch._foreach_add_(self.average, torch._foreach_mul(self.masters, 1.0 - self.keep))
        return {name: value.detach() for name, value in results.items()} | {"norm": norm}

    def _record(self, batch: Batch) -> None:
        """Record the step as a CUDA graph over a copy of ``batch``."""
        self._static = {name: value.clone() for name, value in batch.items()}
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.results = self._compute(self._static)
        self._graph = graph

    def step(self, batch: Batch, share: float) -> dict[str, Tensor]:
        """One step; ``share`` of the stage is over. Its figures stay on the device."""
        rate = self.penalty * learning_rate(share, self.steps, self.peak, self.warm_up)
        for tensor, scale in zip(self.rates, sorted(set(self.scales)), strict=True):
            tensor.fill_(rate * scale)
        n = self.steps + 1
        self.corrections[0].fill_(1.0 / (1.0 - 0.9**n))
        self.corrections[1].fill_(1.0 / math.sqrt(1.0 - 0.99**n))
        self.keep.fill_(min(self.decay, (1 + n) / (10 + n)))
        if self._graph is None and self._try_graph and self.steps >= 5:
            self._try_graph = False
            try:
                self._record(batch)
            except RuntimeError as error:
                self._graph = None
                torch.cuda.synchronize()
                print(f"  no CUDA graph ({str(error).splitlines()[0][:200]}): each step is launched", flush=True)
        if self._graph is not None:
            for name, value in batch.items():
                self._static[name].copy_(value)
            self._graph.replay()
        elif self.gpu and self.steps < 5:
            # warm-up on a side stream, as recording wants it
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.results = self._compute(batch)
            torch.cuda.current_stream().wait_stream(side)
        else:
            self.results = self._compute(batch)
        self.steps = n
        return self.results

    # the loop ---------------------------------------------------------------------------------------------------------

    def run(self, title: str, batches: Callable[[], Batch], budget: Budget) -> dict[str, float]:
        """Train until the budget is over; the last figures, averaged over the last reports."""
        last: dict[str, float] = {}
        reported = time.monotonic()
        checked = 0
        while not budget.over(self.steps):
            self.step(batches(), budget.share(self.steps))
            now = time.monotonic()
            if now - reported < REPORTED and self.steps - checked < 400 and not budget.over(self.steps):
                continue
            figures = {name: float(value) for name, value in self.results.items()}
            if not all(math.isfinite(value) for value in figures.values()):
                self._restore()
                reported, checked = now, self.steps
                continue
            for into, weight in zip(self._good, self.masters, strict=True):
                into.copy_(weight)
            for name, value in figures.items():
                last[name] = value if name not in last else 0.7 * last[name] + 0.3 * value
            if now - reported >= REPORTED or budget.over(self.steps):
                self._progress(title, budget, figures, (self.steps - checked) / max(now - reported, 1e-6))
                reported, checked = now, self.steps
        if self.gpu:
            torch.cuda.synchronize()
        return last

    def _restore(self) -> None:
        """Go back to the last good weights at half the rate."""
        self.penalty *= 0.5
        print(f"  not finite at step {self.steps}: back to the last good weights, rate x {self.penalty}", flush=True)
        for n, good in enumerate(self._good):
            self.masters[n].copy_(good)
            self.average[n].copy_(good)
            self.parameters[n].detach().copy_(good)
            self.first[n].zero_()
            self.second[n].zero_()
        self.steps = 0

    def _progress(self, title: str, budget: Budget, figures: Mapping[str, float], pace: float) -> None:
        share = budget.share(self.steps)
        bar = "#" * round(20 * share)
        rest = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"{title:8} [{bar:20}] {100 * share:3.0f} %  step {self.steps}  {pace:.1f}/s  {rest}", flush=True)
        sys.stdout.flush()

    def averaged(self) -> dict[str, dict[str, Tensor]]:
        """The averaged weights by module."""
        found: dict[str, dict[str, Tensor]] = {name: {} for name in self.modules}
        for name, value in zip(self.names, self.average, strict=True):
            module, own = name.split(".", 1)
            found[module][own] = value
        return found

    def finish(self) -> None:
        """Put the averaged weights into the modules, in float32 for what comes next, frozen."""
        self._graph = None
        for name, weights in self.averaged().items():
            module = self.modules[name]
            module.float().eval().requires_grad_(False)
            module.load_state_dict(weights)


def working_copy(module: Module, device: torch.device) -> Module:
    """A copy of what a stage uses and doesn't train, in the dtype of its computation; the weights stay unrounded."""
    made = copy.deepcopy(module).to(device, compute_dtype(device)).eval()
    made.requires_grad_(False)
    return made
