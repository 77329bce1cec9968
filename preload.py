"""Command-line flags for the folders where model files lie."""

from __future__ import annotations

from argparse import ArgumentParser


def preload(parser: ArgumentParser) -> None:
    """Called by the WebUI before it parses its command line."""
    parser.add_argument("--ip-adapter-models-path", default=None, help="folder with IP-Adapter models")
    parser.add_argument("--ip-adapter-encoders-path", default=None, help="folder with CLIP vision image encoders")
