"""Where the accordion sits, by our setting and the host's own mechanisms."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.embedded import Host
from tests.embedded.host import PROJECT_ROOT
from tests.embedded.probe import PROBE_EXTENSION

OURS, PROBE = "script_txt2img_ipadapter_accordion", "script_txt2img_probe_enable"


@pytest.mark.parametrize(
    ("place", "before", "after"),
    [
        (None, "txt2img_seed", "script_list"),
        ("nonsense out of a file", "txt2img_seed", "script_list"),
        ("before them, where the WebUI sorts them (Forge)", "txt2img_seed", PROBE),
        ("behind them, where the WebUI sorts them (Forge)", PROBE, "script_list"),
        ("below the sampler", "txt2img_scheduler", "txt2img_width"),
        ("below the size", "txt2img_width", "txt2img_cfg_scale"),
        ("below CFG", "txt2img_cfg_scale", PROBE),
        ("where the WebUI's setting of the order of items has 'ip-adapter'", "txt2img_seed", PROBE),
    ],
)
def test_the_accordion_sits_where_the_setting_says(place: str | None, before: str, after: str, tmp_path: Path) -> None:
    settings = {} if place is None else {"ip_adapter_place": place}
    # the probe is loaded first or last, so that being sorted shows
    extensions = [PROBE_EXTENSION, PROJECT_ROOT] if after == PROBE else [PROJECT_ROOT, PROBE_EXTENSION]
    with Host("sd15", extensions, tmp_path / "models", settings=settings) as host:
        ids = [getattr(each, "elem_id", None) for each in host.page.blocks.blocks.values()]
        assert ids.index(before) < ids.index(OURS) < ids.index(after)
        script = host.runners["txt2img"].script_by_title("IP-Adapter")
        assert script is not None
        inputs = host.page.tabs["txt2img"].script_inputs
        assert inputs[script.args_from].elem_id == f"{OURS}-checkbox"
