"""All models of a training in one place, and the files that hold them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Adapter, base_adapter, plus_adapter
from .bpe import CONTEXT, Tokenizer, train
from .captions import CaptionTokens, vocabulary_text
from .clip import AttributeHeads, Judge, TextSizes, TextTower, VisionSizes, VisionTower
from .files import load_tensors, save_png, save_tensors, sheet
from .unet import UNet, UNetSizes
from .vae import VAE, VAESizes

CHECKPOINT, VISION, BASE, PLUS, JUDGE, EXTRAS = (
    f"{name}.safetensors" for name in ("demo", "demo-vision", "demo-base", "demo-plus", "judge", "extras")
)
FILES = {"vision": VISION, "base": BASE, "plus": PLUS, "judge": JUDGE, "extras": EXTRAS}
"""Of the parts that have one of their own."""
REPORT, SAMPLES = "report.json", "samples.png"
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text": "cond_stage_model.transformer.",
}
"""Where the parts of a checkpoint are in it."""


class ContrastiveExtras(nn.Module):
    """What contrastive training needs beside the towers: no file of the demo has it."""

    def __init__(self, text: TextSizes, vision: VisionSizes) -> None:
        super().__init__()
        self.text_projection = nn.Linear(text.width, vision.projection, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.3))
        self.heads = AttributeHeads(vision.projection)
        self.patch_heads = AttributeHeads(vision.width)


class Store:
    """The models, what is known of their training, and where both are saved.

    Args:
        folder: for all files.
        seed: of the first weights and all data.
        device: where training runs.
    """

    def __init__(self, folder: Path, seed: int, device: torch.device) -> None:
        self.folder, self.seed, self.device = folder, seed, device
        torch.manual_seed(seed)
        self.tokenizer: Tokenizer = train(vocabulary_text())
        self.tokens = CaptionTokens(self.tokenizer, device)
        text, vision = TextSizes(len(self.tokenizer.vocabulary)), VisionSizes()
        self.unet, self.vae, self.text = UNet(UNetSizes()), VAE(VAESizes()), TextTower(text)
        self.vision, self.judge = VisionTower(vision), Judge()
        self.extras = ContrastiveExtras(text, vision)
        self.base: Adapter = base_adapter(self.unet, vision)
        self.plus: Adapter = plus_adapter(self.unet, vision)
        self.report: dict[str, Any] = {"seed": seed, "stages": {}}
        self.sheets: dict[str, Tensor] = {}
        self.pairs: Any = None
        """What both adapters learn from, see :class:`.stages.Bank`, once it is made."""
        for module in self.modules().values():
            module.to(device)

    def modules(self) -> dict[str, nn.Module]:
        """All of them by name."""
        names = ("unet", "vae", "text", "vision", "judge", "extras", "base", "plus")
        return {name: getattr(self, name) for name in names}

    def stage(self, name: str) -> dict[str, Any]:
        """What is known of a stage: seconds spent, whether it is done, figures."""
        found: dict[str, Any] = self.report["stages"].setdefault(name, {"seconds": 0.0, "done": False})
        return found

    def load(self, folder: Path) -> None:
        """Go on from the files of an earlier call.

        Stages whose files aren't there are to be done anew. For ``extras`` that means nothing: only further training of
        the towers needs them.
        """
        checkpoint = load_tensors(folder / CHECKPOINT)
        for part, prefix in PREFIXES.items():
            own = {k[len(prefix) :]: v for k, v in checkpoint.items() if k.startswith(prefix)}
            getattr(self, part).load_state_dict(own)
        self.report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        for part, name in FILES.items():
            if (folder / name).is_file():
                getattr(self, part).load_state_dict(load_tensors(folder / name))
            elif part in self.report["stages"]:
                self.stage(part).update(seconds=0.0, done=False)

    def save(self) -> None:
        """Write everything as it is now, weights as fp16. Any moment is good: each file is replaced as a whole."""

        def half(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
            return {prefix + name: value.detach().to(torch.float16) for name, value in module.state_dict().items()}

        checkpoint: dict[str, Tensor] = {}
        for part, prefix in PREFIXES.items():
            checkpoint |= half(getattr(self, part), prefix)
        save_tensors(checkpoint, self.folder / CHECKPOINT)
        for part, name in FILES.items():
            save_tensors(half(getattr(self, part)), self.folder / name)
        self.report["date"] = time.strftime("%Y-%m-%d", time.gmtime())
        self.report["torch"] = torch.__version__
        text = json.dumps(self.report, indent=1, ensure_ascii=False) + "\n"
        (self.folder / REPORT).write_text(text, encoding="utf-8")
        if self.sheets:
            width = max(s.shape[2] for s in self.sheets.values())
            padded = [
                torch.nn.functional.pad(s, (0, width - s.shape[2], 0, 8), value=1.0) for s in self.sheets.values()
            ]
            save_png(torch.cat(padded, 1), self.folder / SAMPLES)

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokeniser, and beside it what transformers must know to make the text tower."""
        self.tokenizer.save(folder)
        sizes = TextSizes(len(self.tokenizer.vocabulary))
        config = {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": sizes.vocabulary,
            "hidden_size": sizes.width,
            "intermediate_size": sizes.mlp,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "max_position_embeddings": CONTEXT,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": VisionSizes().projection,
            "bos_token_id": self.tokenizer.start,
            "eos_token_id": self.tokenizer.end,
            "pad_token_id": self.tokenizer.end,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    def show(self, name: str, pictures: Tensor, columns: int = 16) -> None:
        """Put a stage's pictures (0..1) on the sheet, under those of the stages before."""
        self.sheets[name] = sheet(pictures.float().cpu().clamp(0, 1), columns)
