"""The always-on script: units in, one session, host callbacks forwarded to it.

The package is loaded under a private name from its own folder, because a built-in extension of the Forge
family owns the name ``lib_ipadapter``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from modules import script_callbacks, scripts

PACKAGE = "sd_image_prompt"
LIVE_SESSION = "live_session"
"""Attribute of the package that holds the session of this load, for the next load to find."""
KEPT_GB = "ip_adapter_kept_gb"
STORE = "ip_adapter_reference_store"
STORE_MB = "ip_adapter_reference_store_mb"
HIDE_HASHES = "ip_adapter_hide_hashes"
SHOW_STRIP = "ip_adapter_show_strip"
SAVE_REFERENCES = "ip_adapter_save_references"
UNITS_SHOWN = "ip_adapter_units_shown"
NEW_WEIGHT = "ip_adapter_new_weight"
NEW_TIMING = "ip_adapter_new_timing"
NEW_FORMULATION = "ip_adapter_new_formulation"
PLACE = "ip_adapter_place"
"""Keys of our settings."""


def _eject_previous() -> None:
    """End an earlier load's life: 'Reload UI' runs this file anew but keeps every module it had imported."""
    live = getattr(sys.modules.get(PACKAGE), LIVE_SESSION, None)
    if live is not None:
        try:
            live.close()
        except Exception:
            traceback.print_exc()  # an old life that can't be ended must not keep the new one from loading
    for name in [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]:
        del sys.modules[name]


def _load_package() -> None:
    folder = Path(__file__).resolve().parent.parent / "lib_ipadapter"
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package  # before it runs: its relative imports look it up here
    spec.loader.exec_module(package)


def _part(name: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.{name}")


_eject_previous()
_load_package()

api = _part("api")
axes = _part("axes")
cmd_opts = _part("hosts.cmd_opts")
errors = _part("errors")
infotext = _part("infotext")
kept = _part("kept")
references = _part("references")
saved = _part("saved")
tags = _part("tags")
units = _part("units")
accordion = _part("ui.accordion")
handlers = _part("ui.handlers")
extra_networks = _part("hosts.extra_networks")
folders = _part("hosts.folders")
xyz = _part("hosts.xyz")

PLACES: dict[str, tuple[str | None, int]] = {
    "among the other extensions": (None, 0),
    "before them, where the WebUI sorts them (Forge)": (None, -1000),
    "behind them, where the WebUI sorts them (Forge)": (None, 1000),
    "below the sampler": ("sampler", 0),
    "below the size": ("dimensions", 0),
    "below CFG": ("cfg", 0),
    "below the seed": ("seed", 0),
    "where the WebUI's setting of the order of items has 'ip-adapter'": ("ip-adapter", 0),
}
"""By the setting's value: the WebUI's section that the accordion goes into, and how the scripts in it are sorted."""


def _kept_bytes() -> int:
    from modules import shared

    limit: int = kept.limit_bytes(getattr(shared.opts, KEPT_GB, kept.DEFAULT_GB))
    return limit


def _writes_hashes() -> bool:
    from modules import shared

    return not getattr(shared.opts, HIDE_HASHES, False)


def _store_folder() -> Path:
    from modules.paths import data_path

    return Path(data_path, "ip-adapter", "references").absolute()


def _store_rules() -> Any:
    """A WebUI that doesn't say how it was started counts as one that strangers may reach."""
    from modules import shared

    local = not getattr(shared.cmd_opts, "webui_is_non_local", True)
    choice = getattr(shared.opts, STORE, references.LOCAL)
    return references.rules_of(_store_folder(), choice, getattr(shared.opts, STORE_MB, references.DISK_MB), local)


try:
    _host: Any = _part("hosts").detect()
    session: Any = _part("session").Session(_host, _kept_bytes, _writes_hashes)
    downloader: Any = _part("downloads").Downloader(
        _host.adapter_folders, _host.encoder_folders, cmd_opts.extension_access
    )
    references.default.rules = _store_rules
except errors.IPAdapterError as refusal:
    print(refusal, file=sys.stderr)
    session = None  # the script stays out of sight, so none of its hooks is called
setattr(sys.modules[PACKAGE], LIVE_SESSION, session)


@contextmanager
def _failing_loudly(p: Any) -> Iterator[None]:
    """Hosts swallow what a hook raises and draw on without it; so every exception stops the generation."""
    try:
        yield
    except errors.IPAdapterError as error:
        session.fail(p, str(error))
    except Exception as error:
        traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        session.fail(p, f"IP-Adapter stopped on an unexpected error ({reason}); the console has the details.")


class _LastPaste:
    """What a pasted infotext says of us: read once for all the fields that ask for it."""

    def __init__(self) -> None:
        self._of: tuple[Any, Any] = (None, None)

    def __call__(self, params: Any) -> Any:
        of, parsed = self._of
        if of is not params:  # the host hands the same object to every field, and another one for every paste
            parsed = session.read_infotext(params)
            self._of = (params, parsed)
        return parsed


def _unseen(slots: list[str], shown: int) -> list[str]:
    filled = [str(number) for number, slot in enumerate(slots, 1) if slot and number > shown]
    if not filled:
        return []
    return [
        f"Of the units filled here {', '.join(filled)} have no tab, because {shown} are shown; they act all the same: "
        "raise Settings, IP-Adapter, Units shown to see them."
    ]


def _paste_fields(components: list[Any], shown: int) -> tuple[list[tuple[Any, Any]], list[str]]:
    """What an infotext fills, and the labels of it: the checkbox, every slot, and the note on what isn't as it was.

    A unit behind those that have a tab acts all the same, so the note says that it is there.

    All have a value for every infotext, because a field without one would stay as it was.
    """
    last = _LastPaste()
    enabled, *slots = components
    fields: list[tuple[Any, Any]] = [(enabled, lambda params: last(params).enabled)]
    fields += [(slot, lambda params, n=n: last(params).slots()[n]) for n, slot in enumerate(slots[: units.UNIT_SLOTS])]
    note = getattr(enabled, accordion.PASTE_NOTE, None)
    if note is not None:
        fields.append(
            (note, lambda params: handlers.notes([*last(params).notes, *_unseen(last(params).slots(), shown)]))
        )
    return fields, [f"{infotext.KEY} {number}" for number in range(1, units.UNIT_SLOTS + 1)]


class IPAdapterScript(scripts.Script):  # type: ignore[misc]  # a WebUI has no type information
    """Hooks survive having no ``args``: hosts may call them before their default arguments exist."""

    def title(self) -> str:
        """The name in the page, and in lower case the key of ``alwayson_scripts``."""
        return "IP-Adapter"

    def show(self, is_img2img: bool) -> object:
        """Always, in both tabs. Hosts ask before they lay out the page, so where it sits is settled here."""
        from modules import shared

        place = PLACES.get(getattr(shared.opts, PLACE, ""), (None, 0))
        self.section, self.sorting_priority = place
        return scripts.AlwaysVisible if session is not None else False

    def ui(self, is_img2img: bool) -> list[Any]:
        """The components whose values are the arguments of every hook below."""
        from modules import shared
        from modules.ui_components import InputAccordion, ToolButton

        folder = getattr(shared.opts, "temp_dir", "")
        if folder:  # previews go there, and Forge Neo names one that it doesn't make
            with suppress(OSError):  # the page without previews is better than no page
                os.makedirs(folder, exist_ok=True)
        shown = int(getattr(shared.opts, UNITS_SHOWN, accordion.VISIBLE_UNITS))
        new = {
            "weight": getattr(shared.opts, NEW_WEIGHT, 1.0),
            "timing": getattr(shared.opts, NEW_TIMING, units.TIMINGS[0]),
            "formulation": getattr(shared.opts, NEW_FORMULATION, units.FORMULATIONS[0]),
        }
        components: list[Any] = accordion.build(
            session,
            InputAccordion,
            self.elem_id,
            ToolButton,
            downloader,
            shown,
            new,
            _part("hosts.schedules").progress_of_pass,
        )
        self.infotext_fields, self.paste_field_names = _paste_fields(components, shown)
        return components

    def before_process(self, p: Any, *args: object) -> None:
        """A job begins; whatever an earlier one left behind goes, also when this one doesn't use us."""
        with _failing_loudly(p):
            session.begin(p)

    def process(self, p: Any, *args: object) -> None:
        """Read and check the units, and do everything heavy."""
        with _failing_loudly(p):
            enabled, active = units.parse_script_args(axes.overridden(args, axes.of(p), _picture_of_axis(p)))
            tagged = tags.found(p)
            if enabled or tagged:
                if getattr(p, "is_api", False):  # settings about addresses are about the API alone
                    active = [api.fetched(unit, _part("hosts.addresses").fetch, references.add) for unit in active]
                p.extra_generation_params.update(session.prepare(p, active, tagged))

    def process_before_every_sampling(self, p: Any, *args: object, **kwargs: Any) -> None:
        """Before every pass, some hosts twice."""
        with _failing_loudly(p):
            session.attach(p, **kwargs)

    def postprocess_batch_list(self, p: Any, batch: Any, *args: object, **kwargs: Any) -> None:
        """Decoded pictures, before anything is done with them."""
        session.drop_blank(p, batch.images)

    def postprocess(self, p: Any, processed: Any, *args: object) -> None:
        """The job is done."""
        from modules import shared

        show = not getattr(p, "is_api", False) and getattr(shared.opts, SHOW_STRIP, False)
        session.finish(p, processed, show, getattr(shared.opts, SAVE_REFERENCES, False))
        session.end(p)


def _picture_of_axis(p: Any) -> Any:
    """Reads an axis' pictures. Files are read for who sits at the page of a WebUI that strangers don't reach."""
    files = not getattr(p, "is_api", False) and cmd_opts.extension_access()
    return lambda value, unit: axes.picture(value, unit, references.default, files)


def _add_axes() -> None:
    """To X/Y/Z plot, where that is loaded already; once, however often this is called."""
    made = axes.make(session.adapters, session.library.adapter_path, _picture_of_axis, IPAdapterScript().title())
    xyz.add(made, axes.PREFIX)


def _on_before_ui() -> None:
    _add_axes()  # where X/Y/Z plot is loaded after us
    extra_networks.register(tags.NAME)  # hosts have emptied their list of them before


def _on_cfg_denoiser(params: Any) -> None:
    with _failing_loudly(getattr(getattr(params, "denoiser", None), "p", None)):
        session.on_step(params)


def _on_ui_settings() -> None:
    import gradio
    from modules import shared

    options = {
        KEPT_GB: (
            kept.DEFAULT_GB,
            "Memory for loaded models and pictures (GB of RAM; 0: nothing is kept after a generation)",
            gradio.Slider,
            {"minimum": 0, "maximum": 64, "step": 0.5},
        ),
        STORE: (
            references.LOCAL,
            "Keep used reference pictures on disk, so that infotexts bring them back",
            gradio.Radio,
            {"choices": list(references.CHOICES)},
        ),
        STORE_MB: (
            references.DISK_MB,
            "Room for reference pictures on disk (MB; those not used for longest go first)",
            gradio.Slider,
            {"minimum": 16, "maximum": 65536, "step": 16},
        ),
        HIDE_HASHES: (False, "Leave hashes of references out of infotexts", gradio.Checkbox, {}),
        SHOW_STRIP: (False, "Show the references beside the first result in the gallery", gradio.Checkbox, {}),
        SAVE_REFERENCES: (False, "Save the references beside the file of the first result", gradio.Checkbox, {}),
        UNITS_SHOWN: (
            accordion.VISIBLE_UNITS,
            "Units shown in the page (1 to 10; needs 'Reload UI')",
            gradio.Slider,
            {"minimum": 1, "maximum": units.UNIT_SLOTS, "step": 1},
        ),
        NEW_WEIGHT: (
            1.0,
            "Strength that a new unit in the page starts with (needs 'Reload UI')",
            gradio.Slider,
            {"minimum": accordion.PAGE_WEIGHTS[0], "maximum": accordion.PAGE_WEIGHTS[1], "step": 0.05},
        ),
        NEW_TIMING: (
            units.TIMINGS[0],
            "Timing that a new unit in the page starts with (needs 'Reload UI')",
            gradio.Radio,
            {"choices": list(units.TIMINGS)},
        ),
        NEW_FORMULATION: (
            units.FORMULATIONS[0],
            "Formulation that a new unit in the page starts with (needs 'Reload UI')",
            gradio.Radio,
            {"choices": list(units.FORMULATIONS)},
        ),
    }
    text = {"lines": 3, "placeholder": "one folder a line"}
    options[folders.ADAPTERS.own_setting] = (
        "",
        "More folders with IP-Adapter models (one a line; searched before the WebUI's own)",
        gradio.Textbox,
        text,
    )
    options[folders.ENCODERS.own_setting] = (
        "",
        "More folders with image encoders (one a line; searched before the WebUI's own)",
        gradio.Textbox,
        text,
    )
    options[PLACE] = (
        next(iter(PLACES)),
        "Where the accordion sits (needs 'Reload UI')",
        gradio.Dropdown,
        {"choices": list(PLACES)},
    )
    for key, option in options.items():
        shared.opts.add_option(key, shared.OptionInfo(*option, section=("ip_adapter", "IP-Adapter")))


def _block_store(demo: Any, app: Any) -> None:
    """Keeps the page from serving references, used or saved: hosts let it serve all of their data folder."""
    folders = [_store_folder(), _store_folder().parent / saved.FOLDER]
    paths = [str(each) for folder in folders for each in (folder, folder.resolve())]
    for blocks in {id(each): each for each in (demo, getattr(app, "blocks", None)) if each is not None}.values():
        blocked = list(getattr(blocks, "blocked_paths", None) or [])
        blocked += [each for each in dict.fromkeys(paths) if each not in blocked]
        blocks.blocked_paths = blocked


def _on_app_started(demo: Any, app: Any) -> None:
    """Every load gets an app of its own. Our routes are there when the host's API is, and ask for the same logins."""
    _block_store(demo, app)
    loaded = _part("hosts.loaded").loaded_unet
    fetch = _part("hosts.addresses").fetch
    may_see = cmd_opts.extension_access
    answers = api.Answers(session, lambda: loaded(_host), references.default, downloader, fetch, may_see)
    _part("hosts.routes").add_routes(app, answers)


def _on_unloaded() -> None:
    downloader.cancel()
    session.close()


# Once for each load; hosts drop all callbacks before they load scripts anew. Not every host knows ``name=``.
if session is not None:
    _add_axes()  # here for WebUIs that build their scripts' controls before they call anyone
    script_callbacks.on_before_ui(_on_before_ui)
    script_callbacks.on_ui_settings(_on_ui_settings)
    script_callbacks.on_app_started(_on_app_started)
    script_callbacks.on_cfg_denoiser(_on_cfg_denoiser)
    script_callbacks.on_script_unloaded(_on_unloaded)
