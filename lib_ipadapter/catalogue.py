"""Public adapters and image encoders that can be downloaded, as data. What isn't known of a file is left empty."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from .errors import IPAdapterError

ENCODER = "encoder"


@dataclass(frozen=True)
class Entry:
    """One file on the public hub."""

    name: str
    family: str
    kind: str
    """The kind of adapter, or :data:`ENCODER`."""
    good_for: str
    repository: str
    file: str
    size: int | None
    """In bytes; ``None`` if not known."""
    sha256: str
    """'' if not known."""

    @property
    def saved_as(self) -> str:
        """The file's name here: many files on the hub have the same one."""
        return self.name + PurePosixPath(self.file).suffix

    @property
    def licence(self) -> str:
        """For people, also where it isn't known."""
        return LICENCES.get(self.repository, f"not known here, see the page of {self.repository}")


LICENCES = {
    "h94/IP-Adapter": "Apache-2.0 (as its model card says)",
    "ostris/ip-composition-adapter": "Apache-2.0 (as its model card says)",
}
"""By repository, as stored copies of its model card say."""

ENTRIES = (
    Entry(
        "ip-adapter_sd15",
        "SD1.5",
        "base",
        "a picture as a prompt",
        "h94/IP-Adapter",
        "models/ip-adapter_sd15.safetensors",
        44642768,
        "289b45f16d043d0bf542e45831f971dcdaabe18b656f11e86d9dfba7e9ee3369",
    ),
    Entry(
        "ip-adapter_sd15_light",
        "SD1.5",
        "base",
        "a picture that leaves more to the text",
        "h94/IP-Adapter",
        "models/ip-adapter_sd15_light.safetensors",
        44642768,
        "0747d08db670535bfa286452a77d93cebad5c677b46d038543f9f2de8690bb26",
    ),
    Entry(
        "ip-adapter_sd15_light_v11",
        "SD1.5",
        "base",
        "a picture that leaves more to the text",
        "h94/IP-Adapter",
        "models/ip-adapter_sd15_light_v11.bin",
        44642977,
        "350b63a57847c163e2e984b01090f85ffe60eaae20f32b2b2c9e1ccc7ddd972b",
    ),
    Entry(
        "ip-adapter_sd15_vit-G",
        "SD1.5",
        "base",
        "a picture as a prompt, with the larger encoder",
        "h94/IP-Adapter",
        "models/ip-adapter_sd15_vit-G.safetensors",
        46215640,
        "a26f736af07bb341a83dfea23713531d0575760e8ed947c68cb31a4c62d9c90b",
    ),
    Entry(
        "ip-adapter-plus_sd15",
        "SD1.5",
        "plus",
        "a picture with more of its detail",
        "h94/IP-Adapter",
        "models/ip-adapter-plus_sd15.safetensors",
        98183288,
        "a1c250be40455cc61a43da1201ec3f1edaea71214865fb47f57927e06cbe4996",
    ),
    Entry(
        "ip-adapter-plus-face_sd15",
        "SD1.5",
        "plus",
        "a cropped face",
        "h94/IP-Adapter",
        "models/ip-adapter-plus-face_sd15.safetensors",
        None,
        "",
    ),
    Entry(
        "ip-adapter-full-face_sd15",
        "SD1.5",
        "full-face",
        "a cropped face",
        "h94/IP-Adapter",
        "models/ip-adapter-full-face_sd15.safetensors",
        43592352,
        "f4a17fb643bf876235a45a0e87a49da2855be6584b28ca04c62a97ab5ff1c6f3",
    ),
    Entry(
        "ip-adapter_sdxl",
        "SDXL",
        "base",
        "a picture as a prompt, with the larger encoder",
        "h94/IP-Adapter",
        "sdxl_models/ip-adapter_sdxl.safetensors",
        702585376,
        "ba1002529e783604c5f326d49f0122025392d1d20ac8d573b3eeb3e6dea4ebb6",
    ),
    Entry(
        "ip-adapter_sdxl_vit-h",
        "SDXL",
        "base",
        "a picture as a prompt",
        "h94/IP-Adapter",
        "sdxl_models/ip-adapter_sdxl_vit-h.safetensors",
        698391064,
        "ebf05d918348aec7abb02a5e9ecef77e0aaea6914a5c4ea13f50d45eb1681831",
    ),
    Entry(
        "ip-adapter-plus_sdxl_vit-h",
        "SDXL",
        "plus",
        "a picture with more of its detail",
        "h94/IP-Adapter",
        "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors",
        847517512,
        "3f5062b8400c94b7159665b21ba5c62acdcd7682262743d7f2aefedef00e6581",
    ),
    Entry(
        "ip-adapter-plus-face_sdxl_vit-h",
        "SDXL",
        "plus",
        "a cropped face",
        "h94/IP-Adapter",
        "sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors",
        847517512,
        "677ad8860204f7d0bfba12d29e6c31ded9beefdf3e4bbd102518357d31a292c1",
    ),
    Entry(
        "ip_plus_composition_sd15",
        "SD1.5",
        "plus",
        "the composition of a picture",
        "ostris/ip-composition-adapter",
        "ip_plus_composition_sd15.safetensors",
        None,
        "",
    ),
    Entry(
        "ip_plus_composition_sdxl",
        "SDXL",
        "plus",
        "the composition of a picture",
        "ostris/ip-composition-adapter",
        "ip_plus_composition_sdxl.safetensors",
        None,
        "",
    ),
    Entry(
        "clip_vision_vit-h",
        "any",
        "encoder",
        "the image encoder that ViT-H adapters need",
        "h94/IP-Adapter",
        "models/image_encoder/model.safetensors",
        2528373448,
        "6ca9667da1ca9e0b0f75e46bb030f7e011f44f86cbfb8d5a36590fcd7507b030",
    ),
    Entry(
        "clip_vision_vit-bigg",
        "any",
        "encoder",
        "the image encoder that ViT-bigG adapters need",
        "h94/IP-Adapter",
        "sdxl_models/image_encoder/model.safetensors",
        3689912664,
        "",
    ),
)


def find(name: object) -> Entry:
    """The entry of this name.

    Raises:
        IPAdapterError: if there is none.
    """
    for entry in ENTRIES:
        if entry.name == name:
            return entry
    raise IPAdapterError(
        f"The catalogue has no entry {name!r}: choose one of {', '.join(entry.name for entry in ENTRIES)}."
    )
