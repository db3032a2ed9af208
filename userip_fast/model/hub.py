"""A model on the Hugging Face hub, or in a folder that looks like a repository of it.

    README.md       the card: fields, codes and their words, metrics, LM and licences
    config.json     what the hub's own tools read of it
    metrics.json    of the run, where there is one
    model/          what `Model.save` writes, whole

A snapshot of the hub is made of links into its cache, which `Model.load` refuses: it is copied once
to `hub/` in our own cache, by its commit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download

from userip_fast._version import __version__
from userip_fast.core.errors import FormatError
from userip_fast.core.files import atomic_dir, read_json, write_json
from userip_fast.core.sums import MANIFEST, cache_folder

if TYPE_CHECKING:
    from userip_fast.model.fitted import Model

_MODEL = "model"
_CODES = 32  # of a field, told on the card


class OnHub(
    ModelHubMixin,
    library_name="userip_fast",
    tags=["user-profiles", "recommendation", "soft-prompts"],
    paper_url="https://arxiv.org/abs/2408.06577",
):
    """What the hub's mixin saves, pushes and fetches.

    Args:
        model: The model.
        metrics: For the card; None for those of the run that the model was loaded from.
        licence: Of the codes, as the hub names licences; None says nothing.
    """

    def __init__(
        self,
        model: Model,
        metrics: Mapping[str, Any] | None = None,
        licence: str | None = None,
    ) -> None:
        self.model, self.licence = model, licence
        beside = None if model._home is None else model._home.parent / "metrics.json"
        found = read_json(beside) if metrics is None and beside and beside.is_file() else metrics
        self.metrics = dict(found or {})

    def _save_pretrained(self, save_directory: Path) -> None:
        self.model.save(save_directory / _MODEL)
        codes = {f.name: f.codebook_size for f in self.model.config.fields}
        about = {"library_name": "userip_fast", "version": __version__, "fields": codes}
        write_json(save_directory / "config.json", about)
        if self.metrics:
            write_json(save_directory / "metrics.json", self.metrics)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card, with the metadata that the hub reads."""
        source = self.model.lm.source
        data = ModelCardData(
            library_name="userip_fast",
            license=self.licence,
            tags=["user-profiles", "recommendation", "soft-prompts"],
            base_model=source if _is_hub_id(source) and not self.model.lm.embedded else None,
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_card(self)}")

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, lm: str | None = None, device: str | None = None, **fetch: Any
    ) -> OnHub:
        load = fetch.pop("load")  # `Model.load`
        return cls(load(_folder(model_id, fetch), lm=lm, device=device))


def _folder(model_id: str, fetch: Mapping[str, Any]) -> Path:
    """The model folder of a local repository or model, or of a copy of the hub's."""
    local = Path(model_id)
    if local.is_dir():
        found = [p for p in (local / _MODEL, local) if (p / MANIFEST).is_file()]
        if not found:
            raise FormatError(f"{local}: holds no userip_fast model")
        return found[0]
    options = {k: v for k, v in fetch.items() if v is not None}
    snapshot = Path(snapshot_download(model_id, **options))
    if not (snapshot / _MODEL / MANIFEST).is_file():
        raise FormatError(f"{model_id}: holds no userip_fast model")
    kept = cache_folder() / "hub" / model_id.replace("/", "--") / snapshot.name
    if not (kept / MANIFEST).is_file():
        with atomic_dir(kept) as tmp:
            shutil.copytree(snapshot / _MODEL, tmp, dirs_exist_ok=True)
    return kept


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not os.path.exists(source) and source[:1] not in "./~"


def _card(self: OnHub) -> str:
    model = self.model
    lm = model.lm
    name = "an LM trained on the log itself" if lm.embedded else _plain(Path(lm.source).name)
    if _is_hub_id(lm.source) and not lm.embedded:
        name = _plain(lm.source)
    lines = [
        "# User profile codes",
        "",
        "Codebooks of latent user traits, learned by "
        "[UserIP-Tuning](https://arxiv.org/abs/2408.06577) from histories of interactions: a "
        "frozen language model reads what users did behind soft prompts, which are quantised to "
        "codes.",
        "",
        "```python",
        "import userip_fast as uf",
        "",
        'model = uf.Model.from_pretrained("OWNER/NAME")',
        'codes = model.infer(uf.read_interactions("interactions.parquet", "items.parquet"))',
        "```",
        "",
        "| field | read by the LM as | codes | virtual tokens |",
        "|---|---|---|---|",
    ]
    for f in model.config.fields:
        about = (f.name, f.prompt, f.codebook_size, f.num_virtual_tokens)
        lines.append("| " + " | ".join(_plain(x) for x in about) + " |")
    for f in model.config.fields:
        cards = model.cards.get(f.name, [])
        words = [", ".join(map(_plain, card["words"])) or "no words" for card in cards[:_CODES]]
        if words:
            lines += ["", f"## Codes of {f.name}", ""]
            lines += [f"{code}. {text}" for code, text in enumerate(words)]
            lines += [f"\nand {len(cards) - _CODES} more."] * (len(cards) > _CODES)
    numbers = {k: v for k, v in self.metrics.items() if isinstance(v, int | float | str)}
    if numbers:
        lines += ["", "## Metrics of the run", "", "| | |", "|---|---|"]
        lines += [f"| {_plain(k)} | {_number(v)} |" for k, v in sorted(numbers.items())]
    kept = "is part of the model" if lm.embedded else "is not part of the model, and needed to read"
    licence = "" if lm.embedded else " Its own licence holds for it."
    lines += [
        "",
        "## Language model",
        "",
        f"{name}, {lm.quantization}, hidden size {lm.hidden_size}, fingerprint "
        f"`{lm.fingerprint[:15]}`. It {kept}{'' if lm.embedded else ' new items'}.{licence}",
        "",
        "The model holds the texts of the items it was learned from, and nothing of single users.",
    ]
    return "\n".join(lines) + "\n"


def _plain(text: object) -> str:
    """Without what Markdown or HTML would act upon."""
    kept = (c if c.isprintable() else " " for c in str(text))
    return "".join(f"&#{ord(c)};" if c in "\\`*_[]<>|#&" else c for c in kept)


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _plain(value)
