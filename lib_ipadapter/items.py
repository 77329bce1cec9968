"""Rows that get other pictures than others of their role.

Everything behind this knows roles alone. So for a UNet call in which units act on single items of the batch, rows of
one role that see different units are given roles of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from .errors import IPAdapterError
from .places import Items
from .rows import OTHER, Call

T = TypeVar("T")

FIRST = OTHER + 1
"""The smallest of the roles that are made here."""


def by_item(call: Call, acting: Sequence[tuple[Items, Mapping[int, T]]]) -> tuple[Call, list[Mapping[int, T]]]:
    """A call whose roles tell rows apart that see different units, and what each unit has for these roles.

    Args:
        call: with the item of every row.
        acting: the units that act: the items they act on, and what they have for each role.

    Raises:
        IPAdapterError: if the host doesn't say which row is whose.
    """
    if call.items is None:
        raise IPAdapterError(
            "A picture is for single items of the batch, and something changed the batch so that it can't be told "
            "which row belongs to which: switch off the extension that does so, set the batch size to 1, or set "
            '"pictures" to "together".'
        )
    seen = [
        (role, tuple(n for n, (items, _) in enumerate(acting) if items is None or item in items))
        for role, item in zip(call.roles, call.items, strict=True)
    ]
    made = {kind: FIRST + n for n, kind in enumerate(dict.fromkeys(seen))}
    texts = call.text_tokens
    tokens = None if texts is None else {key: texts[role] for (role, _), key in made.items() if role in texts}
    given: list[Mapping[int, T]] = [
        {key: of_role[role] for (role, units), key in made.items() if n in units and role in of_role}
        for n, (_, of_role) in enumerate(acting)
    ]
    return replace(call, roles=tuple(made[kind] for kind in seen), text_tokens=tokens), given
