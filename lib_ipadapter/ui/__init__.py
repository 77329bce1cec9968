"""The part of the page: the only place in this package that imports gradio."""
