"""What the engine asks of a WebUI. One class a kind of host implements it; nothing else imports a WebUI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from ..injection import Injection
from ..layers import LayerKey
from ..masks import Region

T = TypeVar("T")


@dataclass(frozen=True)
class UNetInfo:
    """The UNet that is loaded now."""

    identity: object
    """The live module: a refiner or a hires checkpoint brings another one."""
    keys: tuple[LayerKey, ...]
    """Its cross-attention layers in the order of an adapter file."""
    widths: tuple[int, ...]
    """Width of each of them."""
    context_width: int
    device: torch.device
    dtype: torch.dtype
    """What it computes in."""


class Host(Protocol):
    """A WebUI, seen from the engine."""

    name: str
    first_role: int
    """The role whose rows come first when a UNet call has both."""

    def adapter_folders(self) -> Sequence[Path]:
        """Folders where adapters and negatives may lie."""

    def encoder_folders(self) -> Sequence[Path]:
        """Folders where image encoders may lie."""

    def run(self, module: nn.Module, function: Callable[[torch.device, torch.dtype], T]) -> T:
        """A :class:`..encoding.Runner` under the host's memory rules; the module is off the device afterwards."""

    def alone(self) -> AbstractContextManager[Any]:
        """While this is entered, no generation runs: the device is the caller's."""

    def unet_info(self, p: Any) -> UNetInfo:
        """The UNet that ``p`` will sample with now.

        Raises:
            IPAdapterError: for a model without the cross-attention layers of SD1.x, SD2.x or SDXL.
        """

    def attach(self, p: Any, injection: Injection) -> None:
        """Lets ``injection`` act in ``p``'s UNet. Replaces what an earlier call attached; keeps what others did."""

    def detach(self, p: Any) -> None:
        """Takes everything of ours out again; harmless when there is nothing."""

    def check(self, p: Any, injection: Injection, identity: object) -> bool:
        """Called before a pass's UNet calls: attaches again what another extension overwrote.

        Returns:
            Whether the UNet is still the one of :attr:`UNetInfo.identity`; if not, nothing is attached.
        """

    def on_step(self, params: Any) -> None:
        """Takes from the host's denoiser callback what the step's UNet calls will need."""

    def region(self, p: Any) -> Region:
        """The part of the canvas that the coming pass draws: less than all of it where it inpaints 'only masked'."""

    def around_sampling(self, p: Any, after: Callable[[], None]) -> None:
        """Calls ``after`` when the coming pass has run to its end; what ``after`` raises ends the job."""

    def fail(self, p: Any, message: str) -> None:
        """Ends this generation with the sentence, in the page and in the API, wherever in a job it is called."""

    def fail_in_sampling(self, p: Any, message: str) -> None:
        """Ends a generation whose sampling has begun; its next UNet call raises the sentence."""

    def was_ended_by_comment(self, p: Any) -> bool:
        """Whether a sentence ended ``p`` without an exception, so that its pictures mean nothing."""

    def comment(self, p: Any, message: str) -> None:
        """Shows a sentence under the gallery; the job goes on."""

    def is_nested(self, p: Any) -> bool:
        """Whether an extension started ``p`` inside another job, as face detailers do."""
