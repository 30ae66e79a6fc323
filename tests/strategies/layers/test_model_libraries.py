"""Layers of transformers' models share too: GPT-2, Llama, BERT and ViT."""

import pytest
import torch

import memfold
from memfold.compression import compression_of

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

DEPTH = 4
TOKENS = torch.arange(10)[None] % 7 + 1  # 0 would be padding
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": DEPTH}
SIZES |= {"intermediate_size": 64}


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=40,
        n_positions=16,
        n_embd=32,
        n_layer=DEPTH,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config), TOKENS


def llama():
    config = transformers.LlamaConfig(vocab_size=40, **SIZES, num_key_value_heads=2, pad_token_id=0)
    return transformers.LlamaForCausalLM(config), TOKENS


def bert():
    config = transformers.BertConfig(vocab_size=40, **SIZES)
    return transformers.BertForSequenceClassification(config), TOKENS


def vit():
    config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=8)
    return transformers.ViTForImageClassification(config), torch.randn(1, 3, 16, 16)


OPTIONS = {
    "tied": {"ratio": 0.5},
    "masa": {"ratio": 0.5},
    "basis": {"ratio": 0.5},
    "recursive_lora": {"ratio": 0.7},
    "hyperloop": {"loops": 2},
    "widenet": {"ratio": 0.6, "noise": 0.0},
    "mor": {"loops": 2},
}


@pytest.mark.parametrize("name", sorted(OPTIONS))
@pytest.mark.parametrize("build", [gpt2, llama, bert, vit])
def test_layers_share_train_and_come_back(name, build, tmp_path):
    torch.manual_seed(0)
    model, inputs = build()
    if name == "mor" and build in (bert, vit):
        with pytest.raises(memfold.InputError, match="has no causal attention"):
            memfold.compress(model, name, **OPTIONS[name])
        return
    memfold.compress(model, name, **OPTIONS[name])
    assert len(compression_of(model).computed) >= DEPTH
    model.train()
    before = model(inputs).logits.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model(inputs).logits.square().mean().backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        after = model(inputs).logits
    assert not torch.equal(before, after)
    memfold.save(model, tmp_path / "model.safetensors")
    loaded = memfold.load(tmp_path / "model.safetensors", build()[0].eval())
    dense = memfold.densify(model)
    with torch.no_grad():
        assert torch.equal(loaded(inputs).logits, after)
        torch.testing.assert_close(dense(inputs).logits, after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(OPTIONS))
@pytest.mark.parametrize("build", [gpt2, llama])
def test_generation_with_a_cache_is_that_without_one(name, build):
    torch.manual_seed(0)
    model, tokens = build()
    memfold.compress(model.eval(), name, **OPTIONS[name])
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (model.generate(tokens, use_cache=use, **asked) for use in (True, False))
    assert torch.equal(cached, uncached)
