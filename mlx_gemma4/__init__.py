"""Gemma 4 for MLX. The public names, each imported when first used so that `import mlx_gemma4` stays cheap.

from mlx_gemma4 import load, generate

model, tokenizer = load("26b-a4b")
print(generate(model, tokenizer, "Why is the sky blue?"))
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .batches import generate_batch, stream_batch
    from .chat import Chat
    from .conversions.convert import convert
    from .engine import Engine
    from .errors import Gemma4Error
    from .generation import GenerationResponse, generate, generate_step, stream_generate
    from .loading import load
    from .media.items import MediaSettings
    from .sampling import make_logits_processors, make_sampler
    from .senses import media_prompt
    from .tokenizer import Tokenizer

_HOME = {
    "Chat": "chat",
    "Engine": "engine",
    "Gemma4Error": "errors",
    "GenerationResponse": "generation",
    "MediaSettings": "media.items",
    "Tokenizer": "tokenizer",
    "convert": "conversions.convert",
    "generate": "generation",
    "generate_batch": "batches",
    "generate_step": "generation",
    "load": "loading",
    "make_logits_processors": "sampling",
    "make_sampler": "sampling",
    "media_prompt": "senses",
    "stream_batch": "batches",
    "stream_generate": "generation",
}

__all__ = [
    "Chat",
    "Engine",
    "Gemma4Error",
    "GenerationResponse",
    "MediaSettings",
    "Tokenizer",
    "__version__",
    "convert",
    "generate",
    "generate_batch",
    "generate_step",
    "load",
    "make_logits_processors",
    "make_sampler",
    "media_prompt",
    "stream_batch",
    "stream_generate",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'mlx_gemma4' has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
