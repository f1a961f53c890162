"""What transformers and the hub raise while a model is loaded, in words that say what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ffgym.errors import ModelError, first_line, is_out_of_memory
from ffgym.interrupts import shared_by_threads
from ffgym.plugins.architectures import MODEL_CONFIG

AGAIN = MODEL_CONFIG.hint


def loading_error(error: Exception, source: str, name: str, *, only_cached: bool = False) -> ModelError:
    """The error that says what a library's error means for the user.

    Args:
        source: the folder or hub id that was loaded from.
        name: what the user called it.
        only_cached: whether the hub could not be asked.
    """
    said = first_line(error)
    if is_out_of_memory(error):
        return ModelError(
            f"model {name!r} does not fit into memory: {said}",
            hint="Use model.dtype bfloat16, model.device cpu or balanced, in a run model.placement stream, or a smaller"
            " model.",
        )
    if "trust_remote_code" in str(error):
        return ModelError(
            f"model {name!r} needs code from its own checkpoint, which ffgym never runs",
            hint="Use a model whose architecture transformers knows.",
        )
    if isinstance(error, ImportError):
        return ModelError(
            f"model {name!r} needs a package that is not installed: {said}",
            hint="Install it, or name a copy of the model that is not quantised.",
        )
    if "`nemotron-nas`" in said:  # what `ffgym export` writes
        return ModelError(
            f"model {name!r} is a nemotron-nas export for other software, such as MLX; transformers cannot read it",
            hint="Name the folder that it was made from.",
        )
    if "does not recognize this architecture" in str(error):
        return ModelError(
            f"model {name!r} needs a newer transformers: {said}",
            hint="Try pip install --upgrade transformers, and check model_type in its config.json.",
        )
    if Path(source).is_dir():
        return ModelError(
            f"model {name!r} cannot be loaded because its files are damaged or incomplete: {said}", hint=AGAIN
        )
    if only_cached and "safetensors" in str(error):
        return not_from_hub(name, "its weights are not in the hub's cache, and the hub cannot be reached")
    if "safetensors" in str(error):  # the repository was reached, and holds other weights
        return pickled(name, Path(f"{name.split('/')[-1]}-safetensors"))
    return not_from_hub(name, said)


@contextlib.contextmanager
def explained(source: str, name: str, *, only_cached: bool = False) -> Iterator[None]:
    """Within it transformers is quiet, and whatever it raises becomes a `loading_error`."""
    try:
        with quiet():
            yield
    except Exception as error:  # damaged files fail in as many ways as there are parsers
        raise loading_error(error, source, name, only_cached=only_cached) from error


def not_from_hub(name: str, why: str) -> ModelError:
    """The error for a name that is no folder and that the hub does not know."""
    return ModelError(
        f"model {name!r} is no folder here, and could not be loaded from the hub: {why}",
        hint="Check the name and the network; without a network use 'demo', a .gguf file, a downloaded folder,"
        " or a model that is already in the hub's cache.",
    )


def pickled(name: str, target: Path) -> ModelError:
    """The error for pickled weights, which can run code: whoever trusts them may convert them."""
    return ModelError(
        f"model {name!r} has only pickled weights, which are not loaded",
        hint=f"If you trust it, convert it once and name {str(target)!r} instead:\n"
        f"  {_conversion(name, target, 'use_safetensors=False')}",
    )


def mxfp4(name: str) -> ModelError:
    """The error for experts whose weights are MXFP4 codes, as gpt-oss comes: whoever has the space may convert them."""
    target = Path(f"{Path(name).resolve().name}-bfloat16")
    return ModelError(
        f"the experts of model {name!r} are quantised to MXFP4, and pruning needs plain weights",
        hint=f"Dequantise it once, which takes four times its space, and name {str(target)!r} instead:\n"
        f"  {_conversion(name, target, 'quantization_config=C(dequantize=True)', ', Mxfp4Config as C')}",
    )


def _conversion(name: str, target: Path, options: str, imports: str = "") -> str:
    """The command that loads a model and its tokenizer with these options, and saves both."""
    steps = (
        f"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T{imports}; "
        f"M.from_pretrained({name!r}, {options}).save_pretrained({str(target)!r}); "
        f"T.from_pretrained({name!r}).save_pretrained({str(target)!r})"
    )
    return f'python -c "{steps}"'


def misfit(name: str, what: str) -> ModelError:
    """The error for weights and a config that do not belong together."""
    return ModelError(
        f"model {name!r} does not fit its config.json: {what}",
        hint="Write or download the model again, config.json and weights together.",
    )


@shared_by_threads
@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and warnings off the terminal; what matters of them is an error here."""
    from transformers.utils import logging as transformers_logging

    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
