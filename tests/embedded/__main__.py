"""``python -m tests.embedded``: the embedded host with its page and API."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from . import Host
from .demo_models import make_demo_models
from .shapes import SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.embedded", description=__doc__, epilog="Others go to the host."
    )
    parser.add_argument("--port", type=int, default=7860, help="port of page and API (0: a free one)")
    parser.add_argument("--address", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="sd15", help="layout of the UNet")
    parser.add_argument("--models", type=Path, help="folder with ipadapter/ and clip_vision/ (default: demo models)")
    parser.add_argument("--extension", type=Path, action="append", help="extension folder (default: this project)")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        models = args.models or make_demo_models(Path(temporary, "models")).models_path
        with Host(args.shape, args.extension, models, command_line=flags, verbose=True) as host:
            print(f"Running on {host.launch(args.port, args.address)} (Ctrl+C ends it)", flush=True)
            try:
                while True:
                    time.sleep(3600)
            except KeyboardInterrupt:
                print("ended")


if __name__ == "__main__":
    main()
