"""The trained model in an AUTOMATIC1111: checkpoint, its configuration, tokeniser, image encoder and adapters."""

from __future__ import annotations

import json
from pathlib import Path

from lib_ipadapter.errors import IPAdapterError

from .store import BASE, CHECKPOINT, PLUS, VISION
from .unet import UNetSizes
from .vae import SCALE, VAESizes

WEIGHTS = Path(__file__).resolve().parent / "weights"
NAME = "ip-adapter-demo"
"""Of the checkpoint there."""
CHECKPOINTS = Path("models", "Stable-diffusion")
TOKENIZER = CHECKPOINTS / f"{NAME}-tokenizer"

CONFIGURATION = """model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: jpg
    cond_stage_key: txt
    image_size: 16
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: {scale}
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params: {{image_size: 16, in_channels: 4, out_channels: 4, model_channels: {channels},
        attention_resolutions: [4, 2, 1], num_res_blocks: 2, channel_mult: {multiples}, num_heads: {heads},
        use_spatial_transformer: true, transformer_depth: 1, context_dim: {context}, use_checkpoint: false,
        legacy: false}}
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig: {{double_z: true, z_channels: 4, resolution: 128, in_channels: 3, out_ch: 3, ch: {vae_width},
          ch_mult: {vae_multiples}, num_res_blocks: {vae_blocks}, attn_resolutions: [], dropout: 0.0}}
        lossconfig: {{target: torch.nn.Identity}}
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
      params: {{version: {tokenizer}}}
"""
"""What AUTOMATIC1111 must know beside the tensors. It holds a path, so it is written where it is read."""


def configuration(tokenizer: Path) -> str:
    """The checkpoint's yaml, for a tokeniser's folder."""
    unet, vae = UNetSizes(), VAESizes()
    return CONFIGURATION.format(
        scale=SCALE,
        channels=unet.channels,
        multiples=list(unet.multiples),
        heads=unet.heads,
        context=unet.context,
        vae_width=vae.ch,
        vae_multiples=list(vae.ch_mult),
        vae_blocks=vae.num_res_blocks,
        tokenizer=json.dumps(str(tokenizer)),  # a string of JSON is one of YAML
    )


def install(webui: Path) -> list[Path]:
    """Puts the trained model's files into a WebUI's folders; those that are there already are left alone.

    Returns:
        What was written.

    Raises:
        IPAdapterError: if it is no AUTOMATIC1111, or a file of the user's has the name of one of these. Nothing is
            written then.
    """
    webui = webui.resolve()
    if not (webui / "webui.py").is_file() or not (webui / "models").is_dir():
        raise IPAdapterError(
            f"{webui} is no WebUI's folder (it must have webui.py and models): name the folder that AUTOMATIC1111 "
            "is installed in."
        )
    if (webui / "modules_forge").is_dir() or (webui / "backend").is_dir():
        raise IPAdapterError(
            f"{webui} is a Forge, which recognises checkpoints of their true sizes only and not this small one: "
            "install it into an AUTOMATIC1111, or start dev.py demo without --install."
        )
    files = {webui / place: content for place, content in _files(webui / TOKENIZER).items()}
    for path, content in files.items():
        if path.exists() and (not path.is_file() or path.read_bytes() != content):
            raise IPAdapterError(
                f"{path} is there already and is something else, and nothing was written: move or rename it, then "
                "install again."
            )
    written = [path for path in files if not path.exists()]
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[path])
    return written


def _files(tokenizer: Path) -> dict[Path, bytes]:
    """What goes where, relative to the WebUI's folder."""
    own = {
        CHECKPOINTS / f"{NAME}.safetensors": CHECKPOINT,
        Path("models", "clip_vision", VISION): VISION,
        Path("models", "ipadapter", BASE): BASE,
        Path("models", "ipadapter", PLUS): PLUS,
    }
    files = {place: (WEIGHTS / name).read_bytes() for place, name in own.items()}
    files |= {TOKENIZER / path.name: path.read_bytes() for path in (WEIGHTS / "tokenizer").iterdir()}
    files[CHECKPOINTS / f"{NAME}.yaml"] = configuration(tokenizer).encode("utf-8")
    return files
