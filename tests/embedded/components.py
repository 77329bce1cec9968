"""Small parts of the hosts' page code that extensions import, in their gradio 4 form."""

from __future__ import annotations

import html
from functools import wraps
from typing import Any

from PIL import Image

from . import images
from .gradio_compat import GRADIO_3, gr
from .state import OptionInfo


class FormComponent:
    """Mixin of the hosts' layout components."""

    def get_expected_parent(self) -> Any:
        return gr.components.Form


class FormRow(gr.Row):
    """A row of form components."""

    def get_block_name(self) -> str:
        return "row"


class FormColumn(gr.Column):
    """A column of form components."""

    def get_block_name(self) -> str:
        return "column"


class FormGroup(gr.Group):
    """A group of form components."""

    def get_block_name(self) -> str:
        return "group"


class FormHTML(gr.HTML):
    """HTML inside a form."""

    def get_block_name(self) -> str:
        return "html"


class ToolButton(gr.Button):
    """A small button with a symbol on it."""

    @wraps(gr.Button.__init__)  # gradio reads the signature to know what to tell the page
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        classes = [*kwargs.pop("elem_classes", []), "tool"]
        kwargs.pop("tooltip", None)
        super().__init__(*args, elem_classes=classes, **kwargs)

    def get_block_name(self) -> str:
        return "button"


class DropdownMulti(gr.Dropdown):
    """A dropdown in which several entries may be chosen."""

    @wraps(gr.Dropdown.__init__)
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(multiselect=True, **kwargs)

    def get_block_name(self) -> str:
        return "dropdown"


class InputAccordionImpl(gr.Checkbox):
    """An accordion with a checkbox in its title; as a component it is the checkbox (value: bool).

    The page's script puts the visible checkbox (id ``<elem_id>-visible-checkbox``) on the accordion and keeps this
    hidden one (id ``<elem_id>-checkbox``) in step; ticking opens the accordion.
    """

    _count = 0

    @wraps(gr.Checkbox.__init__)
    def __init__(self, value: bool | None = None, setup: bool = False, **kwargs: Any) -> None:
        if not setup:
            super().__init__(value=value, **kwargs)
            return
        self.accordion_id = kwargs.pop("elem_id", None)
        if self.accordion_id is None:
            self.accordion_id = f"input-accordion-{InputAccordionImpl._count}"
            InputAccordionImpl._count += 1
        label = kwargs.pop("label", "Accordion")
        classes = kwargs.pop("elem_classes", [])
        super().__init__(
            value=value,
            label=label,
            elem_id=f"{self.accordion_id}-checkbox",
            elem_classes=["input-accordion-checkbox"],
            **kwargs,
        )
        # what gradio makes the component anew from when a function updates it: the checkbox alone
        if not GRADIO_3:
            self._constructor_args = self._constructor_args[-1:]
        script = f"(ticked) => {{ inputAccordionChecked('{self.accordion_id}', ticked); }}"
        self.change(fn=None, inputs=[self], **{"_js" if GRADIO_3 else "js": script})
        self.accordion = gr.Accordion(
            label=label,
            elem_id=self.accordion_id,
            elem_classes=["input-accordion", *classes],
            open=bool(value),
            visible=kwargs.get("visible", True),
        )

    def extra(self) -> gr.Column:
        """Column for something on the right of the title."""
        return gr.Column(elem_id=f"{self.accordion_id}-extra", elem_classes="input-accordion-extra", min_width=0)

    def __enter__(self) -> InputAccordionImpl:
        self.accordion.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.accordion.__exit__(*exc)

    def get_block_name(self) -> str:
        return "checkbox"


def InputAccordion(value: bool | None = None, **kwargs: Any) -> InputAccordionImpl:
    """A function, as on hosts with gradio 4: never subclass it."""
    return InputAccordionImpl(value=value, setup=True, **kwargs)


FORM_NAMES = [
    "FormComponent",
    "FormRow",
    "FormColumn",
    "FormGroup",
    "FormHTML",
    "ToolButton",
    "DropdownMulti",
    "InputAccordion",
    "InputAccordionImpl",
]
"""Names that ``modules.ui_components`` offers."""


class PasteField(tuple):  # type: ignore[type-arg]
    """One entry of a script's ``infotext_fields`` that the API knows by a name."""

    api: str | None

    def __new__(cls, component: Any, target: Any, *, api: str | None = None) -> PasteField:
        return super().__new__(cls, (component, target))

    def __init__(self, component: Any, target: Any, *, api: str | None = None) -> None:
        self.api = api
        self.component = component
        self.label = target if isinstance(target, str) else None
        self.function = target if callable(target) else None


class NoProgressBar:
    """``shared.total_tqdm`` without a bar."""

    def update(self) -> None: ...

    def updateTotal(self, new_total: int) -> None: ...

    def clear(self) -> None: ...


class ModelData:
    """``sd_models.model_data``: holds the live model."""

    def __init__(self, sd_model: Any) -> None:
        self.sd_model = sd_model

    def get_sd_model(self) -> Any:
        return self.sd_model


def options_section(section: tuple[str, ...], options: dict[str, OptionInfo]) -> dict[str, OptionInfo]:
    """Put options into a section of the Settings page."""
    for info in options.values():
        info.section = (section[0], section[1])
    return options


def plaintext_to_html(text: str, classname: str | None = None) -> str:
    """Text as a paragraph, escaped."""
    content = "<br>\n".join(html.escape(line) for line in text.split("\n"))
    return f"<p class='{classname}'>{content}</p>" if classname else f"<p>{content}</p>"


def resize_image(resize_mode: int, im: Image.Image, width: int, height: int, upscaler_name: Any = None) -> Image.Image:
    """``modules.images.resize_image``."""
    return images.resize(im, resize_mode, width, height)
