"""Infotext in A1111's format: written under every picture, read back for pasting."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

_PARAM = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"^(\d+)x(\d+)$")


def quote(text: Any) -> Any:
    """JSON-quote a value that contains a comma, a colon or a newline."""
    value = str(text)
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ",:\n") else text


def unquote(text: str) -> str:
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        return str(json.loads(text))
    except json.JSONDecodeError:
        return text


def create_infotext(p: Any, index: int, report: Callable[[str, Exception], None]) -> str:
    """Infotext of picture ``index`` of the whole job.

    Values of ``p.extra_generation_params`` may be lists (one entry per picture of the batch) or callables, which
    get what the hosts give them by name; None is left out.
    """
    within = index % p.batch_size
    prompt, negative = p.all_prompts[index], p.all_negative_prompts[index]
    params: dict[str, Any] = {
        "Steps": p.steps,
        "Sampler": p.sampler_name,
        "Schedule type": p.scheduler,
        "CFG scale": p.cfg_scale,
        "Seed": p.all_seeds[index],
        "Size": f"{p.width}x{p.height}",
        "Model hash": p.sd_model.sd_model_hash,
        "Model": p.sd_model.sd_checkpoint_info.name_for_extra,
        "Denoising strength": None,
        **p.extra_generation_params,
        "Version": "embedded",
    }
    names = {"p": p, "index": within, "prompt_text": prompt, "negative_prompt": negative, "generation_params": params}
    for key, value in params.items():
        try:
            if isinstance(value, list):
                params[key] = value[within]
            elif callable(value):
                params[key] = value(**names)
        except Exception as error:
            report(f'Error creating infotext for key "{key}"', error)
            params[key] = None
    text = ", ".join(k if k == v else f"{k}: {quote(v)}" for k, v in params.items() if v is not None)
    negative_line = f"\nNegative prompt: {negative}" if negative else ""
    return f"{prompt}{negative_line}\n{text}".strip()


def parse_generation_parameters(text: str) -> dict[str, Any]:
    """Infotext -> prompt, negative prompt and all parameters as strings; ``Size`` becomes ``Size-1`` and ``Size-2``."""
    *lines, last = text.strip().split("\n")
    if len(_PARAM.findall(last)) < 3:
        lines, last = [*lines, last], ""
    result: dict[str, Any] = {}
    parts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    where = "Prompt"
    for line in lines:
        line = line.strip()
        if line.startswith("Negative prompt:"):
            where, line = "Negative prompt", line[len("Negative prompt:") :].strip()
        parts[where].append(line)
    result.update({key: "\n".join(value) for key, value in parts.items()})
    for key, value in _PARAM.findall(last):
        value = unquote(value)
        size = _SIZE.match(value)
        if size:
            result[f"{key}-1"], result[f"{key}-2"] = size.group(1), size.group(2)
        else:
            result[key] = value
    return result
