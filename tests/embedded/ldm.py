"""A diffusers UNet seen as the hosts' ``diffusion_model``: LDM block lists and the hosts' call, the same modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .attention import PatchableAttention, PatchedCall, Place


class DiffusionModel(nn.Module):
    """``input_blocks`` / ``middle_block`` / ``output_blocks`` over the modules of a diffusers UNet.

    The UNet itself does the work and isn't registered as a child: walking the modules meets each layer once, under
    its LDM name. Spatial transformers sit at ``block[1]``, as in LDM's UNets.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self._unet = (unet,)
        self.time_embed = unet.time_embedding
        self.label_emb = unet.class_embedding
        inputs: list[list[nn.Module]] = [[unet.conv_in]]
        for down in unet.down_blocks:
            inputs += _pairs(down)
            if down.downsamplers:
                inputs.append([down.downsamplers[0]])
        outputs: list[list[nn.Module]] = []
        for up in unet.up_blocks:
            outputs += _pairs(up)
            if up.upsamplers:
                outputs[-1].append(up.upsamplers[0])
        middle = unet.mid_block
        self.input_blocks = nn.ModuleList(nn.ModuleList(block) for block in inputs)
        self.middle_block = nn.ModuleList([middle.resnets[0], middle.attentions[0], middle.resnets[1]])
        self.output_blocks = nn.ModuleList(nn.ModuleList(block) for block in outputs)
        self.out = nn.ModuleList([unet.conv_norm_out, unet.conv_out])
        self._number_attention()

    @property
    def unet(self) -> Any:
        """The diffusers UNet whose modules these are."""
        return self._unet[0]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _number_attention(self) -> None:
        blocks = [("input", i, block) for i, block in enumerate(self.input_blocks)]
        blocks.append(("middle", 0, self.middle_block))
        blocks += [("output", i, block) for i, block in enumerate(self.output_blocks)]
        transformers = [(name, i, m) for name, i, block in blocks for m in block if hasattr(m, "transformer_blocks")]
        for index, (name, number, transformer) in enumerate(transformers):
            for depth, block in enumerate(transformer.transformer_blocks):
                place = Place((name, number), depth, index)
                block.attn1.set_processor(PatchableAttention("attn1", place))
                block.attn2.set_processor(PatchableAttention("attn2", place))

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """The UNet's output, shaped like ``x [B, 4, H, W]``.

        ``timesteps [B]``; ``context [B, tokens, width]``; ``y [B, vector]`` for SDXL.
        """
        if control is not None:
            raise ValueError("this UNet takes no ControlNet residuals: control must be None")
        patched = None
        if transformer_options is not None:
            transformer_options["original_shape"] = list(x.shape)
            patched = PatchedCall(transformer_options)
        kwargs = {} if patched is None else {"cross_attention_kwargs": {"patched": patched}}
        return self.unet(x, timesteps, context, class_labels=y, return_dict=False, **kwargs)[0]


def _pairs(block: Any) -> list[list[nn.Module]]:
    attentions = getattr(block, "attentions", None)
    return [[resnet, *([attentions[i]] if attentions else [])] for i, resnet in enumerate(block.resnets)]
