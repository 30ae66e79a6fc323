"""Many models of transformers and of timm: compressed, trained a step, saved, loaded, made dense.

The models are listed in docs/backbones.md. `bash scripts/test.sh -m slow
tests/backbones/test_model_libraries.py`, where the libraries are installed.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import memfold
from memfold.backbones.hf import build_hf
from memfold.backbones.timm import build_timm
from memfold.data.spec import Classes, DataSpec, Images, NextToken, Tokens
from memfold.tasks.automatic import task_for

DOCS = Path(__file__).parents[2] / "docs" / "backbones.md"
SPECS = {
    "causal language model": DataSpec(Tokens(96, 16), NextToken(96)),
    "sequence classifier": DataSpec(Tokens(96, 16), Classes(3)),
    "image classifier": DataSpec(Images(3, 64, 64), Classes(3)),
}
# What a small model is, by the names that configurations have for it.
SMALL = {
    "hidden_size": 32,
    "embedding_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "dim": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "n_inner": 64,
    "hidden_dim": 64,
    "encoder_layers": 2,
    "encoder_ffn_dim": 64,
}

OF_ITS_OWN = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "swin": {"window_size": 4, "depths": [1, 1], "num_heads": [2, 4]},
}


def listed(library: str) -> list[tuple[str, str]]:
    """Return (model, kind) of the table of a library in the docs."""
    section = DOCS.read_text().partition(f"## {library}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (causal|sequence|image)([\w ]*) \| (.*) \|$", section, re.M)
    return [
        (name, first + rest) for first, rest, names in rows for name in re.findall("`(.*?)`", names)
    ]


def build(library: str, name: str, spec: DataSpec) -> nn.Module:
    torch.manual_seed(0)
    if library == "timm":
        return build_timm(spec, name=name)
    from transformers import CONFIG_MAPPING

    fields = CONFIG_MAPPING[name]().to_dict()
    config = {key: value for key, value in SMALL.items() if isinstance(fields.get(key), int)}
    return build_hf(spec, name=name, config=config | OF_ITS_OWN.get(name, {}))


def test_the_docs_list_forty_of_each() -> None:
    assert all(len(set(listed(library))) >= 40 for library in ("transformers", "timm"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "name", "kind"),
    [(lib, *model) for lib in ("transformers", "timm") for model in listed(lib)],
)
@pytest.mark.filterwarnings("ignore")
def test_a_model_is_compressed_trained_saved_and_made_dense(
    library: str, name: str, kind: str, tmp_path: Path
) -> None:
    pytest.importorskip(library)
    spec = SPECS[kind]
    plain = build(library, name, spec)
    tied = [names for names in _names_by_storage(plain).values() if len(names) > 1]
    model = memfold.compress(plain, "stable_rps", ratio=0.3, seed=1)
    inputs = spec.inputs.example(2)
    target = torch.ones_like(inputs) if kind.startswith("causal") else torch.tensor([0, 2])
    task = task_for(spec, label_smoothing=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    task.loss(model(inputs), target).backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert any(moved)
    model.eval()
    with torch.no_grad():
        expected = _logits(model(inputs))
        dense = memfold.densify(model)
        torch.testing.assert_close(_logits(dense(inputs)), expected, rtol=1e-3, atol=1e-4)
        memfold.save(model, tmp_path / "m.safetensors")
        loaded = memfold.load(tmp_path / "m.safetensors", build(library, name, spec)).eval()
        torch.testing.assert_close(_logits(loaded(inputs)), expected, rtol=1e-4, atol=1e-5)
    still = [set(names) for names in _names_by_storage(dense).values()]
    assert all(any(set(names) <= found for found in still) for names in tied)


def _logits(output: object) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits  # type: ignore[attr-defined]


def _names_by_storage(model: nn.Module) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return found
