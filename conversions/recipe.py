"""Recipes: how many bits each matrix gets, as small TOML files.

Owns the file format, the recipes that come with the package (`recipes/*.toml`), the rules that hold for every Gemma 4
whatever a recipe says, and the check that a packing exists in MLX. Leaves which tensors there are to `plan.py`, and the
numbers to MLX.

    description = "one line for the model card"
    bits = 4                        # 2, 3, 4, 5, 6, 8; 16 leaves a matrix as it is
    group_size = 64                 # values that share a scale: 32, 64, 128; of [128, 64] the first that divides a row
    mode = "affine"                 # or mxfp4, nvfp4, mxfp8, which have one size each

    [[rules]]                       # the last rule that matches a matrix decides; what it leaves out is inherited
    match = ["self_attn.v_proj", "mlp.*"]   # module paths within a layer, or "embed_tokens" and its like; globs
    ends = 0.125                    # only layers among the first and last eighth ...
    every = 3                       # ... or every third of the others
    bits = 6

Always on: norms, scalars and embed_vision/embed_audio are never packed, nor is a tower; the router has 8 bits; the
k_proj of a layer whose key is its value matches as `self_attn.v_proj`, because an error in it reaches both.
"""

import fnmatch
import re
import tomllib
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from mlx_gemma4.config import TextConfig
from mlx_gemma4.errors import UsageError
from mlx_gemma4.packed import AFFINE_BITS, AFFINE_GROUPS, BYTE_SCALES

# Published modules whose scales are bytes: mode -> (group size, bits).
BYTE_MODES = {mode: sizes for sizes, mode in BYTE_SCALES.items()}
MODES = ("affine", *BYTE_MODES)
PLAIN = 16
# The router decides which experts run; below 8 bits its choices change.
ROUTER_BITS = 8
_LAYER = re.compile(r"^language_model\.model\.layers\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Packing:
    """How a matrix is packed. Raises UsageError for what MLX does not have."""

    group_size: int
    bits: int
    mode: str = "affine"
    # Group sizes a recipe allows where the first does not divide a matrix's columns; what is stored has one.
    others: tuple[int, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"mode {self.mode!r} is not known; allowed: {', '.join(MODES)}")
        if self.mode != "affine":
            if (self.group_size, self.bits) != BYTE_MODES[self.mode]:
                group, bits = BYTE_MODES[self.mode]
                raise UsageError(
                    f"{self.mode} has {bits} bits in groups of {group}, not {self.bits} in {self.group_size}"
                )
            return
        if self.bits not in AFFINE_BITS:
            raise UsageError(f"bits {self.bits}: allowed are {', '.join(map(str, AFFINE_BITS))} and {PLAIN}")
        for group in (self.group_size, *self.others):
            if group not in AFFINE_GROUPS:
                raise UsageError(f"group size {group}: allowed are {', '.join(map(str, AFFINE_GROUPS))}")

    def fitted(self, columns: int) -> "Packing":
        """With the first of its group sizes that divides `columns`; where none does, with the first."""
        group = next((g for g in (self.group_size, *self.others) if columns % g == 0), self.group_size)
        return Packing(group, self.bits, self.mode)

    def as_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.mode}, groups of {self.group_size}"


@dataclass(frozen=True)
class Rule:
    match: tuple[str, ...]
    settings: dict[str, Any]  # bits, group_size, mode: those the file gives
    ends: float = 0.0
    every: int = 0

    def applies(self, path: str, layer: int | None, layers: int) -> bool:
        if not any(fnmatch.fnmatchcase(path, pattern) for pattern in self.match):
            return False
        if not self.ends and not self.every:
            return True
        if layer is None:
            return False
        edge = max(1, round(self.ends * layers)) if self.ends else 0
        return layer < edge or layer >= layers - edge or bool(self.every and (layer - edge) % self.every == 2)


@dataclass(frozen=True)
class Recipe:
    """A choice per matrix. `default` None leaves every matrix as it is."""

    name: str
    default: Packing | None
    rules: tuple[Rule, ...] = ()
    description: str = ""
    # Matrices on the Q4_0 lattice are mapped exactly (q4_0.py); the others follow the rules.
    q4_0: bool = False
    # Where --group-size said so: instead of the file's own, in affine packing.
    group_size: int | None = None

    def choose(self, path: str, text: TextConfig) -> Packing | None:
        """The packing of the module at `path` (without `.weight`); None: left as it is. Raises UsageError."""
        if self.default is None:
            return None
        found = _LAYER.match(path)
        layer = int(found[1]) if found else None
        short = found[2] if found else path.removeprefix("language_model.").removeprefix("model.")
        if layer is not None and short == "self_attn.k_proj" and text.k_is_v(layer):
            short = "self_attn.v_proj"
        base: dict[str, Any] = self.default.as_dict() | {"group_size": [self.default.group_size, *self.default.others]}
        settings = base
        for rule in self.rules:
            if rule.applies(short, layer, text.num_hidden_layers):
                settings = base | rule.settings
        if short == "router.proj" and settings["bits"] < ROUTER_BITS:
            settings = {"group_size": 64, "bits": ROUTER_BITS, "mode": "affine"}
        if settings["bits"] == PLAIN:
            return None
        if self.group_size is not None and settings["mode"] == "affine":
            settings["group_size"] = self.group_size
        return _packing(settings)


def uniform(bits: int, group_size: int = 64, mode: str = "affine") -> Recipe:
    """Every matrix alike (the router excepted). Raises UsageError."""
    return Recipe(f"uniform-{bits}", None if bits == PLAIN else Packing(group_size, bits, mode))


def names() -> list[str]:
    """The recipes in the package."""
    return sorted(f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml"))


def select(
    recipe: "str | Path | Recipe | None" = None,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
) -> Recipe:
    """The recipe that these options mean; none of them is `4bit`.

    recipe: a name of `names()`, a file (`.toml`) or a Recipe. Without it, bits N is the recipe `Nbit`, 16 leaves all as
    it is, and a mode other than affine is the recipe of its name. Raises UsageError.
    """
    if recipe is not None and (bits is not None or mode is not None):
        raise UsageError("a recipe says the bits and the mode; give either --recipe or --bits and --mode")
    if isinstance(recipe, Recipe):
        chosen = recipe
    elif recipe is not None:
        chosen = load(recipe)
    elif mode is not None and mode != "affine":
        if mode not in MODES:
            raise UsageError(f"mode {mode!r} is not known; allowed: {', '.join(MODES)}")
        own_group, own_bits = BYTE_MODES[mode]
        Packing(group_size or own_group, own_bits if bits is None else bits, mode)
        return load(mode)
    elif bits == PLAIN:
        if group_size is not None:
            raise UsageError("--bits 16 packs nothing, so --group-size has no meaning; leave one of them out")
        return Recipe("16bit", None, description="Every matrix as it is.")
    else:
        if bits is not None and bits not in AFFINE_BITS:
            raise UsageError(f"--bits {bits}: allowed are {', '.join(map(str, AFFINE_BITS))} and {PLAIN}")
        chosen = load(f"{bits or 4}bit")
    if group_size is None:
        return chosen
    if group_size not in AFFINE_GROUPS:
        raise UsageError(f"--group-size {group_size}: allowed are {', '.join(map(str, AFFINE_GROUPS))}")
    if chosen.q4_0 or (chosen.default is not None and chosen.default.mode != "affine"):
        raise UsageError(f"recipe {chosen.name} has its own group size; leave --group-size out")
    return replace(chosen, group_size=group_size)


def load(recipe: str | Path) -> Recipe:
    """A recipe of the package by name, or a file. Raises UsageError naming the file and what is wrong in it."""
    text = str(recipe)
    if text in names():
        return parse((_folder() / f"{text}.toml").read_text(encoding="utf-8"), text)
    path = Path(text).expanduser()
    if not path.is_file():
        raise UsageError(f"there is no recipe {text!r} and no such file; known are {', '.join(names())}")
    try:
        return parse(path.read_text(encoding="utf-8"), path.stem, str(path))
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read ({e})") from None


def parse(text: str, name: str, where: str | None = None) -> Recipe:
    """A recipe from TOML. Raises UsageError; `where` is how its message calls the file."""
    where = where or f"recipe {name}"
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise UsageError(f"{where} is not TOML: {e}") from None
    _only(raw, {"description": str, "bits": int, "group_size": int, "mode": str, "q4_0": bool, "rules": list}, where)
    if "bits" not in raw:
        raise UsageError(f"{where} does not say how many bits; write e.g. bits = 4 in its first lines")
    base: dict[str, Any] = {"group_size": 64, "mode": "affine"}
    base |= {k: raw[k] for k in ("bits", "group_size", "mode") if k in raw}
    rules = []
    for i, entry in enumerate(raw.get("rules", [])):
        at = f"{where}, rule {i + 1}"
        if not isinstance(entry, dict):
            raise UsageError(f"{at} is no table; write it under [[rules]]")
        kinds = {"match": list, "ends": float, "every": int, "bits": int, "group_size": int, "mode": str}
        _only(entry, kinds, at)
        patterns = entry.get("match")
        if not patterns or not all(isinstance(p, str) for p in patterns):
            raise UsageError(f'{at} matches nothing; give it match = ["mlp.down_proj"] or the like')
        ends, every = entry.get("ends", 0.0), entry.get("every", 0)
        if not 0 <= ends <= 0.5 or every < 0:
            raise UsageError(f"{at}: ends is a share from 0 to 0.5, every a whole number from 1")
        settings = {k: entry[k] for k in ("bits", "group_size", "mode") if k in entry}
        rules.append(Rule(tuple(patterns), settings, ends, every))
    if base["bits"] == PLAIN:
        raise UsageError(f"{where}: bits = {PLAIN} packs nothing; say so in rules, or convert with --bits {PLAIN}")
    try:
        for settings in (base | rule.settings for rule in rules):
            if settings["bits"] != PLAIN:
                _packing(settings)
        return Recipe(name, _packing(base), tuple(rules), raw.get("description", ""), raw.get("q4_0", False))
    except UsageError as e:
        raise UsageError(f"{where}: {e}") from None


def _packing(settings: dict[str, Any]) -> Packing:
    """From a recipe's words. Raises UsageError."""
    groups = settings["group_size"]
    if isinstance(groups, list):
        if not groups or not all(type(g) is int for g in groups) or (len(groups) > 1 and settings["mode"] != "affine"):
            raise UsageError(f"group size {groups}: affine packing may have several, as in [128, 64]")
        settings = settings | {"group_size": groups[0], "others": tuple(groups[1:])}
    return Packing(**settings)


def _only(raw: dict[str, Any], kinds: dict[str, type], where: str) -> None:
    for key, value in raw.items():
        if key not in kinds:
            raise UsageError(f"{where} has an unknown key {key!r}; known are {', '.join(kinds)}")
        wanted = {float: (int, float), int: (int, list) if key == "group_size" else int}.get(kinds[key], kinds[key])
        if not isinstance(value, wanted) or (isinstance(value, bool) and kinds[key] is not bool):
            raise UsageError(f"{where}: {key} is {value!r}, which is no {kinds[key].__name__}")


def _folder() -> Any:
    return resources.files("mlx_gemma4.conversions") / "recipes"
