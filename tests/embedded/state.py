"""``shared.state`` and ``shared.opts``: what a job is doing, and the settings."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any


class State:
    """Progress of the running job and the flags that stop it."""

    def __init__(self) -> None:
        self.skipped = False
        self.interrupted = False
        self.stopping_generation = False
        self.job = ""
        self.job_no = 0
        self.job_count = 0
        self.processing_has_refined_job_count = False
        self.job_timestamp = "0"
        self.sampling_step = 0
        self.sampling_steps = 0
        self.current_latent: Any = None
        self.current_image: Any = None
        self.textinfo: str | None = None
        self.time_start = time.time()

    def skip(self) -> None:
        self.skipped = True

    def interrupt(self) -> None:
        self.interrupted = True

    def stop_generating(self) -> None:
        self.stopping_generation = True

    def nextjob(self) -> None:
        self.job_no += 1
        self.sampling_step = 0

    def begin(self, job: str = "(unknown)") -> None:
        """Reset everything for a new job, the flags included."""
        self.__init__()  # type: ignore[misc]
        self.job_count = -1
        self.job_timestamp = datetime.now().strftime("%Y%m%d%H%M%S")
        self.job = job

    def end(self) -> None:
        self.job = ""
        self.job_count = 0

    def dict(self) -> dict[str, Any]:
        keys = ("skipped", "interrupted", "stopping_generation", "job", "job_count", "job_timestamp", "job_no")
        return {key: getattr(self, key) for key in (*keys, "sampling_step", "sampling_steps")}

    @property
    def progress(self) -> float:
        """Share of the job that is done, 0..1."""
        if self.job_count <= 0:
            return 0.0
        within = self.sampling_step / self.sampling_steps if self.sampling_steps else 0.0
        return min(1.0, (self.job_no + within) / self.job_count)


class OptionInfo:
    """One setting: default, label, component of the Settings page and its section."""

    def __init__(
        self,
        default: Any = None,
        label: str = "",
        component: Any = None,
        component_args: Any = None,
        onchange: Callable[[], None] | None = None,
        section: tuple[str, str] | None = None,
        refresh: Any = None,
        comment_before: str = "",
        comment_after: str = "",
        infotext: str | None = None,
        restrict_api: bool = False,
        category_id: str | None = None,
    ) -> None:
        self.default = default
        self.label = label
        self.component = component
        self.component_args = component_args
        self.onchange = onchange
        self.section = section
        self.refresh = refresh
        self.comment_before = comment_before
        self.comment_after = comment_after
        self.infotext = infotext
        self.restrict_api = restrict_api
        self.category_id = category_id
        self.do_not_save = False

    def info(self, info: str) -> OptionInfo:
        self.comment_after += f"<span class='info'>({info})</span>"
        return self

    def html(self, html: str) -> OptionInfo:
        self.comment_after += html
        return self

    def link(self, label: str, url: str) -> OptionInfo:
        self.comment_before += f"[<a href='{url}' target='_blank'>{label}</a>]"
        return self

    def needs_reload_ui(self) -> OptionInfo:
        return self.info("requires Reload UI")

    def needs_restart(self) -> OptionInfo:
        return self.info("requires restart")


DEFAULTS: dict[str, OptionInfo] = {
    "sd_model_checkpoint": OptionInfo("", "Stable Diffusion checkpoint"),
    "return_grid": OptionInfo(True, "Show the grid in results for web"),
    "grid_only_if_multiple": OptionInfo(True, "Do not save grids consisting of one picture"),
    "grid_save": OptionInfo(False, "Always save all generated image grids"),
    "enable_pnginfo": OptionInfo(True, "Write infotext to metadata of the generated image"),
    "samples_format": OptionInfo("png", "File format for images"),
    "skip_early_cond": OptionInfo(0.0, "Ignore negative prompt during early sampling"),
    "s_min_uncond": OptionInfo(0.0, "Negative Guidance minimum sigma"),
    "s_min_uncond_all": OptionInfo(False, "Negative Guidance minimum sigma all steps"),
    "CLIP_stop_at_last_layers": OptionInfo(1, "Clip skip"),
    "live_previews_enable": OptionInfo(False, "Show live previews of the created image"),
}


class Options:
    """Settings by name, as attributes; unknown names can be set as plain attributes, as on the hosts."""

    data: dict[str, Any]
    data_labels: dict[str, OptionInfo]

    def __init__(self) -> None:
        object.__setattr__(self, "data_labels", dict(DEFAULTS))
        object.__setattr__(self, "data", {k: v.default for k, v in DEFAULTS.items()})

    def __getattr__(self, key: str) -> Any:
        data = object.__getattribute__(self, "data")
        if key in data:
            return data[key]
        raise AttributeError(f"'Options' object has no attribute {key!r}")

    def __setattr__(self, key: str, value: Any) -> None:
        if key in self.data or key in self.data_labels:
            self.data[key] = value
        else:
            object.__setattr__(self, key, value)

    def set(self, key: str, value: Any, is_api: bool = False, run_callbacks: bool = True) -> bool:
        """Set an option and call its ``onchange``; whether it changed."""
        if self.data.get(key) == value:
            return False
        option = self.data_labels.get(key)
        if option is not None and is_api and option.restrict_api:
            return False
        setattr(self, key, value)
        if run_callbacks and option is not None and option.onchange is not None:
            option.onchange()
        return True

    def get_default(self, key: str) -> Any:
        option = self.data_labels.get(key)
        return None if option is None else option.default

    def add_option(self, key: str, info: OptionInfo) -> None:
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)

    def onchange(self, key: str, func: Callable[[], None], call: bool = True) -> None:
        self.data_labels[key].onchange = func
        if call:
            func()
