"""Loading: a model and its tokenizer from the embedded default, a folder, a ``.gguf`` file, or the Hugging Face hub.

Only safetensors are read, code from a checkpoint is never run, and a checkpoint that lacks weights is refused. A GGUF
is dequantised once and kept in the cache as safetensors.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from rich.console import Console
from safetensors import SafetensorError, safe_open

from ffgym.data.assets import SMOLLM2, cache_dir, fetch, write_folder_once
from ffgym.errors import ModelError, is_out_of_memory
from ffgym.files import FileFormat
from ffgym.models.families import OTHER_LAYERS, family_of_type, register
from ffgym.models.placement import choose_device, choose_dtype, devices_of, move, named_dtype
from ffgym.plugins import manager

logger = logging.getLogger("ffgym")

# float16 keeps 11 significant bits of weights that were quantised to 4 (a few tensors to 8). On the demo model that
# moves the loss by 1e-5 nats per token (KL 2e-6); bfloat16 would move it by 2e-4 (KL 6e-5), float32 doubles the disk.
GGUF_DTYPE = torch.float16
USE_THE_SOURCE = "Name the folder that it was made from, in safetensors, or start from the dense model."
DEMO_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_DESCRIPTION = "SmolLM2-135M-Instruct, dequantised from Q4_1 GGUF"
HUB_SECONDS = 5.0
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
LAYER = re.compile(r"(?:model\.)?(?:decoder\.)?layers\.(\d+)\.")
BLOCK = re.compile(r"blk\.(\d+)\.")
MOST_LAYERS = 10_000  # where no weights are there to count them
NUMBERED_BLOCK = re.compile(r"[^\d]*?\.(?=\d+\.)")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
PICKLED = ("*.bin", "*.pt", "*.pth")
AGAIN = "Write or download the model again."

Shapes = dict[str, tuple[int, ...]]


class _WeightIndex(BaseModel):
    """Which file holds each weight."""

    weight_map: dict[str, str]


MODEL_CONFIG = FileFormat("model configuration", dict[str, Any], ModelError, AGAIN)
WEIGHT_INDEX = FileFormat("index of weights", _WeightIndex, ModelError, AGAIN)


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM ready to be measured, with its tokenizer.

    Attributes:
        model: the transformers model, in eval mode, without gradients.
        tokenizer: its tokenizer.
        name: what the user called it.
        description: one line for tables: what it is and where it came from.
        dtype: the weights' dtype.
        device: where its first parameter lies.
    """

    model: Any
    tokenizer: Any
    name: str
    description: str
    dtype: torch.dtype
    device: torch.device

    @property
    def dtype_name(self) -> str:
        """``"bfloat16"``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def context_limit(self) -> int:
        """The longest window that the model takes, in tokens."""
        return int(self.model.config.max_position_embeddings)

    def check_ids(self, ids: torch.Tensor, what: str) -> None:
        """Refuse token ids that the embedding has no row for; a GPU could not be used any more after one.

        Args:
            ids: integers, of any shape, not empty.
            what: the text that they are of.

        Raises:
            ModelError: the tokenizer is not the model's.
        """
        rows = self.model.get_input_embeddings().num_embeddings
        if (largest := int(ids.max())) >= rows:
            raise ModelError(
                f"token {largest} of {what}: the embedding of model {self.name!r} has {rows} rows, its tokenizer more",
                hint="Put the tokenizer that the model was trained with into its folder.",
            )


def load(
    name: str, *, revision: str | None = None, dtype: str = "auto", device: str = "auto", any_family: bool = False
) -> LoadedModel:
    """Load a causal LM and its tokenizer.

    Args:
        name: ``"demo"``, a ``.gguf`` file, a folder, or a hub id.
        revision: branch, tag or commit of a hub model.
        dtype: ``"auto"`` (see :mod:`ffgym.models.placement`), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: ``"auto"`` (cuda where there is one, else cpu), a torch device, or ``"balanced"`` to spread the layers
            over all GPUs.
        any_family: also load architectures that cannot be pruned, as long as they are measured right.

    Raises:
        ModelError: a checkpoint that is missing, damaged, incomplete, pickled, of another family or needs code of its
            own, a hub that cannot be reached, an unknown dtype or device. The hint says what to do.
        AssetError: the embedded default could not be fetched, or the cache cannot be written.
    """
    target = choose_device(device)
    chosen = choose_dtype(target) if dtype == "auto" else named_dtype(dtype)
    logger.info("dtype %s on %s%s", str(chosen).removeprefix("torch."), target, " (auto)" if dtype == "auto" else "")
    register(map(family_of_type, manager.names("family")))
    source, description = _locate(name, any_family=any_family)
    if revision is not None and not description.startswith("hub model"):
        raise ModelError(
            f"model.revision = {revision!r} means something for hub models only, and {name!r} is none",
            hint="Leave model.revision out.",
        )
    options: dict[str, Any] = {"device_map": "balanced"} if device == "balanced" else {}
    if description.startswith("hub model"):
        options["local_files_only"] = _only_cached(name, revision)
        _check_hub_config(name, revision, any_family=any_family, local_files_only=options["local_files_only"])
    else:
        _check_sizes(name, Path(source), any_family=any_family)
    model, tokenizer = _load_checkpoint(source, name, revision, chosen, options)
    if device != "balanced":
        model = move(model, target)
    elif any(place.type != "cuda" for place in devices_of(model)):  # "meta": on the disk, brought in for each call
        raise ModelError(
            f"model {name!r} does not fit the GPUs: part of it would stay on the CPU or the disk,"
            " and cannot be cut there",
            hint="Use more or larger GPUs, model.dtype bfloat16, or model.device cpu.",
        )
    model.eval()
    model.requires_grad_(False)
    if description.startswith("hub model"):
        description = f"{description} at {checkpoint_folder(name, revision=revision).name[:12]}"  # a snapshot's commit
    first = next(model.parameters())
    return LoadedModel(model, tokenizer, name, description, first.dtype, first.device)


def check_source(name: str) -> None:
    """Raise what :func:`load` would raise before it reads weights: for whoever loads several models in turn.

    Args:
        name: see :func:`load`. Of a hub id nothing is checked.

    Raises:
        ModelError: a folder that holds no model, a file that is not there, pickled weights.
        AssetError: the embedded default could not be fetched.
    """
    _locate(name)


def checkpoint_folder(name: str, *, revision: str | None = None) -> Path:
    """The folder that a model's files are read from: of a hub model, its snapshot in the hub's cache.

    Args:
        name: see :func:`load`, which must have loaded it once.
        revision: of a hub model.
    """
    source, description = _locate(name)
    if not description.startswith("hub model"):
        return Path(source)
    from transformers.utils import cached_file

    return Path(cached_file(source, "config.json", revision=revision or "main", local_files_only=True)).parent


def load_config(folder: Path) -> Any:
    """The config of a folder that holds a model, without its weights.

    Raises:
        ModelError: a folder that is missing or lacks a part, or a config that cannot be read.
    """
    from transformers import AutoConfig

    if not folder.is_dir():
        raise ModelError(f"model folder {str(folder)!r} does not exist", hint="Check the path.")
    _check_folder(folder)
    register(map(family_of_type, manager.names("family")))
    try:
        with _quiet():
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # damaged files fail in as many ways as there are parsers
        raise _loading_error(error, str(folder), str(folder)) from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder that holds a model.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"folder {str(folder)!r} holds no tokenizer",
            hint="Copy tokenizer.json and tokenizer_config.json of the dense model into it.",
        )
    return _tokenizer(str(folder), str(folder), trust_remote_code=False)


def _locate(name: str, *, any_family: bool = True) -> tuple[str, str]:
    """Where to load from (a folder, or a hub id), and how to describe it."""
    if name == "demo":
        folder = fetch(SMOLLM2)
        return str(_dequantised(next(folder.glob("*.gguf")), SMOLLM2.sha256)), DEMO_DESCRIPTION
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"model file {name!r} does not exist", hint="Check the path.")
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        return str(_dequantised(path, content, any_family=any_family)), f"{path.name}, dequantised from GGUF"
    if path.is_dir():
        _check_folder(path)
        return str(path), f"folder {path.resolve().name}"
    if path.exists():
        raise ModelError(f"model {name!r} is a file", hint="Name the folder that holds it, a .gguf file, or a hub id.")
    if HUB_ID.fullmatch(name) and not name.startswith("."):
        return name, f"hub model {name}"
    raise ModelError(
        f"model folder {name!r} does not exist", hint="Check the path, or name 'demo', a .gguf file or a hub id."
    )


def _only_cached(name: str, revision: str | None) -> bool:
    """Whether a hub model is taken from the hub's cache without asking the hub, which cannot be reached.

    One small question: transformers asks for every file of a model, and for each several times before it gives up.

    Raises:
        ModelError: the hub cannot be reached, and its cache does not have the model.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS)
    except HfHubHTTPError:  # it answered; what is wrong with the name, transformers says
        return False
    except Exception as error:  # no name service, no route, a proxy's refusal, HF_HUB_OFFLINE: each has its own type
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision or "main"), str):
            return True
        raise _not_from_hub(name, f"the hub cannot be reached ({_said(error)})") from error
    return False


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads of a folder, which may hold the weights in other layouts too.

    That is ``model.safetensors``, or else what its index names; where neither is there, all of them.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    return [folder / name for name in sorted(set(WEIGHT_INDEX.read(index).weight_map.values()))]


def _check_folder(folder: Path) -> None:
    """Say what a folder lacks before transformers says it at length."""
    config = folder / "config.json"
    if not config.is_file():
        if (folder / "model" / "config.json").is_file():
            raise ModelError(f"{str(folder)!r} is the folder of a run", hint=f"Name {str(folder / 'model')!r}.")
        raise ModelError(
            f"folder {str(folder)!r} holds no model: config.json is missing",
            hint="Name a folder that save_pretrained wrote.",
        )
    MODEL_CONFIG.read(config)
    if any(folder.glob("*.safetensors")):
        return
    if any(path for pattern in PICKLED for path in folder.glob(pattern)):
        raise _pickled(str(folder), Path(f"{folder.resolve()}-safetensors"))
    raise ModelError(
        f"folder {str(folder)!r} holds no weights: there is no .safetensors file",
        hint=AGAIN,
    )


def check_model_type(model_type: str, *, any_family: bool = False) -> None:
    """Refuse an architecture that cannot be pruned or, with ``any_family``, not even be measured right."""
    if not any_family or model_type in OTHER_LAYERS:
        family_of_type(model_type)


def _check_hub_config(name: str, revision: str | None, *, any_family: bool, local_files_only: bool) -> None:
    """Refuse what a hub model's config says before its weights are downloaded."""
    from transformers.utils import cached_file

    try:
        file = cached_file(name, "config.json", revision=revision or "main", local_files_only=local_files_only)
    except OSError:  # loading says what is wrong
        return
    _check_config(name, MODEL_CONFIG.read(Path(file)), any_family=any_family, depth=MOST_LAYERS)


def _check_config(name: str, config: dict[str, Any], *, any_family: bool, depth: int) -> None:
    if isinstance(kind := config.get("model_type"), str) and "auto_map" not in config:
        check_model_type(kind, any_family=any_family)
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and not 0 < layers <= depth:
        raise _misfit(name, f"num_hidden_layers = {layers}, and the checkpoint has {depth} layers")


def _check_sizes(name: str, folder: Path, *, any_family: bool) -> None:
    """Hold a folder's config against the shapes in its weight files, before anything of the config's sizes is made."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = MODEL_CONFIG.read(folder / "config.json")
    try:
        shapes = _shapes(folder)
    except (SafetensorError, OSError) as error:
        raise _loading_error(error, str(folder), name) from error
    _check_config(name, config, any_family=any_family, depth=_depth(LAYER, shapes) or MOST_LAYERS)
    if any_family or "quantization_config" in config:  # names and shapes in the files may be others than the model's
        return
    try:
        with _quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # wrong values fail in as many ways as there are layers
        raise _loading_error(error, str(folder), name) from error
    for key, tensor in sorted(model.state_dict().items()):
        if (in_file := shapes.get(key, tuple(tensor.shape))) != tuple(tensor.shape):
            raise _misfit(name, f"{key} is {in_file} in the checkpoint and {tuple(tensor.shape)} by the config")


def _shapes(folder: Path) -> Shapes:
    """The shape of every tensor in a folder's weight files, from their headers."""
    shapes: Shapes = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return shapes


def _depth(numbered: re.Pattern[str], names: Iterable[str]) -> int:
    """How many decoder layers there are by the names of their tensors."""
    return max((int(match[1]) + 1 for name in names if (match := numbered.match(name))), default=0)


def _pickled(name: str, target: Path) -> ModelError:
    """Pickled weights can run code while they load, so converting them is left to whoever trusts them."""
    steps = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"M.from_pretrained({name!r}, use_safetensors=False).save_pretrained({str(target)!r}); "
        f"T.from_pretrained({name!r}).save_pretrained({str(target)!r})"
    )
    return ModelError(
        f"model {name!r} has pickled weights only, which are not loaded",
        hint=f'If you trust it, convert it once and name {str(target)!r} instead:\n  python -c "{steps}"',
    )


def _load_checkpoint(
    source: str, name: str, revision: str | None, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    origin = {"revision": revision or "main", "trust_remote_code": False}
    try:
        with _quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation="sdpa",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                return_dict=True,  # whatever config.json says: results are read by name
                output_attentions=False,
                **options,
                **origin,
            )
    except Exception as error:  # damaged files fail in as many ways as there are parsers
        raise _loading_error(error, source, name, only_cached=options.get("local_files_only", False)) from error
    _check_complete(name, model, report)
    if Path(source).is_dir():
        return model, load_tokenizer(Path(source))
    return model, _tokenizer(source, name, local_files_only=options.get("local_files_only", False), **origin)


def _tokenizer(source: str, name: str, **options: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # damaged files fail in as many ways as there are parsers
        raise _loading_error(error, source, name) from error


def _check_complete(name: str, model: Any, report: dict[str, Any]) -> None:
    """transformers makes up what a checkpoint lacks, and leaves out what its config has no place for.

    A model like that would be measured in vain.
    """
    for key, in_file, by_config in sorted(report["mismatched_keys"]):
        raise _misfit(name, f"{key} is {tuple(in_file)} in the checkpoint and {tuple(by_config)} by the config")
    if surplus := _surplus_in_layers(model, report["unexpected_keys"]):
        raise _misfit(name, f"it has no place for {len(surplus)} weights of the checkpoint, {surplus[0]} first")
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"model {name!r} is incomplete: {len(missing)} weights are missing, {missing[0]} first",
            hint=AGAIN,
        )


def _misfit(name: str, what: str) -> ModelError:
    return ModelError(
        f"model {name!r} does not fit its config.json: {what}",
        hint="Write or download the model again, config.json and weights together.",
    )


def _surplus_in_layers(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Weights that no place was found for, in the numbered blocks that the model is made of.

    What stands elsewhere (a vision tower, old rotary buffers) is nobody's loss.
    """
    blocks = {match[0] for key in model.state_dict() if (match := NUMBERED_BLOCK.match(key))}
    weights = (key for key in unexpected if key.endswith((".weight", ".bias")))
    return sorted(key for key in weights if (match := NUMBERED_BLOCK.match(key)) and match[0] in blocks)


def _loading_error(error: Exception, source: str, name: str, *, only_cached: bool = False) -> ModelError:
    said = _said(error)
    if is_out_of_memory(error):
        return ModelError(
            f"model {name!r} does not fit into memory: {said}",
            hint="Use a smaller model, model.dtype bfloat16, model.device cpu, or balanced over several GPUs.",
        )
    if "trust_remote_code" in str(error):
        return ModelError(
            f"model {name!r} needs code from its own checkpoint, which is never run",
            hint="Use a model whose architecture transformers knows.",
        )
    if Path(source).is_dir():
        return ModelError(
            f"model {name!r} cannot be loaded, its files are damaged or incomplete: {said}",
            hint=AGAIN,
        )
    if only_cached and "safetensors" in str(error):
        return _not_from_hub(name, "its weights are not in the hub's cache, and the hub cannot be reached")
    if "safetensors" in str(error):  # the repository was reached, and holds other weights
        return _pickled(name, Path(f"{name.split('/')[-1]}-safetensors"))
    return _not_from_hub(name, said)


def _not_from_hub(name: str, why: str) -> ModelError:
    return ModelError(
        f"model {name!r} is no folder here, and could not be loaded from the hub: {why}",
        hint="Check the name and the network; without a network use 'demo', a .gguf file, a downloaded folder,"
        " or a model that is already in the hub's cache.",
    )


def _said(error: Exception) -> str:
    """The first line of a library's message, and the second where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first, *others = lines or [type(error).__name__]
    return f"{first} {others[0]}" if first.endswith(":") and others else first


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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


def _dequantised(gguf: Path, content: str, *, any_family: bool = False) -> Path:
    """The folder of a GGUF's safetensors copy, made on the first call.

    Args:
        gguf: the file.
        content: a hash that names its content.
        any_family: see :func:`load`.
    """

    def convert(folder: Path) -> None:
        Console(stderr=True).print(f"Converting {gguf.name} to safetensors, once", soft_wrap=True, highlight=False)
        model, tokenizer = _read_gguf(gguf, any_family=any_family)
        try:
            with _quiet():
                model.save_pretrained(folder)
        except SafetensorError as error:  # safetensors wraps what the disk said
            full = "No space left" in str(error)
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
        tokenizer.save_pretrained(folder)

    return write_folder_once(cache_dir() / "models" / f"{gguf.stem}-{content[:12]}-float16", convert)


def _read_gguf(gguf: Path, *, any_family: bool) -> tuple[Any, Any]:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    numbers = _refuse_what_would_be_lost(gguf, any_family=any_family)
    # Newer versions keep the blocks packed where they find a kernel for them, unless told not to.
    dense = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    try:
        # transformers' bar over the tensors knows no switch.
        with _quiet(), contextlib.redirect_stderr(io.StringIO()), _alone(gguf) as place:
            model, report = AutoModelForCausalLM.from_pretrained(
                place, gguf_file=gguf.name, dtype=GGUF_DTYPE, output_loading_info=True, trust_remote_code=False, **dense
            )
            tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=gguf.name, trust_remote_code=False)
    except Exception as error:  # damaged files fail in as many ways as there are parsers
        said = _said(error)
        raise ModelError(
            f"{str(gguf)!r} cannot be read as a GGUF model: {said}",
            hint="It may be damaged, or of an architecture that transformers cannot read from GGUF: download it again,"
            " or use the model's safetensors.",
        ) from error
    _check_complete(gguf.name, model, report)
    _refuse_lost_weights(gguf, numbers, model)
    # The weights are plain tensors now; without these marks save_pretrained takes them for quantised and refuses.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _check_gguf_sizes(path: Path, fields: dict[str, Any], architecture: str, shapes: Shapes) -> None:
    """Hold the sizes that a file states against its tensors, before anything of these sizes is made."""
    rows = shapes.get("blk.0.attn_q.weight", (0,))[0]
    in_tensors = {
        "block_count": [_depth(BLOCK, shapes)],
        "embedding_length": shapes.get("token_embd.weight", ())[1:],
        "feed_forward_length": shapes.get("blk.0.ffn_up.weight", ())[:1],
        "attention.head_count": range(1, rows + 1),
        "attention.head_count_kv": range(1, rows + 1),
    }
    for size, possible in in_tensors.items():
        key = f"{architecture}.{size}"
        if possible and key in fields and fields[key] not in possible:
            raise ModelError(f"{str(path)!r}: {key} = {fields[key]} does not fit its tensors", hint=AGAIN)


@contextlib.contextmanager
def _alone(gguf: Path) -> Iterator[str]:
    """A folder that holds the file alone: transformers also reads adapters and configs that lie beside it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / gguf.name).symlink_to(gguf.resolve())
        yield folder


def _refuse_what_would_be_lost(path: Path, *, any_family: bool) -> int:
    """Refuse what transformers' reader leaves out without a word, or takes for something else.

    Returns:
        how many numbers the tensors of the file hold; 0 where it is damaged, of which what reads it next says more.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields, tensors = reader.fields, {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
        shapes = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors}
        architecture = fields["general.architecture"].contents()
        stretched = [
            fields[key].name
            for key in (f"{architecture}.rope.scaling.type", f"{architecture}.rope.scale_linear")
            if key in fields and fields[key].contents() not in ("none", 1.0)
        ]
    except Exception:
        return 0
    for size in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
        field = fields.get(f"{architecture}.{size}")
        if field is not None and field.types[0] == gguf.GGUFValueType.ARRAY:
            # It takes a size per layer for a size, and fails far from the reason.
            raise ModelError(
                f"the layers in {str(path)!r} differ in size ({field.name} is a list): it has been pruned, or was made"
                " that way, and transformers cannot read it",
                hint=USE_THE_SOURCE,
            )
    check_model_type(architecture, any_family=any_family)
    _check_gguf_sizes(path, {key: field.contents() for key, field in fields.items()}, architecture, shapes)
    stretched += [name for name in tensors if name.startswith(("rope_freqs", "rope_factors"))]
    if stretched:
        raise ModelError(
            f"the rotary positions in {str(path)!r} are scaled ({stretched[0]}), and transformers would leave that out",
            hint=USE_THE_SOURCE,
        )
    return sum(tensors.values())


def _refuse_lost_weights(path: Path, numbers: int, model: Any) -> None:
    """Refuse a model that has not all the numbers of its file: transformers drops what its config has no place for."""
    lost = numbers - sum(parameter.numel() for parameter in model.parameters())
    if numbers and lost:
        raise ModelError(
            f"{str(path)!r} holds {numbers:,} numbers, and transformers would take {numbers - lost:,} of them, without"
            " the biases of linears, for one",
            hint=USE_THE_SOURCE,
        )
