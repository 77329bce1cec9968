"""Nothing to install, so this prints nothing and does nothing.

A WebUI runs this file once before it starts. The extension needs torch, safetensors, numpy, Pillow and gradio, all of
which every host ships, in whatever version it ships them.
"""
