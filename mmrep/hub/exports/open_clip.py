"""The towers of open_clip as a folder in its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mmrep.hub.exports.export import Export, ExportError, refuse
from mmrep.hub.open_clip_folder import CONFIG, WEIGHTS

_RESIZE = {"crop": "shortest", "squash": "squash"}


class OpenClip(Export):
    """``open-clip-image`` and ``open-clip-text`` as what ``create_model_from_pretrained("local-dir:…")`` loads."""

    def write(self, folder: Path) -> None:
        """See `Export.write`."""
        towers = {
            self.model.tower(name).config.encoder.type: self.model.tower(name) for name in self.model.config.towers
        }
        if self.only is not None or set(towers) != {"open-clip-image", "open-clip-text"}:
            raise ExportError(
                "an open_clip model is two towers, with encoders open-clip-image and open-clip-text; this has "
                f"{', '.join(towers)}"
            )
        for tower in towers.values():
            problems = [
                f"its {part} is {chosen.type!r}, not {wanted!r}"
                for part, chosen, wanted in (("pool", tower.config.pool, "native"),
                                             ("projector", tower.config.projector, "identity"))
                if chosen.type != wanted
            ]  # fmt: skip
            refuse(tower, "open_clip", problems)
        image: Any = towers["open-clip-image"].encoder
        text: Any = towers["open-clip-text"].encoder
        made_of, how = image.made_of, image.preprocess
        model = {
            "embed_dim": self.model.dim, "vision_cfg": made_of["vision_cfg"], "quick_gelu": made_of["quick_gelu"],
            "text_cfg": text.model_config["text_cfg"], "custom_text": True,
        }  # fmt: skip
        if bool(text.model_config.get("quick_gelu")) != made_of["quick_gelu"]:
            raise ExportError(
                "one tower has the activation QuickGELU and the other has not: open_clip has one for both"
            )
        state = {f"visual.{key}": value for key, value in image.trunk.visual.state_dict().items()}
        state |= {f"text.{key}": value for key, value in text.text.state_dict().items() if key != "attn_mask"}
        if "default" in self.model.temperatures:
            temperature = self.model.temperature("default")
            state["logit_scale"] = temperature.log_scale.detach().reshape(())
            if temperature.bias is not None:
                model["init_logit_bias"] = temperature.bias.item()
                state["logit_bias"] = temperature.bias.detach().reshape(())
        preprocess = {
            "size": how.size, "mean": list(how.mean), "std": list(how.std), "interpolation": how.interpolation,
            "resize_mode": _RESIZE[how.resize], "mode": "RGB",
        }  # fmt: skip
        text.save_files(folder)  # a tokenizer that is not CLIP's; its config is written over below
        document = {"model_cfg": model, "preprocess_cfg": preprocess}
        (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        save_file({key: value.contiguous() for key, value in state.items()}, folder / WEIGHTS)
