"""Any model of Hugging Face's transformers, with the head that the data ask for."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memfold.backbones.hub import import_extra, refuse_unknown
from memfold.data.spec import Classes, DataSpec, Images, NextToken, Reals, Table, Tokens
from memfold.errors import InputError

__all__ = ["build_hf"]


def build_hf(spec: DataSpec, *, name: str, config: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a model with new weights from its type, or with its own from a local folder.

    The head: causal language model for next tokens (BERT and its kin become decoders, which see
    what came before alone), sequence or image classification for classes and numbers. The
    vocabulary, the positions, the size of images and the number of outputs are the data's, unless
    `config` says otherwise. Nothing is downloaded, and no code of a folder runs.

    Args:
        spec: What the data are.
        name: A model type such as `gpt2`, `llama`, `bert`, `vit`; or a folder with `config.json`
            and safetensors.
        config: Fields of the model's configuration, such as `{n_layer: 4, n_embd: 128}`.

    Returns:
        A model whose output has `.logits`.

    Raises:
        InputError: transformers is not installed, there is no such model, it has no such head, or
            it refuses its configuration.
    """
    library = import_extra("transformers", "hf")
    auto = getattr(library, _head(spec))
    given = dict(config or {})
    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            fields = library.AutoConfig.from_pretrained(folder, local_files_only=True)
            facts = _outputs(spec, fields) | given
            model = auto.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                **facts,
            )
        else:
            refuse_unknown(name, library.CONFIG_MAPPING, "model type of transformers, nor a folder")
            _refuse_unknown_fields(library.AutoConfig.for_model(name), given)
            facts = _outputs(spec, library.AutoConfig.for_model(name)) | given
            fields = library.AutoConfig.for_model(name, **facts)
            for key, value in _inputs(spec).items():
                names = {key, fields.attribute_map.get(key, key)}
                if hasattr(fields, key) and not names & given.keys():
                    setattr(fields, key, value)
            fields.architectures = fields.architectures or []  # some types look a head up in it
            _refuse_unfit(spec, fields)
            model = auto.from_config(fields, trust_remote_code=False)
            _unpad(model)
    except InputError:
        raise
    except Exception as error:  # whatever a library of hundreds of models raises
        if "ignore_mismatched_sizes" in str(error):
            raise InputError(
                f"backbone.name={name}: tensors in the folder have other shapes than the model "
                "(listed above); 'backbone.config={ignore_mismatched_sizes: true}' draws these "
                "anew, such as another head"
            ) from error
        if str(error).startswith("Unrecognized configuration class"):
            raise InputError(
                f"backbone.name={name} takes no {spec.inputs.kind} or gives no "
                f"{spec.target.kind.replace('_', ' ')}: transformers has no {auto.__name__} of it"
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"backbone.name={name}: {type(error).__name__}: {reason}") from error
    _refuse_unfit(spec, model.config)
    if isinstance(spec.inputs, Images):
        _try_image(name, spec.inputs, model)
    model.train()  # those of folders are for evaluation
    model.config.use_cache = False  # of training; `generate` asks for it itself
    if getattr(model.config, "pad_token_id", None) is None:
        # A classifier of a causal model reads the last token that is no padding: none is.
        model.config.pad_token_id = -1
    return model


def _unpad(model: nn.Module) -> None:
    """No token of the data is padding: RoBERTa and its kin would count positions without it."""
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
        elif hasattr(module, "padding_idx"):
            module.padding_idx = -1  # positions are counted from padding_idx + 1 on


def _refuse_unknown_fields(config: Any, given: Mapping[str, Any]) -> None:
    """Refuse what the library would keep without a word, and not use."""
    for key in given:
        if not hasattr(config, key) and not hasattr(config, f"_{key}"):  # _attn_implementation
            nearest = difflib.get_close_matches(key, config.to_dict(), n=3, cutoff=0.3)
            raise InputError(
                f"backbone.config.{key}: {config.model_type} has no such field; nearest: "
                f"{', '.join(nearest) or 'none'}"
            )


def _head(spec: DataSpec) -> str:
    if isinstance(spec.inputs, Table):
        raise InputError(
            "backbone=hf takes images or tokens, and the data give tables; docs/backbones.md lists "
            "backbones for tables"
        )
    if isinstance(spec.target, NextToken):
        return "AutoModelForCausalLM"
    if isinstance(spec.inputs, Images):
        return "AutoModelForImageClassification"
    return "AutoModelForSequenceClassification"


def _outputs(spec: DataSpec, fields: Any) -> dict[str, object]:
    """Return what the configuration `fields` calls the kind of outputs."""
    if isinstance(spec.target, Classes | Reals):
        return {"num_labels": spec.num_outputs}
    return {"is_decoder": True} if hasattr(fields, "is_decoder") else {}


def _inputs(spec: DataSpec) -> Mapping[str, object]:
    """Return what a configuration calls facts of the data; each is set where it exists."""
    inputs = spec.inputs
    if isinstance(inputs, Images):
        is_square = inputs.height == inputs.width
        size = inputs.height if is_square else (inputs.height, inputs.width)
        return {"num_channels": inputs.channels, "image_size": size}
    assert isinstance(inputs, Tokens)
    size = {"vocab_size": inputs.vocabulary_size, "max_position_embeddings": inputs.length}
    return size | {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def _refuse_unfit(spec: DataSpec, config: Any) -> None:
    """Refuse what the user or a folder has made too small for the data."""
    inputs = spec.inputs
    assert not isinstance(inputs, Table)
    if isinstance(inputs, Tokens):
        least = {
            "vocab_size": (inputs.vocabulary_size, "tokens; FOLDER/tokenizer.json has its own"),
            "max_position_embeddings": (inputs.length, "positions, data.length"),
        }
        for key, (needed, what) in least.items():
            size = getattr(config, key, None)
            if isinstance(size, int) and size < needed:
                raise InputError(f"backbone.config.{key}={size}: the data have {needed} {what}")
        return
    if getattr(config, "num_channels", inputs.channels) != inputs.channels:
        raise InputError(
            f"backbone.config.num_channels={config.num_channels}: the images have {inputs.channels}"
        )
    patch_size = getattr(config, "patch_size", None)
    if isinstance(patch_size, int) and patch_size > min(inputs.height, inputs.width):
        raise InputError(
            f"backbone.config.patch_size={patch_size}: the images have {inputs.height} x "
            f"{inputs.width} pixels"
        )


def _try_image(name: str, inputs: Images, model: nn.Module) -> None:
    """Refuse a network that cannot take images like the data's: of its size, for example."""
    try:
        with torch.no_grad():
            model.eval()(inputs.example(1).to(next(model.parameters())))
    except Exception as error:  # the library's, of hundreds of models
        size = getattr(model.config, "image_size", None)
        raise InputError(
            f"backbone.name={name}: does not take images of {inputs.channels} x {inputs.height} x "
            f"{inputs.width} (backbone.config.image_size={size}, data.image_size=N resizes): "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
