"""The model card of a converted model: README.md with the Hub's metadata on top.

Owns its wording and what is carried over from the source's card: base model, licence, languages. Leaves the figures to
`estimate.py`. What is not known is left out; nothing is guessed.
"""

from pathlib import Path
from typing import Any

from mlx_gemma4.config import Gemma4Config
from mlx_gemma4.conversions import estimate
from mlx_gemma4.conversions.hub_progress import size
from mlx_gemma4.conversions.plan import Plan
from mlx_gemma4.conversions.recipe import Recipe
from mlx_gemma4.conversions.sources import Source

README = "README.md"
_CARRIED = ("license", "license_name", "license_link", "language", "extra_gated_heading", "extra_gated_prompt")


def metadata_of(folder: Path) -> dict[str, Any]:
    """The metadata on top of a folder's README.md; empty where there is none."""
    from huggingface_hub import metadata_load

    path = folder / README
    if not path.is_file():
        return {}
    try:
        return metadata_load(path) or {}
    except Exception:  # of the YAML parser, which is the client's own; a card it cannot read says nothing
        return {}


def card(source: Source, plan: Plan, config: Gemma4Config, recipe: Recipe, name: str) -> bytes:
    """README.md of the folder `name`."""
    from huggingface_hub import ModelCardData

    old = metadata_of(source.folder)
    carried = {k: old[k] for k in _CARRIED if k in old}
    base = source.repo or old.get("base_model")
    sees = any(item.name.startswith("vision_tower.") for item in plan.items)
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="image-text-to-text" if sees else "text-generation",
        base_model=base,
        tags=["mlx", "gemma4"],
        **carried,
    )
    groups = estimate.groups(plan)
    lines = ["---", data.to_yaml(), "---", "", f"# {name}", ""]
    origin = f"[{base}](https://huggingface.co/{base})" if isinstance(base, str) else Path(source.name).name
    at = f" at commit `{source.commit}`" if source.commit else ""
    lines += [
        f"{origin}{at}, converted to MLX with mlx-gemma4. mlx-lm, mlx-vlm, LM Studio and mlx-gemma4 load it as it is.",
        "",
        "```sh",
        f"gemma4 chat --model {name}",
        "```",
        "",
        f"Recipe `{recipe.name}`: {recipe.description or 'one choice for every matrix; the router 8 bits.'}",
        "",
        "| weights | parameters | bits each | stored as | size |",
        "|---|---:|---:|---|---:|",
        *(
            f"| {g.name} | {g.parameters:,} | {g.bits:.2f} | {'; '.join(g.packings)} | {size(g.nbytes)} |"
            for g in groups
        ),
        "",
        f"{size(sum(plan.sizes))} in {len(plan.files)} file{'s' if len(plan.files) > 1 else ''}.",
        "",
    ]
    if memory := estimate.resident(plan.tensor_bytes, config):
        lines += ["In memory with the caches of one conversation:", ""]
        lines += ["| context | 16-bit caches | 3.5-bit caches |", "|---:|---:|---:|"]
        for context, row in memory.items():
            lines.append(f"| {context:,} | " + " | ".join("-" if v is None else size(v) for v in row.values()) + " |")
        lines.append("")
    if "license" in carried:
        lines += ["The licence is that of the original model.", ""]
    else:
        lines += ["The source's card names no licence; that of the original model holds.", ""]
    return "\n".join(lines).encode()
