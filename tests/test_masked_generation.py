"""Masks through whole generations in the embedded host, and through both kinds of seam in one and the same UNet."""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lib_ipadapter.attn2 import CurrentPlan
from lib_ipadapter.formulations import DECOUPLED, JOINT, Formulation
from lib_ipadapter.hosts import a1111
from lib_ipadapter.hosts.comfy import _chained
from lib_ipadapter.hosts.unet import describe
from lib_ipadapter.injection import Injection, Term
from lib_ipadapter.layers import first_in_forward_order
from lib_ipadapter.masks import Canvas, Where, of_picture, of_template
from lib_ipadapter.plan import ImageKV, scaled_dot_product
from lib_ipadapter.progress import Window
from lib_ipadapter.rows import COND, UNCOND, Call
from lib_ipadapter.weighing import weigh
from tests.demo_model import scenes
from tests.embedded import Host
from tests.embedded.client import Client
from tests.embedded.demo import TRAINED, make_host
from tests.embedded.host import PROJECT_ROOT
from tests.embedded_hosts import request, unit
from tests.photos import base64_photo, photo
from tests.test_demo_model_weights import reference
from tests.test_generation import difference, pixels, same

PROBE = Path(__file__).parent / "embedded" / "probe_extension"


def as_base64(picture: Image.Image) -> str:
    file = BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def split(masks: list[Any], mask: Any = "", **fields: Any) -> dict[str, Any]:
    """A unit that has the same picture once for each mask."""
    whole = unit(**fields)
    (data,) = whole["images"]
    return {**whole, "images": [{"data": data, "mask": each} for each in masks], "mask": mask}


def largest(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(pixels(a) - pixels(b)).max())


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "an odd size": {"width": 104, "height": 72},
    "batch": {"batch_size": 2},
    "CFG 1": {"cfg_scale": 1.0},
    "AND": {"prompt": "a red house AND a blue car :0.7"},
    "long prompt": {"prompt": "a red house " * 8},
    "hires": {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.7, "hr_cfg": 5.0},
    "img2img": {"init_images": [base64_photo("chelsea")], "denoising_strength": 0.75, "steps": 4},
}
HALVES = [{"template": "left half", "feather": 0.3}, {"template": "right half", "feather": 0.3}]


@pytest.mark.parametrize("formulation", ["joint", "decoupled"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
def test_complementary_masks_draw_what_no_mask_draws(host_of: Any, shape: str, formulation: str, case: str) -> None:
    host = host_of(shape)
    run = host.img2img if "init_images" in CASES[case] else host.txt2img
    fields: dict[str, Any] = {"kind": "plus", "shape": shape, "formulation": formulation, "weight": 0.8}
    plain = run(**request(**CASES[case]))
    whole = run(**request(unit(**fields), **CASES[case]))
    both = run(**request(split(HALVES, **fields), **CASES[case]))
    left = run(**request(split(HALVES[:1], **fields), **CASES[case]))
    for n in range(len(plain.images)):
        assert largest(whole.images[n], both.images[n]) <= 2
        assert difference(whole.images[n], plain.images[n]) > 3
        assert min(difference(left.images[n], each.images[n]) for each in (plain, whole)) > 1
    assert not host.errors


@pytest.mark.parametrize("options", [{"row_order": "a1111"}, {"split_calls": True}])
def test_how_the_host_lays_rows_out_changes_nothing(host_of: Any, options: dict[str, Any]) -> None:
    wanted = request(split(["left half", "centre"], kind="plus", formulation="joint"), prompt="a AND b", batch_size=2)
    usual = host_of("sd15").txt2img(**wanted)
    other = host_of("sd15", **options).txt2img(**wanted)
    for a, b in zip(usual.images, other.images, strict=True):
        assert largest(a, b) <= 2


def test_a_white_mask_is_none_at_all(host: Host) -> None:
    white = as_base64(Image.new("L", (64, 64), 255))
    for formulation in ("joint", "decoupled"):
        plain = host.txt2img(**request(unit(formulation=formulation))).image
        assert same(plain, host.txt2img(**request(unit(formulation=formulation, mask=white))).image)


def test_masks_are_multiplied(host: Host) -> None:
    fields: dict[str, Any] = {"kind": "plus", "formulation": "joint"}
    quarter = host.txt2img(**request(unit(**fields, mask="top left quarter"))).image
    crossed = host.txt2img(**request(split(["top half"], mask="left half", **fields))).image
    # The grids of this size are even, so that no cell has two edges in it but those of the deepest layers.
    assert difference(quarter, crossed) < 1
    assert difference(quarter, host.txt2img(**request(unit(**fields, mask="left half"))).image) > 1


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (as_base64(Image.new("RGB", (64, 64))), r"mask of the unit is black everywhere"),
        (as_base64(Image.new("RGBA", (64, 64), (255, 255, 255, 0))), r"mask of the unit is black everywhere"),
        ({"data": as_base64(Image.new("L", (64, 64), 255)), "invert": True}, r"mask of the unit is black everywhere"),
        ("A" * 80, r"mask of the unit can't be used: the picture is in no known image format"),
        ({"sha256": "0" * 64}, r"mask of the unit can't be used: the reference picture with sha256"),
        ("https://example.com/a/mask/of/the/left/half.png", r"addresses aren't fetched"),
    ],
)
def test_bad_masks_end_the_job_with_a_sentence(host: Host, mask: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        host.txt2img(**request(unit(mask=mask)))
    with pytest.raises(ValueError, match=words.replace("the unit", "picture 1")):
        host.txt2img(**request(split([mask])))
    answer = Client(host.app).post("/ip-adapter/check", json={"unit": unit(mask=mask)})
    assert answer.status_code == 422 and re.search(words, answer.json()["detail"])
    assert len(host.txt2img(**request(unit(mask="centre"))).images) == 1


def test_masks_with_nothing_in_common(host: Host) -> None:
    with pytest.raises(ValueError, match="masks of the unit and of picture 2 have nothing in common"):
        host.txt2img(**request(split(["top half", "right half"], mask="left half")))


def test_a_mask_of_another_shape_is_stretched_and_that_is_said(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    comments: list[str] = []
    monkeypatch.setattr(host.Txt2Img, "comment", lambda self, text: comments.append(text))
    wide = Image.new("L", (96, 64))
    wide.paste(255, (0, 0, 48, 64))
    stretched = host.txt2img(**request(unit(mask=as_base64(wide)), n_iter=2)).image
    assert set(comments) == {"A mask of IP-Adapter has 96 x 64 pixels and the canvas 64 x 64: it is stretched over it."}
    assert same(stretched, host.txt2img(**request(unit(mask="left half"), n_iter=2)).image)
    comments.clear()
    host.txt2img(**request(unit(mask=as_base64(wide)), width=96))
    assert comments == []


def test_transparent_is_black_and_grey_is_part(host: Host) -> None:
    drawn = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    drawn.paste((255, 255, 255, 255), (0, 0, 32, 64))
    left = host.txt2img(**request(unit(mask="left half"))).image
    assert same(left, host.txt2img(**request(unit(mask=as_base64(drawn)))).image)
    grey = as_base64(Image.new("L", (8, 8), 51))  # a fifth
    decoupled = {"formulation": "decoupled", "weight": 1.0}
    a = host.txt2img(**request(unit(**decoupled, mask=grey))).image
    b = host.txt2img(**request(unit(**{**decoupled, "weight": 0.2}))).image
    assert largest(a, b) <= 1


def test_a_mask_comes_back_with_the_parameters(host: Host) -> None:
    mask = {"data": as_base64(photo("coffee").convert("L")), "feather": 0.05, "invert": True}
    asked = split([mask, "centre"], mask={"template": "left half", "feather": 0.5}, kind="plus")
    first = host.txt2img(**request(asked))
    text = first.infotexts[0]
    assert "mask: left-half feather 0.5" in text
    found = re.search(r"picture 1: ([0-9a-f]{64}) mask ([0-9a-f]{64}) feather 0.05 inverted", text)
    assert found is not None and re.search(r"picture 2: [0-9a-f]{64} mask centre", text)
    kept = sys.modules["sd_image_prompt.references"].get(found[2])
    assert np.array_equal(np.asarray(kept.convert("L")), np.asarray(photo("coffee").convert("L")))
    images = [{"sha256": found[1], "mask": {"sha256": found[2], "feather": 0.05, "invert": True}}, asked["images"][1]]
    assert same(first.image, host.txt2img(**request({**asked, "images": images})).image)


# Tiles

TILES = """
import torch
from modules import scripts
class Tiles(scripts.Script):
    def title(self): return 'Tiles'
    def show(self, is_img2img): return scripts.AlwaysVisible
    def process_before_every_sampling(self, p, *args, **kwargs):
        def tiled(apply, args):
            x, rows, c = args['input'], args['input'].shape[0], dict(args['c'])
            if TOGETHER:
                tiles = torch.cat((x[..., :6], x[..., 2:]))
                c['c_crossattn'] = c['c_crossattn'].repeat(2, 1, 1)
                a, b = apply(tiles, args['timestep'].repeat(2), **c).split(rows)
            else:
                a, b = (apply(tile, args['timestep'], **c) for tile in (x[..., :6], x[..., 2:]))
            return torch.cat((a[..., :4], b[..., 2:]), dim=-1)
        unet = p.sd_model.forge_objects.unet.clone()
        unet.set_model_unet_function_wrapper(tiled)
        p.sd_model.forge_objects.unet = unet
"""
"""As MultiDiffusion draws: two tiles, in one call of the UNet or in two."""


@pytest.mark.parametrize("together", [True, False])
def test_tiles_are_refused_with_a_mask_and_fine_without(host_of: Any, tmp_path: Path, together: bool) -> None:
    scripts = tmp_path / "tiles" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "tiles.py").write_text(TILES.replace("TOGETHER", str(together)))
    host = host_of("sd15", extensions=(PROJECT_ROOT, tmp_path / "tiles"))
    for formulation in ("joint", "decoupled"):
        with pytest.raises(ValueError, match="drawn in tiles .* nothing says where each of them lies"):
            host.txt2img(**request(unit(formulation=formulation, mask="left half")))
        assert len(host.txt2img(**request(unit(formulation=formulation))).images) == 1


def test_on_top_of_another_extension_a_joint_mask_is_refused(host_of: Any) -> None:
    host = host_of("sd15", extensions=(PROBE, PROJECT_ROOT))
    for formulation in ("joint", "decoupled"):
        wanted = request(unit(formulation=formulation, mask="left half"))
        wanted["alwayson_scripts"]["Probe"] = {"args": [True, '{"replace": "half"}']}
        if formulation == "joint":
            with pytest.raises(ValueError, match="a mask in one softmax with the text has to be inside of it"):
                host.txt2img(**wanted)
        else:
            assert len(host.txt2img(**wanted).images) == 1


# Inpainting 'only masked'


def only_masked(host: Host, crop: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets img2img draw a crop of its picture, and say so, as the hosts do."""
    before = host.Img2Img.init

    def init(self: Any, *args: Any) -> None:
        x, y, width, height = crop
        whole, self.inpaint_full_res, self.image_mask, self.paste_to = self.init_images, True, self.init_images[0], crop
        self.init_images = [whole[0].crop((x, y, x + width, y + height))]
        before(self, *args)
        self.init_images = whole

    monkeypatch.setattr(host.Img2Img, "init", init)


@pytest.mark.parametrize("formulation", ["joint", "decoupled"])
def test_inpainting_only_masked_crops_the_mask(host: Host, formulation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = photo("chelsea").resize((128, 128))
    comments: list[str] = []
    monkeypatch.setattr(host.Img2Img, "comment", lambda self, text: comments.append(text))

    def drawn(mask: Any = None, **fields: Any) -> Image.Image:
        units = [unit("plus", formulation=formulation, mask=mask)] if mask is not None else []
        return host.img2img(**request(*units, init_images=[picture], steps=4, **fields)).image

    only_masked(host, (0, 32, 64, 64), monkeypatch)  # in the left half
    assert largest(drawn("left half"), drawn("")) <= 2
    assert (
        same(drawn("right half"), drawn()) if formulation == "decoupled" else largest(drawn("right half"), drawn()) <= 2
    )
    assert set(comments) == {
        "A mask of IP-Adapter is black in the part that is drawn, so its picture doesn't act there."
    }
    monkeypatch.undo()
    only_masked(host, (32, 32, 64, 64), monkeypatch)  # in the middle, so that half of it is left
    sixteen = Image.new("L", (16, 16))
    sixteen.paste(255, (0, 0, 8, 16))
    assert same(drawn("left half"), drawn(as_base64(sixteen)))
    assert min(difference(drawn("left half"), each) for each in (drawn(), drawn(""))) > 1


# Both seams in one UNet


def picture_for(widths: tuple[int, ...], seed: int) -> ImageKV:
    generator = torch.Generator().manual_seed(seed)
    return ImageKV.from_pairs([torch.randn(1, 4, width, generator=generator) for width in widths for _ in "kv"])


LATENT = (9, 13)
PLACES: dict[str, list[Where]] = {
    "halves": [(of_template("left half"),), (of_template("right half"),)],
    "soft halves": [(of_template("left half", 0.4),), (of_template("right half", 0.4),)],
    "a photograph": [(of_picture(photo("coffee")),), (of_picture(photo("coffee"), invert=True),)],
}


@pytest.mark.parametrize("formulation", [JOINT, DECOUPLED])
@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
def test_the_whole_unet_through_both_seams(
    host_of: Any, shape: str, formulation: Formulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = host_of(shape).sd_model.forge_objects.unet.model.diffusion_model
    info = describe(unet, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, *LATENT, generator=generator)
    context = torch.randn(2, 77, info.context_width, generator=generator)
    timesteps = torch.full((2,), 500.0)
    vector = host_of(shape).sd_model.shape.vector
    y = {"y": torch.randn(2, vector, generator=generator)} if vector else {}

    def injection(places: list[Where]) -> Injection:
        one, none = picture_for(info.widths, 5), picture_for(info.widths, 6)
        prompts = {COND: (one,) * len(places), UNCOND: (none,) * len(places)}
        weighed = weigh(prompts, formulation, 0.8, (), max(info.widths), COND)
        made = Injection(
            [Term(formulation, Window(), weighed, where=dict.fromkeys((COND, UNCOND), tuple(places)))], len(info.keys)
        )
        made.canvas = Canvas(LATENT)
        return made

    def through_hooks(made: Injection) -> torch.Tensor:
        hooks = a1111._Hooks(info, made)
        try:
            hooks.begin_step({COND: context[:1], UNCOND: context[1:]})
            return unet(x, timesteps, context, **y)
        finally:
            hooks.remove()

    def through_replacements(made: Injection) -> torch.Tensor:
        call = Call((COND, UNCOND), 0.5, latent=LATENT)
        current = CurrentPlan(made, lambda o: o["sigmas"], lambda *_: call, first_in_forward_order(info.keys))
        attn2 = {tuple(key): _chained(n, current, scaled_dot_product, None, False) for n, key in enumerate(info.keys)}
        options = {"patches_replace": {"attn2": attn2}, "sigmas": timesteps, "cond_or_uncond": [0, 1]}
        return unet(x, timesteps, context, **y, transformer_options=options)

    with torch.no_grad():
        plain = unet(x, timesteps, context, **y)
        whole = through_replacements(injection([()]))
        assert float((whole - plain).abs().max()) > 1e-2
        # A layer's rounding, 1e-5 at the most, goes through as many as 70 others.
        limit = 3e-5 * float(whole.abs().max())
        for places in PLACES.values():
            for through in (through_hooks, through_replacements):
                assert float((through(injection(places)) - whole).abs().max()) < limit
            a, b = (through(injection(places[:1])) for through in (through_hooks, through_replacements))
            assert float((a - b).abs().max()) < limit
            assert min(float((a - each).abs().max()) for each in (plain, whole)) > 1e-3


# What it does in a trained model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with make_host(TRAINED, tmp_path_factory.mktemp("trained") / "models") as made:
        yield made


@pytest.mark.parametrize(("formulation", "least"), [("decoupled", 0.1), ("joint", 0.05)])
def test_a_mask_puts_two_references_on_two_halves(trained: Host, formulation: str, least: float) -> None:
    """How much redder, and less blue, the left half is than the right one; a whole red half beside a blue one is 1."""
    red, blue = (np.array(scenes.RGB[scenes.COLOURS.index(name)]) for name in ("red", "blue"))
    along = (red - blue) / np.linalg.norm(red - blue) ** 2
    discs = [reference(tuple(np.rint(255 * each).astype(int)), (245, 245, 245)) for each in (red, blue)]

    def drawn(left: str, right: str, seed: int) -> float:
        images = [{"data": left, "mask": "left half"}, {"data": right, "mask": "right half"}]
        asked = {"model": "demo-plus.safetensors", "images": images, "formulation": formulation, "weight": 1.5}
        wanted = request(asked, prompt="a circle beside a circle", steps=16, width=128, height=128, seed=seed)
        found = pixels(trained.txt2img(**wanted | {"cfg_scale": 4.0}).image) / 255 @ along
        return float(found[:, :64].mean() - found[:, 64:].mean())

    # Measured: 0.19 to 0.25 with the decoupled form, 0.11 to 0.17 with the joint one; swapped, minus that.
    for seed in range(3):
        assert drawn(discs[0], discs[1], seed) > least
        assert drawn(discs[1], discs[0], seed) < -least
