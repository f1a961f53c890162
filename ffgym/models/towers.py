"""Checkpoints of several towers: the text model is pruned, the rest is carried along and saved with it.

The text model is taken out as a causal LM of its own, which shares its modules with the whole. All of ffgym but loading
and saving sees that one alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from ffgym.errors import ModelError, first_line
from ffgym.models.families import Family, family_of_type
from ffgym.models.loading_errors import quiet
from ffgym.models.modeling_ffgym import PREFIX, make_towers

# Keys of the dense checkpoint's config that are not true of the pruned one.
ABOUT_THE_SOURCE = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
BY_ITSELF = "docs/models.md says how to save the text model by itself."
PROBE = 16  # tokens
TOLERANCE = 0.01  # of the largest logit; another mask may mean another kernel, and other last bits


@dataclass(frozen=True)
class Towers:
    """The model that a text model was taken out of."""

    whole: Any  # it shares the modules of the text model, so that it is pruned with it
    path: str  # of the text model, without its head, in it
    files: tuple[Path, ...] = ()  # of its processor

    def around(self, text: Any, family: Family) -> Towers:
        """The same with another text model in its place. Nothing is copied; it is made to be saved.

        Args:
            text: a causal LM of the family's stock class, or of the one that a pruned model is loaded with.
        """
        whole, config = self.whole, text.config
        config_class, model_class = type(whole.config), type(whole)
        if config.model_type.startswith(PREFIX):
            config_class, model_class, _ = make_towers(whole.config.model_type, *family.saved_classes())
        settings = {name: value for name, value in whole.config.to_dict().items() if name not in ABOUT_THE_SOURCE}
        settings |= {"text_config": config, "tie_word_embeddings": config.tie_word_embeddings}
        with torch.device("meta"):
            built = model_class(config_class(**settings))
        prefix = f"{self.path}."
        weights = {name: weight for name, weight in whole.state_dict().items() if not name.startswith(prefix)}
        weights |= {prefix + name: weight for name, weight in text.base_model.state_dict().items()}
        return replace(self, whole=filled(built, weights, whole))


def filled(built: Any, weights: dict[str, torch.Tensor], model: Any) -> Any:
    """A model that was built on the meta device, with weights and the generation settings of another one."""
    built.load_state_dict(weights, assign=True)
    built.tie_weights()
    built.generation_config = copy.deepcopy(model.generation_config)
    return built


def has_towers(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of several towers that can be loaded, and the one for text of a supported family."""
    text, kind = config.get("text_config"), config.get("model_type")
    if not isinstance(text, Mapping) or kind not in CONFIG_MAPPING:
        return False
    try:
        family_of_type(str(text.get("model_type")))
    except ModelError:
        return False
    return CONFIG_MAPPING[kind] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def auto_class(config: Mapping[str, Any]) -> Any:
    """The class that loads the model of a ``config.json`` as a whole."""
    return AutoModelForImageTextToText if has_towers(config) else AutoModelForCausalLM


def check_towers(config: Mapping[str, Any]) -> None:
    """Refuse a dense checkpoint of several towers that could not be saved with a pruned text model.

    Args:
        config: its ``config.json``.

    Raises:
        ModelError: the text model is of no supported family, transformers does not load the whole, or its code builds
            its text model in a way that layers of different sizes cannot be said to.
    """
    text, kind = dict(config["text_config"]), str(config.get("model_type"))
    inner = str(text.get("model_type"))
    family = family_of_type(inner)
    if not has_towers(config):
        raise ModelError(
            f"{kind!r} is a checkpoint of several towers, and transformers has no image-text-to-text model of it",
            hint=BY_ITSELF,
        )
    classes = family.saved_classes()
    settings, sizes = (
        {name: value for name, value in part.items() if name not in ABOUT_THE_SOURCE} for part in (config, text)
    )
    try:
        config_class, model_class, _ = make_towers(kind, *classes)
        with quiet(), torch.device("meta"):
            whole = model_class(config_class(**{**settings, "text_config": sizes}))
        if any(type(module) is classes[2] for module in whole.modules()):
            return
        reason = "its code does not build the one for text from the type that its config names"
    except Exception as error:  # each architecture has its own ways to fail
        reason = first_line(error)
    raise ModelError(
        f"{kind!r} is a checkpoint of several towers that cannot be saved with a pruned text model: {reason}",
        hint=BY_ITSELF,
    )


def text_model_of(whole: Any, name: str, files: tuple[Path, ...]) -> tuple[Any, Towers]:
    """The causal LM of text in a model of several towers; nothing is copied.

    Args:
        whole: on the CPU, in evaluation mode.
        name: what the user called it.
        files: of its processor.

    Raises:
        ModelError: the whole computes something else from text than its text model by itself.
    """
    kind = type(whole.config.text_config)
    base, stock = MODEL_MAPPING[kind], MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    path = next(path for path, module in whole.named_modules() if type(module) is base)
    tower = whole.get_submodule(path)
    with torch.device("meta"):
        text = stock(tower.config)
    setattr(text, text.base_model_prefix, tower)
    text.set_output_embeddings(whole.get_output_embeddings())
    text.config.tie_word_embeddings = whole.config.tie_word_embeddings
    text.generation_config = copy.deepcopy(whole.generation_config)
    _check_same_logits(whole, text.eval(), name)
    return text, Towers(whole, path, files)


def _check_same_logits(whole: Any, text: Any, name: str) -> None:
    ids = torch.arange(PROBE)[None] % text.config.vocab_size
    with torch.no_grad():
        separate = text(ids).logits.float()
        try:
            together = whole(input_ids=ids).logits.float()
        except Exception as error:  # whatever it needs beside text
            raise ModelError(
                f"model {name!r}, a {type(whole).__name__}, computes nothing from text alone: {first_line(error)}",
                hint=BY_ITSELF,
            ) from error
    if (separate - together).abs().max() > TOLERANCE * separate.abs().max():
        raise ModelError(
            f"model {name!r}, a {type(whole).__name__}, computes other logits from text than its text model, a"
            f" {type(text).__name__}, so that what is measured of one is not true of the other",
            hint=BY_ITSELF,
        )
