"""Nothing to install: the extension runs on torch, safetensors, numpy, gradio and Pillow as every host ships them."""
