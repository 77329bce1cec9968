"""Life of a host: what it enters into the process, what it takes away again, and how it loads extensions."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.embedded import Host
from tests.embedded.probe import PROBE_EXTENSION, SMALL, record, run


def stand_ins() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in ("modules", "backend", "modules_forge")]


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def test_hosts_come_and_go() -> None:
    path, names = list(sys.path), set(sys.modules)
    first = Host("sd15", [PROBE_EXTENSION])
    assert "modules.scripts" in sys.modules
    assert str(PROBE_EXTENSION) in sys.path
    picture = run(first).image.tobytes()
    shared = sys.modules["modules.shared"]
    with Host("sdxl", [PROBE_EXTENSION]) as second:
        assert sys.modules["modules.shared"] is not shared
        assert sys.modules["modules.shared"].sd_model is second.sd_model
        a, b = (run(second, prompt=p, steps=4).image for p in ("a fox", "a blue car"))
        assert np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() > 5
    assert stand_ins() == []
    assert sys.path == path
    assert not {n for n in set(sys.modules) - names if "probe" in n} - {"tests.embedded.probe"}
    with Host("sd15", []) as bare:
        # an extension that does nothing leaves no trace in the picture
        assert bare.txt2img(**SMALL).image.tobytes() == picture
    first.activate()
    assert run(first).image.tobytes() == picture
    first.deactivate()
    first.deactivate()
    assert stand_ins() == []


def test_what_extensions_import() -> None:
    with Host("sd15", [], models_path="some/models"):
        from backend import memory_management  # type: ignore[import-not-found]
        from backend.attention import attention_function  # type: ignore[import-not-found]
        from backend.patcher.base import ModelPatcher  # type: ignore[import-not-found]
        from modules import paths, script_callbacks, scripts, shared  # type: ignore[import-not-found]
        from modules.api.api import decode_base64_to_image  # type: ignore[import-not-found]
        from modules.ui_components import InputAccordion  # type: ignore[import-not-found]

        assert Path(paths.models_path) == Path("some/models").resolve()
        assert memory_management.get_torch_device().type == "cpu"
        assert callable(script_callbacks.on_infotext_pasted)
        assert callable(scripts.basedir)
        assert shared.sd_model.forge_objects.unet.clone().model.predictor.sigmas.shape == (1000,)
        assert all(callable(f) for f in (attention_function, ModelPatcher, decode_base64_to_image, InputAccordion))
        with pytest.raises(ModuleNotFoundError):
            import modules.sd_hijack  # type: ignore[import-not-found]  # noqa: F401


def test_a_script_is_loaded_as_the_hosts_do_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write(one, "helper_of_one.py", "VALUE = 5\n")
    write(two, "helper_of_two.py", "VALUE = 6\n")
    write(
        one,
        "scripts/a.py",
        "import sys, helper_of_one, helper_of_two\n"
        "from modules import scripts\n"
        "assert __name__ == 'a.py' and __name__ not in sys.modules\n"
        "assert sys.path[0] == scripts.basedir()\n"
        "class Base(scripts.Script):\n"
        "    def title(self): return 'One'\n"
        "    def show(self, is_img2img): return scripts.AlwaysVisible\n"
        "class Other(Base):\n"
        "    def title(self): return 'Other'\n"
        "    def show(self, is_img2img): return not is_img2img\n"
        "    def run(self, p, *args):\n"
        "        from modules.processing import process_images\n"
        "        import late_helper\n"
        "        p.seed = 9\n"
        "        return process_images(p)\n",
    )
    write(one, "late_helper.py", "")
    write(one, "scripts/b.py", "raise RuntimeError('broken script')\n")
    write(one, "scripts/c.txt", "not python")
    write(
        two,
        "scripts/private.py",
        (
            "import importlib.util, sys, pathlib\n"
            "file = pathlib.Path(__file__).parents[1] / 'library' / 'top.py'\n"
            "spec = importlib.util.spec_from_file_location('private_name', file)\n"
            "sys.modules['private_name'] = module = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(module)\n"
        ),
    )
    write(two, "library/top.py", "VALUE = 7\n")
    with Host("sd15", [one, two]) as host:
        assert [r.message for r in host.errors] == ["Error loading script: b.py"]
        assert "RuntimeError: broken script" in capsys.readouterr().err
        runner = host.runners["txt2img"]
        assert [s.title() for s in runner.alwayson_scripts] == ["One"]
        assert [s.title() for s in runner.selectable_scripts] == ["Other"]
        assert host.runners["img2img"].selectable_scripts == []
        assert [str(one) in sys.path, str(two) in sys.path, "private_name" in sys.modules] == [True] * 3
        assert host.txt2img(**SMALL, script_name="other").info["seed"] == 9
    assert "private_name" not in sys.modules


def test_reload_ui_loads_scripts_anew_and_keeps_the_model() -> None:
    with Host("sd15", [PROBE_EXTENSION]) as host:
        first, model = record(), host.sd_model
        picture = run(host).image.tobytes()
        host.reload_ui()
        assert "script_unloaded" in first.hooks
        assert record() is not first
        assert host.sd_model is model
        assert run(host).image.tobytes() == picture
        assert first.models == [model]
        assert record().models == [model]
        host.load_model("sdxl")
        assert [m.is_sdxl for m in record().models] == [False, True]
        assert run(host).image.tobytes() != picture
        assert record().hooks[0] == "before_process"


def test_command_line_flags_of_extensions(tmp_path: Path) -> None:
    write(tmp_path, "preload.py", "def preload(parser):\n    parser.add_argument('--own-dir', default=None)\n")
    with Host("sd15", [tmp_path], command_line=["--own-dir", "there"]):
        from modules.shared import cmd_opts  # type: ignore[import-not-found]

        assert (cmd_opts.own_dir, cmd_opts.listen, cmd_opts.api) == ("there", False, True)
    write(tmp_path, "preload.py", "raise RuntimeError('broken preload')\n")
    with Host("sd15", [tmp_path]) as host:
        assert [str(report.error) for report in host.errors] == ["broken preload"]


def test_ui_is_called_three_times_a_tab() -> None:
    with Host("sd15", [PROBE_EXTENSION]):
        assert record().ui_calls == ["txt2img", "img2img", "txt2img", "txt2img", "img2img", "img2img"]


def test_an_unknown_shape_is_refused_without_a_trace() -> None:
    with pytest.raises(ValueError, match="sd15"):
        Host("sd3", [])
    assert stand_ins() == []
