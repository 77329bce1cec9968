"""gradio, importable also beside a huggingface_hub that has dropped a name gradio 4 asks for.

gradio 4 imports ``HfFolder`` for its log-in button, which nothing here uses; newer huggingface_hub (which newer
transformers need) no longer has it. And gradio writes a ``.pyi`` file beside every source file that derives a
component; it is kept from that.
"""

from __future__ import annotations

import huggingface_hub


class _NoToken:
    """Stands for ``HfFolder``: no token is ever read or stored."""

    @staticmethod
    def get_token() -> str | None:
        return None

    @staticmethod
    def save_token(token: str) -> None:
        raise RuntimeError("this program doesn't store access tokens")

    @staticmethod
    def delete_token() -> None: ...


if not hasattr(huggingface_hub, "HfFolder"):
    huggingface_hub.HfFolder = _NoToken

import gradio as gr  # noqa: E402

GRADIO_3 = int(gr.__version__.partition(".")[0]) < 4
if not GRADIO_3:
    from gradio import component_meta

    component_meta.create_or_modify_pyi = lambda *args, **kwargs: None

__all__ = ["GRADIO_3", "gr"]
