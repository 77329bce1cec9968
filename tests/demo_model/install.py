"""The trained model in an AUTOMATIC1111: checkpoint, its configuration, tokeniser, image encoder and adapters."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from lib_ipadapter.errors import IPAdapterError
from lib_ipadapter.hosts.folders import ADAPTERS, ENCODERS
from tests.ldm_yaml import ldm_yaml

from .store import BASE, CHECKPOINT, PLUS, VISION
from .unet import UNetSizes
from .vae import VAESizes

WEIGHTS = Path(__file__).resolve().parent / "weights"
NAME = "ip-adapter-demo"
"""Of the checkpoint there."""
CHECKPOINTS = Path("models", "Stable-diffusion")
TOKENIZER = CHECKPOINTS / f"{NAME}-tokenizer"


def configuration(tokenizer: Path) -> str:
    """The checkpoint's yaml. It holds the path of the tokeniser's folder, so it is written where it is read."""
    unet, vae = UNetSizes(), VAESizes()
    return ldm_yaml(
        unet.channels,
        unet.context,
        vae.ch,
        unet.multiples,
        unet.heads,
        vae.ch_mult,
        vae.num_res_blocks,
        f"{{version: {json.dumps(str(tokenizer))}, layer: last}}",  # a string of JSON is one of YAML
    )


def install(webui: Path) -> dict[Path, bool]:
    """Puts the trained model's files into a WebUI's folders; those that are there already are left alone.

    Returns:
        Where each file is, and whether it was written now; False: it was there already, the same.

    Raises:
        IPAdapterError: if it is no AUTOMATIC1111, or a file of the user's has the name of one of these. Nothing is
            written then.
        OSError: if a file can't be read or written.
    """
    webui = webui.resolve()
    if not (webui / "webui.py").is_file() or not (webui / "models").is_dir():
        raise IPAdapterError(
            f"{webui} is no WebUI's folder (it must have webui.py and models): name the folder that AUTOMATIC1111 "
            "is installed in."
        )
    if (webui / "modules_forge").is_dir() or (webui / "backend").is_dir():
        raise IPAdapterError(
            f"{webui} is a Forge, which recognises checkpoints of their true sizes only and not this small one: "
            "install it into an AUTOMATIC1111, or start dev.py demo without --install."
        )
    files = {webui / place: content for place, content in _files(webui / TOKENIZER).items()}
    there = {path for path in files if os.path.lexists(path)}
    others = [path for path in files if path in there and not _holds(path, files[path])]
    if others:
        names = ", ".join(map(str, others))
        raise IPAdapterError(
            f"Nothing was written, since what is there already under these names is something else: {names}; move or "
            "rename it, then install again."
        )
    for path, content in files.items():
        if path not in there:
            _write(path, content)
    return {path: path not in there for path in files}


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _write(path: Path, content: bytes) -> None:
    """As a whole or not at all, or an interrupted installation would be in the way of the next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", suffix=".part", delete=False) as part:
        beside = Path(part.name)
        part.write(content)
    try:
        beside.chmod(0o644)  # not private, as temporary files are: the WebUI may run as somebody else
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _files(tokenizer: Path) -> dict[Path, bytes]:
    """What goes where, relative to the WebUI's folder."""
    adapters, encoders = (Path("models", places.models[0]) for places in (ADAPTERS, ENCODERS))
    own = {
        CHECKPOINTS / f"{NAME}.safetensors": CHECKPOINT,
        encoders / VISION: VISION,
        adapters / BASE: BASE,
        adapters / PLUS: PLUS,
    }
    files = {place: (WEIGHTS / name).read_bytes() for place, name in own.items()}
    files |= {TOKENIZER / path.name: path.read_bytes() for path in sorted((WEIGHTS / "tokenizer").iterdir())}
    files[CHECKPOINTS / f"{NAME}.yaml"] = configuration(tokenizer).encode("utf-8")
    return files
