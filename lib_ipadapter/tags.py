"""Tags in prompts, ``<ipa:name>``, ``<ipa:name:0.7>`` or ``<ipa:name:0.7:style>``: saved references for one picture.

The name is a saved reference's, the number replaces its default weight, the third part is a layer type's name. Each
picture of a job gets what its own prompt says, and in the hires pass what its hires prompt says. The hosts cut such
tags out of the prompts that their text encoders see (as they do for every extra network), but tell extensions those of
a batch's first prompt alone; so they are read here. The prompts in a picture's parameters keep them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import IPAdapterError
from .places import InPictures

NAME = "ipa"
"""Of the extra network."""
_TAG = re.compile(rf"<{NAME}:([^>]*)>")
_FORM = f"<{NAME}:name>, <{NAME}:name:0.7> or <{NAME}:name:0.7:style>"


@dataclass(frozen=True)
class Tag:
    """One tag of a prompt."""

    name: str
    weight: str = ""
    """As it stands there; '': the reference's default."""
    layers: str = ""
    """A layer type's name; '': the reference's default."""

    def __str__(self) -> str:
        return f"<{':'.join((NAME, self.name, self.weight, self.layers)).rstrip(':')}>"

    @property
    def fields(self) -> Mapping[str, Any]:
        """The fields of a unit that the tag sets."""
        given = {"weight": self.weight, "layers": self.layers}
        return {name: value for name, value in given.items() if value}


Tagged = Mapping[tuple[Tag, int], InPictures]
"""Where in a job a tag acts; by how often it stood in the same prompt before, too, since it counts each time."""


def tags_of(prompt: str) -> tuple[Tag, ...]:
    """The tags of one prompt.

    Raises:
        IPAdapterError: for one of another form.
    """
    return tuple(_read(match[0], match[1]) for match in _TAG.finditer(prompt))


def _read(whole: str, inside: str) -> Tag:
    parts = [part.strip() for part in inside.split(":")]
    if not 1 <= len(parts) <= 3 or not parts[0]:
        raise IPAdapterError(f"The prompt has the tag {whole[:80]}; allowed are {_FORM}.")
    return Tag(*parts)


def found(p: Any) -> Tagged:
    """The tags of all of a job's prompts, after styles and wildcards.

    Raises:
        IPAdapterError: for a tag of another form, or one in a negative prompt.
    """
    if getattr(p, "disable_extra_networks", False):
        return {}
    prompts = _texts(p, "all_prompts")
    hires = _texts(p, "all_hr_prompts") or prompts if getattr(p, "enable_hr", False) else []
    for negative in (*_texts(p, "all_negative_prompts"), *_texts(p, "all_hr_negative_prompts")):
        match = _TAG.search(negative)
        if match is not None:
            raise IPAdapterError(
                f"The negative prompt has the tag {match[0][:80]}; allowed are tags in the prompt: move it there, with "
                "a negative weight if it shall push away."
            )
    first, second = _places(prompts), _places(hires)
    size = int(getattr(p, "batch_size", 1))
    return {
        key: InPictures(frozenset(first.get(key, ())), frozenset(second.get(key, ())), size)
        for key in dict.fromkeys((*first, *second))
    }


def _texts(p: Any, name: str) -> Sequence[str]:
    return [text for text in getattr(p, name, None) or () if isinstance(text, str)]


def _places(prompts: Sequence[str]) -> dict[tuple[Tag, int], list[int]]:
    places: dict[tuple[Tag, int], list[int]] = {}
    for number, prompt in enumerate(prompts):
        for key in _counted(tags_of(prompt)) if f"<{NAME}:" in prompt else ():
            places.setdefault(key, []).append(number)
    return places


def _counted(tags: Sequence[Tag]) -> Iterator[tuple[Tag, int]]:
    before: Counter[Tag] = Counter()
    for tag in tags:
        yield tag, before[tag]
        before[tag] += 1
