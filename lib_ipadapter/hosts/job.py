"""What is the same in every WebUI of the family: the job, its sampler, its ways to end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ..errors import ERROR_KEY, IPAdapterError
from ..masks import PIXELS, WHOLE, Region

SAMPLE_METHODS = ("sample", "sample_img2img")


def queue() -> AbstractContextManager[Any]:
    """The lock that the page's and the API's jobs wait for."""
    lock: AbstractContextManager[Any] = import_module("modules.call_queue").queue_lock
    return lock


def was_stopped() -> bool:
    """Whether the person at the page has interrupted or skipped."""
    state = import_module("modules.shared").state
    return bool(state.interrupted or state.skipped)


def wrap_sampler(
    p: Any,
    after: Callable[[], None],
    finally_: Callable[[], None] = lambda: None,
    end_by_comment: Callable[[str], bool] = lambda _: False,
) -> None:
    """Calls ``after`` when ``p``'s sampler has run to its end, and ``finally_`` however it ended.

    A sentence of ours that ends it is told to the jobs outside, and to ``end_by_comment``; if that returns True the
    sampler returns a blank latent instead of raising.

    The sampler object is the pass's own. img2img keeps one for a whole batch count, so a second wrapping replaces the
    first.
    """
    for name in SAMPLE_METHODS:
        method = getattr(p.sampler, name, None)
        if method is None:
            continue
        # Another extension's wrapper around ours may carry copies of its attributes; ours names itself.
        ours = getattr(method, "image_prompt_wrapper", None) is method
        original = method.image_prompt_original if ours else method

        def sample(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            try:
                result = _original(*args, **kwargs)
                if not was_stopped():
                    after()
                return result
            except IPAdapterError as error:
                tell_outer_jobs(p, str(error))
                if not end_by_comment(str(error)):
                    raise
                return _blank(*args)
            finally:
                finally_()

        sample.image_prompt_original = original  # type: ignore[attr-defined]
        sample.image_prompt_wrapper = sample  # type: ignore[attr-defined]
        setattr(p.sampler, name, sample)


def drawn_region(p: Any) -> Region:
    """The part of the canvas that ``p``'s coming pass draws.

    Inpainting 'only masked' takes a crop out of the picture to inpaint, which is the canvas, and scales it into the
    latent; where the crop has another shape, it lies in the middle and what it lacks is filled with its edges. A hires
    pass to a size of another shape than the first pass's cuts off both ends of what that has drawn.
    """
    paste_to, pictures = getattr(p, "paste_to", None), getattr(p, "init_images", None)
    if getattr(p, "inpaint_full_res", False) and getattr(p, "image_mask", None) is not None and paste_to and pictures:
        x, y, width, height = map(float, paste_to)
        canvas_width, canvas_height = pictures[0].size
        shape = p.width / p.height
        wide, high = max(width, height * shape), max(height, width / shape)
        left, top = x - (wide - width) / 2, y - (high - height) / 2
        return Region(
            left / canvas_width,
            top / canvas_height,
            (left + wide) / canvas_width,
            (top + high) / canvas_height,
            (canvas_width, canvas_height),
        )
    cut_x, cut_y = (int(getattr(p, name, 0) or 0) for name in ("truncate_x", "truncate_y"))
    if getattr(p, "is_hr_pass", False) and (cut_x or cut_y):
        columns, rows = p.hr_upscale_to_x // PIXELS, p.hr_upscale_to_y // PIXELS
        left, top = (cut_x // 2) / columns, (cut_y // 2) / rows
        return Region(left, top, left + (columns - cut_x) / columns, top + (rows - cut_y) / rows, (p.width, p.height))
    return WHOLE


def skip_sampling(p: Any) -> None:
    """Lets ``p``'s sampler, if it has one already, return a blank latent at once."""
    if getattr(p, "sampler", None) is not None:
        for name in SAMPLE_METHODS:
            setattr(p.sampler, name, lambda *args, **_: _blank(*args))


def _blank(p: Any, latent: Tensor, *_: Any) -> Tensor:
    """Of the shape of a sampling method's first latent."""
    return torch.zeros_like(latent)


def fail(p: Any, message: str) -> None:
    """Ends the job with the sentence.

    Hosts swallow whatever a script raises in a hook. ``p.init``, called right after the hook ``process``, and the
    sampler's methods aren't wrapped, so these raise in its place.
    """

    def raiser(*args: Any, **kwargs: Any) -> None:
        raise IPAdapterError(message)

    tell_outer_jobs(p, message)
    p.init = raiser
    if getattr(p, "sampler", None) is not None:
        for name in SAMPLE_METHODS:
            setattr(p.sampler, name, raiser)


def tell_outer_jobs(p: Any, message: str) -> None:
    """Writes the sentence where the people see it whose job goes on although ``p``, a job inside it, fails.

    That is the comments and the parameters of every job, and of every result, that waits for ``p`` further up the
    stack: no host keeps a list of them, and what raised isn't heard of again.
    """
    processing: Any = import_module("modules.processing")
    seen: list[object] = [p]
    for frame in _outer_frames(p):
        for value in list(frame.f_locals.values()):
            if any(value is each for each in seen):
                continue
            if isinstance(value, processing.StableDiffusionProcessing):
                value.comment(message)
            elif isinstance(value, processing.Processed):
                value.comments += f"{message}\n"
            else:
                continue
            seen.append(value)
            value.extra_generation_params[ERROR_KEY] = message
    if len(seen) > 1:
        p.extra_generation_params[ERROR_KEY] = message  # an X/Y/Z grid takes its parameters from its first cell


def is_nested(p: Any) -> bool:
    """Whether ``p`` was started by a hook of another job. A cell of X/Y/Z plot, say, isn't: it is a job by itself."""
    return _is_below(p, ("process_images_inner",))


def is_inside_another(p: Any) -> bool:
    """Whether ``p`` was started by another job, in a script's hook, or by a selectable script such as X/Y/Z plot.

    These go on when ``p`` raises, or have no use for a job without pictures.
    """
    return _is_below(p, ("process_images_inner", "run"))


def _is_below(p: Any, functions: tuple[str, ...]) -> bool:
    """Whether ``p`` was started, however far below, in one of these functions that have a job ``p`` of their own."""
    processing: Any = import_module("modules.processing")
    return any(
        frame.f_code.co_name in functions and isinstance(frame.f_locals.get("p"), processing.StableDiffusionProcessing)
        for frame in _outer_frames(p)
    )


def _outer_frames(p: Any) -> Iterator[FrameType]:
    """The frames above those in which ``p`` is worked on, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    outside = False
    while frame is not None:
        if outside:
            yield frame
        elif frame.f_code.co_name == "process_images" and frame.f_locals.get("p") is p:
            outside = True
        frame = frame.f_back
