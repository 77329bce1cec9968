"""How AUTOMATIC1111 is told of a checkpoint of SD1.5's layout at other widths: the yaml beside it."""

from __future__ import annotations

from collections.abc import Sequence

_TEXT = """model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: jpg
    cond_stage_key: txt
    image_size: 64
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params: {{image_size: 32, in_channels: 4, out_channels: 4, model_channels: {width},
        attention_resolutions: [4, 2, 1], num_res_blocks: 2, channel_mult: {multiples}, num_heads: {heads},
        use_spatial_transformer: true, transformer_depth: 1, context_dim: {context}, use_checkpoint: false,
        legacy: false}}
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig: {{double_z: true, z_channels: 4, resolution: 256, in_channels: 3, out_ch: 3, ch: {vae_width},
          ch_mult: {vae_multiples}, num_res_blocks: {vae_blocks}, attn_resolutions: [], dropout: 0.0}}
        lossconfig: {{target: torch.nn.Identity}}
    cond_stage_config: {{target: ldm.modules.encoders.modules.FrozenCLIPEmbedder, params: {text}}}
"""


def ldm_yaml(
    width: int,
    context: int,
    vae_width: int,
    multiples: Sequence[int] = (1, 2, 4, 4),
    heads: int = 8,
    vae_multiples: Sequence[int] = (1, 2, 4, 4),
    vae_blocks: int = 2,
    text: str = "{}",
) -> str:
    """The yaml.

    Args:
        width, multiples, heads, context: of the UNet; those of SD1.5, but for the widths, are what is left out.
        vae_width, vae_multiples, vae_blocks: of the VAE, likewise.
        text: parameters of the text encoder as YAML; left out: CLIP's, by its own name.
    """
    return _TEXT.format(
        width=width,
        context=context,
        multiples=list(multiples),
        heads=heads,
        vae_width=vae_width,
        vae_multiples=list(vae_multiples),
        vae_blocks=vae_blocks,
        text=text,
    )
