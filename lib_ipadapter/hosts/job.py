"""What is the same in every WebUI of the family: the job, its sampler, its ways to end."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..errors import IPAdapterError

SAMPLE_METHODS = ("sample", "sample_img2img")


def was_stopped() -> bool:
    """Whether the person at the page has interrupted or skipped."""
    state = import_module("modules.shared").state
    return bool(state.interrupted or state.skipped)


def wrap_sampler(p: Any, after: Callable[[], None], finally_: Callable[[], None] = lambda: None) -> None:
    """Calls ``after`` when ``p``'s sampler has run to its end, and ``finally_`` however it ended.

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
            finally:
                finally_()

        sample.image_prompt_original = original  # type: ignore[attr-defined]
        sample.image_prompt_wrapper = sample  # type: ignore[attr-defined]
        setattr(p.sampler, name, sample)


def fail(p: Any, message: str) -> None:
    """Ends the job with the sentence.

    Hosts swallow whatever a script raises in a hook. ``p.init``, called right after the hook ``process``, and the
    sampler's methods aren't wrapped, so these raise in its place.
    """

    def raiser(*args: Any, **kwargs: Any) -> None:
        raise IPAdapterError(message)

    p.init = raiser
    if getattr(p, "sampler", None) is not None:
        for name in SAMPLE_METHODS:
            setattr(p.sampler, name, raiser)
