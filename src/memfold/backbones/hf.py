"""Any model of Hugging Face's transformers, with the head that the data ask for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from memfold.backbones.hub import import_extra, refuse_unknown
from memfold.data.spec import Classes, DataSpec, Images, NextToken, Reals, Table, Tokens
from memfold.errors import InputError

__all__ = ["build_hf"]


def build_hf(spec: DataSpec, *, name: str, config: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a model with new weights from its type, or with its own from a local folder.

    The head: causal language model for next tokens, sequence or image classification for classes
    and numbers. The vocabulary, the positions, the size of images and the number of outputs are the
    data's, unless `config` says otherwise. Nothing is downloaded, and no code of a folder runs.

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
            facts = _outputs(spec) | given
            model = auto.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                **facts,
            )
            _refuse_small_vocabulary(spec, model.config)
        else:
            refuse_unknown(name, library.CONFIG_MAPPING, "model type of transformers, nor a folder")
            fields = library.AutoConfig.for_model(name, **_outputs(spec) | given)
            for key, value in _inputs(spec).items():
                if key not in given and hasattr(fields, key):
                    setattr(fields, key, value)
            fields.architectures = fields.architectures or []  # some types look a head up in it
            model = auto.from_config(fields, trust_remote_code=False)
            _unpad(model)
    except InputError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"backbone.name={name}: {type(error).__name__}: {reason}") from error
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


def _outputs(spec: DataSpec) -> dict[str, object]:
    if isinstance(spec.target, Classes | Reals):
        return {"num_labels": spec.num_outputs}
    return {}


def _inputs(spec: DataSpec) -> Mapping[str, object]:
    """Return what a configuration calls facts of the data; each is set where it exists."""
    inputs = spec.inputs
    if isinstance(inputs, Images):
        return {"num_channels": inputs.channels, "image_size": inputs.height}
    assert isinstance(inputs, Tokens)
    size = {"vocab_size": inputs.vocabulary_size, "max_position_embeddings": inputs.length}
    return size | {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def _refuse_small_vocabulary(spec: DataSpec, config: Any) -> None:
    size = getattr(config, "vocab_size", None)
    if isinstance(spec.inputs, Tokens) and size is not None and size < spec.inputs.vocabulary_size:
        raise InputError(
            f"backbone.name: the model has {size} tokens, and the data have "
            f"{spec.inputs.vocabulary_size}; take its own tokenizer: data.tokenizer=FOLDER/"
            "tokenizer.json"
        )
