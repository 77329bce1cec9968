"""The always-on script in a stub of a WebUI: arguments, hooks, loading, and others' packages beside it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from fastapi.testclient import TestClient

from tests.embedded.gradio_compat import gr

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sd_image_prompt"
UNIT = {"model": "one.safetensors", "images": "data:image/png;base64,iVBORw0KGgo=", "weight": "0.6"}

FAKE_SESSION = """
from types import SimpleNamespace

from .errors import IPAdapterError

MADE = []


class Session:
    library = SimpleNamespace(listing=lambda: {"adapters": []}, adapter_path=lambda name: None)

    def __init__(self, host, kept_bytes, hashes):
        self.host, self.kept_bytes, self.calls, self.raising = host, kept_bytes, [], {}
        MADE.append(self)

    def _called(self, name, *args, **kwargs):
        self.calls.append((name, args, kwargs))
        if name in self.raising:
            raise self.raising[name]

    def adapters(self):
        return ["one.safetensors"]

    def encoders(self):
        return []

    def choices(self, everything: bool) -> list[tuple[str, str]]:
        return [(name, name) for name in self.adapters()]

    def describe(self, name):
        return ""

    def misfit(self, name):
        return ""

    def applies(self, name):
        return {"needs": {}, "values": {}, "files": {"negative": []}}

    def save_reference(self, unit, name, replace=False):
        self._called("save_reference", unit, name, replace)

    def negatives(self):
        return []

    def prepare(self, p, units, tagged):
        self._called("prepare", p, units)
        return {f"IP-Adapter {number}": f"model: {unit.model}" for number, unit in enumerate(units, 1)}

    def begin(self, p):
        self._called("begin", p)

    def attach(self, p, **kwargs):
        self._called("attach", p, **kwargs)

    def on_step(self, params):
        self._called("on_step", params)

    def finish(self, p, processed, show, save):
        self._called("finish", p, processed, show, save)

    def end(self, p):
        self._called("end", p)

    def fail(self, p, message):
        self._called("fail", p, message)

    def close(self):
        self._called("close")
"""
FAKE_HOSTS = """
class Host(str):
    def adapter_folders(self):
        return []

    encoder_folders = adapter_folders


def detect():
    return Host("a host")
"""


class StubScript:
    """What a WebUI's ``modules.scripts.Script`` gives its subclasses, as far as the script uses it."""

    is_img2img = False

    def elem_id(self, name: str) -> str:
        return f"script_txt2img_ipadapter_{name}"


class StubCheckbox:
    """A checkbox and an accordion in one, in place of a WebUI's ``InputAccordion``."""

    def __init__(self, value: bool, label: str, elem_id: str) -> None:
        self.checkbox = gr.Checkbox(value=value, label=label, elem_id=f"{elem_id}-checkbox", visible=False)
        self.accordion = gr.Accordion(label=label, open=value, elem_id=elem_id)
        self.value, self.label = self.checkbox.value, self.checkbox.label

    def __enter__(self) -> StubCheckbox:
        self.accordion.__enter__()
        return self

    def __exit__(self, *caught: Any) -> None:
        self.accordion.__exit__(*caught)


class WebUI:
    """A WebUI with one extension: a copy of this one whose session only keeps a diary."""

    def __init__(self, extension: Path) -> None:
        self.extension = extension
        self.registered: list[tuple[str, Callable[..., Any]]] = []
        self.always_visible = object()
        self.modules = {
            "modules": ModuleType("modules"),
            "modules.scripts": ModuleType("modules.scripts"),
            "modules.script_callbacks": ModuleType("modules.script_callbacks"),
            "modules.shared": ModuleType("modules.shared"),
            "modules.paths": ModuleType("modules.paths"),
            "modules.ui_components": ModuleType("modules.ui_components"),
        }
        vars(self.modules["modules.scripts"]).update(Script=StubScript, AlwaysVisible=self.always_visible)
        vars(self.modules["modules.script_callbacks"]).update(
            on_app_started=self._registrar("app_started"),
            on_before_ui=self._registrar("before_ui"),
            on_ui_settings=self._registrar("ui_settings"),
            on_cfg_denoiser=self._registrar("cfg_denoiser"),
            on_script_unloaded=self._registrar("script_unloaded"),
        )
        vars(self.modules["modules.shared"]).update(opts=SimpleNamespace(), cmd_opts=SimpleNamespace())
        vars(self.modules["modules.paths"]).update(data_path=str(extension.parent.parent))
        vars(self.modules["modules.ui_components"]).update(InputAccordion=StubCheckbox, ToolButton=gr.Button)
        for name, module in self.modules.items():
            setattr(self.modules["modules"], name.rpartition(".")[2], module)

    def _registrar(self, event: str) -> Callable[[Callable[..., Any]], None]:
        def register(callback: Callable[..., Any]) -> None:  # no ``name=``: not every host takes it
            self.registered.append((event, callback))

        return register

    def load(self) -> Any:
        """Run the script file as a WebUI does at start and at every 'Reload UI'; the module."""
        self.registered.clear()
        path = self.extension / "scripts" / "ip_adapter.py"
        spec = importlib.util.spec_from_file_location("ip_adapter.py", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def callback(self, event: str) -> Callable[..., Any]:
        (callback,) = [callback for name, callback in self.registered if name == event]
        return callback


@pytest.fixture
def webui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebUI]:
    extension = tmp_path / "extensions" / "image-prompt"
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    shutil.copytree(ROOT / "lib_ipadapter", extension / "lib_ipadapter", ignore=ignore)
    shutil.copytree(ROOT / "scripts", extension / "scripts", ignore=ignore)
    (extension / "lib_ipadapter" / "session.py").write_text(FAKE_SESSION, encoding="utf-8")
    (extension / "lib_ipadapter" / "hosts" / "__init__.py").write_text(FAKE_HOSTS, encoding="utf-8")

    stub = WebUI(extension)
    for name, module in stub.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    # The tests' own copy of the package steps aside, and what is imported here is forgotten afterwards.
    before = dict(sys.modules)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # an edited module must not be read from a stale cache
    for name in [name for name in sys.modules if name.partition(".")[0] in (PACKAGE, "lib_ipadapter")]:
        del sys.modules[name]
    yield stub
    for name in [name for name in sys.modules if name.partition(".")[0] in (PACKAGE, "lib_ipadapter")]:
        del sys.modules[name]
    sys.modules.update({name: module for name, module in before.items() if name.partition(".")[0] == "lib_ipadapter"})


@pytest.fixture
def script(webui: WebUI) -> SimpleNamespace:
    module = webui.load()
    return SimpleNamespace(module=module, session=module.session, hooks=module.IPAdapterScript(), webui=webui)


def job() -> SimpleNamespace:
    return SimpleNamespace(extra_generation_params={"Steps": 2})


def names(session: Any) -> list[str]:
    return [name for name, _, _ in session.calls]


# --- The script as the host sees it


def test_the_script_is_always_on_and_alone_in_its_module(script: SimpleNamespace) -> None:
    assert script.hooks.title() == "IP-Adapter"
    assert script.hooks.show(False) is script.hooks.show(True) is script.webui.always_visible
    classes = [each for each in vars(script.module).values() if isinstance(each, type) and issubclass(each, StubScript)]
    assert classes == [script.module.IPAdapterScript]
    assert script.session.host == "a host"


def test_ui_gives_the_checkbox_and_ten_empty_slots(script: SimpleNamespace) -> None:
    with gr.Blocks():
        components = script.hooks.ui(False)
    assert len(components) == 11
    assert [component.value for component in components] == [False, *[""] * 10]
    assert json.loads(json.dumps([component.value for component in components])) == [False, *[""] * 10]
    assert [component.label for component in components] == [
        "IP-Adapter",
        *[f"Unit {n}" for n in range(1, 11)],
    ]


def test_ui_called_again_and_again_has_no_side_effects(script: SimpleNamespace) -> None:
    events = [event for event, _ in script.webui.registered]
    assert events == ["before_ui", "ui_settings", "app_started", "cfg_denoiser", "script_unloaded"]
    state = dict(vars(script.hooks))
    for call in range(10):
        with gr.Blocks():
            assert len(script.hooks.ui(bool(call % 2))) == 11
    assert [event for event, _ in script.webui.registered] == events
    # What an infotext fills is of the last call alone.
    fields, labels = vars(script.hooks).pop("infotext_fields"), vars(script.hooks).pop("paste_field_names")
    assert len(fields) == 12 and len(labels) == 10
    assert vars(script.hooks) == state and script.session.calls == []


def test_a_missing_folder_for_temporary_pictures_is_made(script: SimpleNamespace, tmp_path: Path) -> None:
    """Forge Neo names one that it doesn't make; one that can't be made doesn't cost the page."""
    opts = script.webui.modules["modules.shared"].opts
    (tmp_path / "file").write_text("no folder")
    for folder, made in ((tmp_path / "a" / "b", True), (tmp_path / "file" / "c", False)):
        opts.temp_dir = str(folder)
        with gr.Blocks():
            assert len(script.hooks.ui(False)) == 11
        assert folder.is_dir() is made


def test_decoded_pictures_go_by_the_session(script: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[Any] = []
    monkeypatch.setattr(
        type(script.session), "drop_blank", lambda self, p, images: dropped.append((p, images)), raising=False
    )
    p, batch = job(), SimpleNamespace(images=["one", "two"])
    script.hooks.postprocess_batch_list(p, batch, batch_number=0)
    assert dropped == [(p, batch.images)]


def _login(credentials: Annotated[HTTPBasicCredentials, Depends(HTTPBasic())]) -> None:
    if credentials.password != "secret":
        raise HTTPException(401)


def _host_route() -> list[str]:
    return []


def test_the_list_of_models_asks_for_the_login_of_the_hosts_api(script: SimpleNamespace) -> None:
    app, without_api = FastAPI(), FastAPI()
    app.add_api_route("/sdapi/v1/sd-models", _host_route, dependencies=[Depends(_login)])
    for each in (app, without_api):
        script.webui.callback("app_started")(None, each)
    client = TestClient(app)
    assert client.get("/ip-adapter/models").status_code == 401
    assert client.get("/ip-adapter/models", auth=("somebody", "wrong")).status_code == 401
    assert client.get("/ip-adapter/models", auth=("somebody", "secret")).json() == {"adapters": []}
    assert TestClient(without_api).get("/ip-adapter/models").status_code == 404


def test_the_defaults_of_ui_are_off(script: SimpleNamespace) -> None:
    with gr.Blocks():
        defaults = [component.value for component in script.hooks.ui(False)]
    script.hooks.process(job(), *defaults)
    assert script.session.calls == []


# --- Hooks


def test_hooks_survive_having_no_arguments(script: SimpleNamespace) -> None:
    p = job()
    script.hooks.before_process(p)
    script.hooks.process(p)
    script.hooks.process_before_every_sampling(p)
    script.hooks.postprocess(p, None)
    assert names(script.session) == ["begin", "attach", "finish", "end"]
    assert p.extra_generation_params == {"Steps": 2}


@pytest.mark.parametrize("args", [[True, UNIT], [UNIT], [True, "", json.dumps(UNIT), *[""] * 8]])
def test_hooks_forward_to_the_session(script: SimpleNamespace, args: list[Any]) -> None:
    p, params = job(), object()
    script.hooks.before_process(p, *args)
    script.hooks.process(p, *args)
    script.hooks.process_before_every_sampling(p, *args, x=1, noise=2, c=3, uc=4)
    script.webui.callback("cfg_denoiser")(params)
    script.hooks.postprocess(p, "processed", *args)

    assert names(script.session) == ["begin", "prepare", "attach", "on_step", "finish", "end"]
    calls = {name: (given, named) for name, given, named in script.session.calls}
    (prepared_p, prepared), _ = calls["prepare"]
    assert prepared_p is p
    assert [(unit.model, unit.weight, len(unit.images)) for unit in prepared] == [("one.safetensors", 0.6, 1)]
    assert calls["attach"] == ((p,), {"x": 1, "noise": 2, "c": 3, "uc": 4})
    assert calls["on_step"] == ((params,), {})
    assert calls["finish"] == ((p, "processed", False, False), {})
    assert p.extra_generation_params == {"Steps": 2, "IP-Adapter 1": "model: one.safetensors"}


def test_unloading_closes_the_session(script: SimpleNamespace) -> None:
    script.webui.callback("script_unloaded")()
    assert names(script.session) == ["close"]


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ([True], "no picture in any enabled unit"),
        ([True, {**UNIT, "weight": float("nan")}], 'Unit 1: the field "weight" is NaN'),
        ([True, *[UNIT] * 11], "at most 10 units"),
        ([True, "", {"wieght": 1}], 'Unit 2: the field "wieght" (value 1) is unknown'),
    ],
)
def test_bad_arguments_stop_the_job_with_their_sentence(script: SimpleNamespace, args: list[Any], part: str) -> None:
    p = job()
    script.hooks.process(p, *args)
    ((name, (failed_p, message), _),) = script.session.calls
    assert name == "fail" and failed_p is p and part in message
    assert p.extra_generation_params == {"Steps": 2}


HOOKS = {
    "begin": lambda script, p: script.hooks.before_process(p, True, UNIT),
    "prepare": lambda script, p: script.hooks.process(p, True, UNIT),
    "attach": lambda script, p: script.hooks.process_before_every_sampling(p, True, UNIT, x=1),
    "on_step": lambda script, p: script.webui.callback("cfg_denoiser")(SimpleNamespace(denoiser=SimpleNamespace(p=p))),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_what_the_session_refuses_stops_the_job_with_its_sentence(
    script: SimpleNamespace, hook: str, capsys: pytest.CaptureFixture[str]
) -> None:
    p = job()
    script.session.raising[hook] = script.module.errors.IPAdapterError("The adapter is for SDXL; choose another.")
    HOOKS[hook](script, p)
    assert script.session.calls[-1] == ("fail", (p, "The adapter is for SDXL; choose another."), {})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("hook", HOOKS)
def test_an_unexpected_error_stops_the_job_and_is_traced(
    script: SimpleNamespace, hook: str, capsys: pytest.CaptureFixture[str]
) -> None:
    p = job()
    script.session.raising[hook] = RuntimeError("two\nlines")
    HOOKS[hook](script, p)
    name, (failed_p, message), _ = script.session.calls[-1]
    assert name == "fail" and failed_p is p
    assert "RuntimeError: two lines" in message and "\n" not in message
    traced = capsys.readouterr().err
    assert "Traceback" in traced and "RuntimeError: two\nlines" in traced


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_no_error_passes(script: SimpleNamespace, hook: str, error: type[BaseException]) -> None:
    script.session.raising[hook] = error()
    with pytest.raises(error):
        HOOKS[hook](script, job())
    assert "fail" not in names(script.session)


# --- Loading


def test_the_package_is_loaded_under_a_private_name_only(webui: WebUI) -> None:
    module = webui.load()
    assert [name for name in sys.modules if name.partition(".")[0] == "lib_ipadapter"] == []
    ours = [name for name in sys.modules if name.partition(".")[0] == PACKAGE]
    assert {f"{PACKAGE}.units", f"{PACKAGE}.session", f"{PACKAGE}.ui.accordion"} <= set(ours)
    for name in ours:
        path = Path(str(sys.modules[name].__file__))
        assert path.is_relative_to(webui.extension / "lib_ipadapter"), name
    assert module.units.Unit.__module__ == f"{PACKAGE}.units"


def test_reloading_ejects_the_previous_life(webui: WebUI) -> None:
    first = webui.load()
    stale = importlib.import_module(f"{PACKAGE}.progress")
    units = webui.extension / "lib_ipadapter" / "units.py"
    units.write_text(units.read_text(encoding="utf-8") + "\nEDITED = True\n", encoding="utf-8")

    second = webui.load()
    assert names(first.session) == ["close"]
    assert second.units.EDITED and not hasattr(first.units, "EDITED")
    assert second.session is not first.session and type(second.session) is not type(first.session)
    assert sys.modules.get(f"{PACKAGE}.progress") is not stale
    events = [event for event, _ in webui.registered]
    assert events == ["before_ui", "ui_settings", "app_started", "cfg_denoiser", "script_unloaded"]


def test_a_previous_life_that_cannot_be_closed_does_not_stop_the_next(
    webui: WebUI, capsys: pytest.CaptureFixture[str]
) -> None:
    first = webui.load()
    first.session.raising["close"] = RuntimeError("stuck")
    second = webui.load()
    assert second.session is not first.session
    assert "RuntimeError: stuck" in capsys.readouterr().err


def test_an_unknown_host_is_declined_with_a_sentence(webui: WebUI, capsys: pytest.CaptureFixture[str]) -> None:
    (webui.extension / "lib_ipadapter" / "hosts" / "__init__.py").write_text(
        "from ..errors import IPAdapterError\n\ndef detect():\n    raise IPAdapterError('This host is unknown.')\n",
        encoding="utf-8",
    )
    module = webui.load()
    assert module.IPAdapterScript().show(False) is False
    assert webui.registered == []
    assert capsys.readouterr().err == "This host is unknown.\n"


def test_sdnext_is_declined_and_the_script_stays_out_of_sight(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ROOT / "lib_ipadapter" / "hosts" / "__init__.py", webui.extension / "lib_ipadapter" / "hosts")
    for name in ("modules.sd_hijack", "modules.processing_diffusers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = webui.load()
    assert module.session is None and webui.registered == []
    assert module.IPAdapterScript().show(False) is module.IPAdapterScript().show(True) is False
    said = capsys.readouterr().err
    assert "found SD.Next" in said and said.count("\n") == 1


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_built_in_package_of_the_same_name_stays_importable(
    webui: WebUI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours_first: bool
) -> None:
    built_in = tmp_path / "extensions-builtin" / "forge_ipadapter"
    (built_in / "lib_ipadapter").mkdir(parents=True)
    (built_in / "lib_ipadapter" / "resampler.py").write_text("NAME = 'built-in resampler'\n", encoding="utf-8")
    (built_in / "lib_ipadapter" / "IPAdapterPlus.py").write_text(
        "from lib_ipadapter.resampler import NAME\n", encoding="utf-8"
    )
    others = [entry for entry in sys.path if not (Path(entry or ".") / "lib_ipadapter").exists()]
    roots = [str(webui.extension), str(built_in)]
    monkeypatch.setattr(sys, "path", (roots if ours_first else roots[::-1]) + others)

    webui.load()
    theirs = importlib.import_module("lib_ipadapter.IPAdapterPlus")
    assert theirs.NAME == "built-in resampler"
    assert Path(str(theirs.__file__)).is_relative_to(built_in)
    units = importlib.import_module("lib_ipadapter.units")
    assert units is not sys.modules[f"{PACKAGE}.units"]  # what others import is not what the script runs
