"""The influence map: the shares against float64, where masks put them, and a job that asks for it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lib_ipadapter.attn2 import CurrentPlan, make_replacement
from lib_ipadapter.influence import Influence, Seen, overlay, shares
from lib_ipadapter.injection import Injection
from lib_ipadapter.layers import SD15
from lib_ipadapter.masks import Region
from lib_ipadapter.plan import scaled_dot_product
from lib_ipadapter.rows import COND, Call
from tests.embedded import Host
from tests.embedded.client import Client
from tests.embedded_hosts import TITLE, request, unit
from tests.test_generation import host_with_nested_jobs

HEADS, QUERIES, TEXT, TOKENS, WIDTH = 2, 6, 7, 4, 8


def tensors(seed: int, *lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, WIDTH, generator=generator) for length in lengths]


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pictures: list[Seen]
) -> dict[tuple[int, int], np.ndarray]:
    """One query and head after the other."""
    size = WIDTH // HEADS
    joint = {each.key: np.zeros(len(q)) for each in pictures if each.joins}
    base = np.zeros((len(q), WIDTH))
    parts = {each.key: np.zeros((len(q), WIDTH)) for each in pictures if not each.joins}

    def numbers(t: torch.Tensor) -> np.ndarray:
        return t.double().numpy()

    for n in range(len(q)):
        for head in range(HEADS):
            of = slice(head * size, (head + 1) * size)
            query = numbers(q)[n, of] / np.sqrt(size)
            masses = [np.exp(numbers(k)[:, of] @ query)]
            values = [numbers(v)[:, of]]
            for each in pictures:
                if each.joins:
                    factor = 1.0 if each.factor is None else float(each.factor[n])
                    masses.append(each.part * factor * np.exp(numbers(each.keys)[:, of] @ query))
                    values.append(numbers(each.values)[:, of])
            total = sum(map(np.sum, masses))
            for key, mass in zip(joint, masses[1:], strict=True):
                joint[key][n] += mass.sum() / total / HEADS
            base[n, of] = sum(mass / total @ value for mass, value in zip(masses, values, strict=True))
            for group in {(each.key[0], each.place) for each in pictures if not each.joins}:
                there = [each for each in pictures if not each.joins and (each.key[0], each.place) == group]
                own = [np.exp(numbers(each.keys)[:, of] @ query) for each in there]
                for each, mass in zip(there, own, strict=True):
                    part = mass / sum(map(np.sum, own)) @ numbers(each.values)[:, of]
                    parts[each.key][n, of] = part * (1.0 if each.factor is None else float(each.factor[n]))
    lengths = {key: np.linalg.norm(part, axis=1) for key, part in parts.items()}
    whole = np.linalg.norm(base, axis=1) + sum(lengths.values(), np.zeros(len(q)))
    return joint | {key: each / whole for key, each in lengths.items()}


def test_shares_of_joint_and_decoupled_pictures_with_masks_and_balance() -> None:
    q, k, v, *kv = tensors(0, QUERIES, TEXT, TEXT, *[TOKENS] * 10)
    half = torch.tensor([1.0, 1.0, 0.25, 0.0, 0.0, 0.0])
    pictures = [
        Seen((0, 0), kv[0], kv[1], part=0.5),
        Seen((0, 1), kv[2], kv[3], half, part=0.5),
        Seen((1, 0), kv[4], kv[5], joins=False),
        Seen((1, 1), kv[6], kv[7], joins=False),
        Seen((2, 0), kv[8], kv[9], half, joins=False),
    ]
    found, wanted = shares(q, k, v, HEADS, pictures), expected(q, k, v, pictures)
    assert found.keys() == wanted.keys()
    for key, share in found.items():
        np.testing.assert_allclose(share.double().numpy(), wanted[key], rtol=1e-5, atol=1e-6)
        assert share.max() > 0.02
    assert not found[0, 1][3:].any() and not found[2, 0][3:].any()
    # a planted fault is seen: another head count, or a picture left out
    assert (shares(q, k, v, 1, pictures)[0, 0] - found[0, 0]).abs().max() > 1e-3
    assert (shares(q, k, v, HEADS, pictures[1:])[0, 1] - found[0, 1]).abs().max() > 1e-3


def test_maps_and_tables_are_means_over_layers_and_steps() -> None:
    seen = Influence((4, 6), ["unit 1", "unit 3"], SD15)
    fine, coarse = torch.arange(24.0) / 24, torch.full((6,), 0.5)
    seen.begin()
    seen.add(0, {(0, 0): fine, (1, 0): fine / 2})
    seen.add(15, {(0, 0): coarse})
    seen.begin()
    seen.add(0, {(0, 0): fine})
    maps, tables = seen.maps(), seen.tables()
    assert list(maps) == ["unit 1", "unit 3"] and maps["unit 1"].shape == (4, 6)
    np.testing.assert_allclose(maps["unit 1"], (2 * fine.view(4, 6).numpy() + 0.5) / 3, atol=1e-6)
    half = float(fine.mean())
    assert tables["unit 1"]["share"] == pytest.approx((2 * half + 0.5) / 3, abs=1e-4)
    by_group: Any = tables["unit 1"]["by layer group"]
    assert len(by_group) == 16 and by_group[0] == pytest.approx(half, abs=1e-4)
    assert by_group[6] == 0.5 and by_group[1] is None  # the file's last layer is the middle, the seventh group
    assert tables["unit 1"]["by step"] == [pytest.approx((half + 0.5) / 2, abs=1e-4), pytest.approx(half, abs=1e-4)]
    assert tables["unit 3"]["by step"] == [pytest.approx(half / 2, abs=1e-4), None]


def test_the_map_of_a_part_lies_where_the_part_is() -> None:
    result = Image.new("RGB", (40, 20))
    drawn = np.asarray(overlay(result, np.ones((4, 4)), 1.0, Region(0.5, -0.5, 1.0, 0.5)))
    assert drawn[:10, 20:].min() == 153 and not drawn[:, :20].any() and not drawn[10:].any()


def units(form: str, **fields: Any) -> dict[str, Any]:
    return unit("plus", formulation=form, photos=("astronaut", "coffee"), **fields)


@pytest.mark.parametrize("form", ["joint", "decoupled"])
def test_a_job_shows_where_its_pictures_acted_and_draws_the_same(host: Host, form: str) -> None:
    plain = host.txt2img(**request(units(form), batch_size=2, n_iter=2))
    shown = host.txt2img(**request(units(form, influence=True), batch_size=2, n_iter=2))
    assert not host.errors
    assert len(shown.images) == len(plain.images) + 2
    for a, b in zip(plain.images, shown.images, strict=False):
        assert a.tobytes() == b.tobytes()
    tables = []
    for number, (picture, words) in enumerate(zip(shown.images[-2:], shown.infotexts[-2:], strict=True), 1):
        assert picture.size == shown.images[-3].size
        heading, _, text = words.partition(": ")
        assert heading.startswith(f"IP-Adapter influence of unit 1, picture {number}, white is 0.")
        tables.append(json.loads(text))
    for table in tables:
        assert 0.01 < table["share"] < 0.9 and None not in table["by step"] and len(table["by step"]) == 2
        assert len(table["by layer group"]) == 16 and None not in table["by layer group"]
    assert tables[0] != tables[1]


@pytest.mark.parametrize("form", ["joint", "decoupled"])
def test_a_mask_and_layer_types_are_seen(host: Host, form: str) -> None:
    asked = {**units(form, influence=True, layers="style"), "mask": "left half"}
    shown = host.txt2img(**request(asked))
    table = json.loads(shown.infotexts[-1].partition(": ")[2])
    assert [n for n, each in enumerate(table["by layer group"]) if each is None] == [4, 5, 6, 7, 8]
    plain = shown.images[0]
    bare = overlay(plain, np.zeros((8, 8)), 1.0)
    left, right = np.asarray(shown.images[-1], dtype=float), np.asarray(bare, dtype=float)
    apart = np.abs(left - right).max(axis=2)
    width = apart.shape[1]
    # cells of the coarser grid have 16 pixels here, and blur over the border by one and a half
    assert apart[:, : width // 2 - 16].min() > 5 and apart[:, width // 2 + 24 :].max() == 0


def test_without_the_request_nothing_looks(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = importlib.import_module("sd_image_prompt.injection")
    monkeypatch.setattr(engine, "shares", lambda *_: pytest.fail("looked without being asked"))
    assert len(host.txt2img(**request(units("joint"))).images) == 1


def test_one_picture_per_batch_item(host: Host) -> None:
    asked = units("joint", influence=True, pictures="one per batch item")
    shown = host.txt2img(**request(asked, batch_size=2))
    assert not host.errors
    extra = shown.infotexts[-1]
    assert extra.startswith("IP-Adapter influence of unit 1, white") and len(shown.images) == 3


def test_the_api_answers_it_and_a_wrong_value_is_refused(host: Host) -> None:
    client = Client(host.app)
    body = {**request(), "alwayson_scripts": {TITLE: {"args": [units("joint", influence=True)]}}}
    answer = client.post("/sdapi/v1/txt2img", json=body).json()
    words = [each for each in json.loads(answer["info"])["infotexts"] if each.startswith("IP-Adapter influence")]
    assert len(answer["images"]) == 3 and len(words) == 2
    body["alwayson_scripts"][TITLE]["args"] = [units("joint", influence="yes")]
    refused = client.post("/sdapi/v1/txt2img", json=body)
    assert 'the field "influence" is "yes"; allowed are true and false.' in refused.json()["detail"]


def test_layers_are_watched_only_if_asked() -> None:
    made: list[Any] = []
    for influence in (None, Influence((4, 6), ["unit 1"], SD15)):
        injection = Injection([], 16)
        injection.influence = influence
        current = CurrentPlan(injection, lambda _: None, lambda *_: Call((COND,), 0.5), 0)
        made.append(make_replacement(0, current, scaled_dot_product, None))
    assert [each.__name__ for each in made] == ["replacement", "watched"]


def test_jobs_inside_the_job_make_no_map(host_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = host_with_nested_jobs(host_of, tmp_path, "p.script_args")
    session: Any = importlib.import_module("sd_image_prompt.session")
    made: list[tuple[Any, ...]] = []
    original = session.Influence

    def watched(*args: Any) -> Any:
        made.append(args)
        return original(*args)

    monkeypatch.setattr(session, "Influence", watched)
    shown = host.txt2img(**request(unit("plus", influence=True)))
    assert {call.depth for call in host.unet_calls} == {0, 1}
    assert len(made) == 1 and len(shown.images) == 2 and not host.errors


def test_only_units_that_ask_are_shown(host: Host) -> None:
    shown = host.txt2img(**request(unit("base"), unit("plus", influence=True)))
    assert len(shown.images) == 2 and shown.infotexts[-1].startswith("IP-Adapter influence of unit 2, white")
