"""What recursions refuse, and caches of transformers, with which they generate the same."""

import pytest
import torch
from torch import nn

import memfold
from memfold.backbones.vit import ViT
from strategies.recursive_models import (
    CLOSE,
    DEPTH,
    KINDS,
    ROUTER,
    WIDTH,
    chosen_in,
    gpt,
    mor,
    tokens,
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("routing", KINDS)
@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_caches_of_transformers_give_the_same(kind, routing):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    names = ("n_embd", "n_layer", "n_head", "n_inner") if kind == "GPT2" else names
    sizes = dict(zip(names, (WIDTH, DEPTH, 2, 40), strict=True))
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=24, bos_token_id=0, eos_token_id=0, **sizes
    )
    plain = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else "LlamaForCausalLM")
    model = mor(plain(config).double(), routing=routing).eval()
    with torch.no_grad():
        getattr(model, ROUTER).normal_(generator=torch.Generator().manual_seed(8))
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    asked |= {"return_dict_in_generate": True}
    rows = tokens() + 1  # 0 would be padding, and ask for a mask
    found = [model.generate(rows[:1], use_cache=use, **asked) for use in (True, False)]
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(found[0].logits, found[1].logits, rtol=1e-6, atol=1e-6)
    taken = chosen_in(model, found[0].sequences)[:, 0, -8:]
    assert not taken.all(1).all()  # some of these were left out
    for row, alone in zip(model(rows).logits, rows, strict=True):
        torch.testing.assert_close(row, model(alone[None]).logits[0], **CLOSE)
    with pytest.raises(memfold.InputError, match="mor: 3 sequences of one token, as with a cache"):
        model.generate(rows, use_cache=True, **asked)


@pytest.mark.parametrize("split", [[6, 6], [11, 1]])
def test_several_sequences_with_a_cache_are_refused(split):
    model, cache = mor().eval(), []
    first, second = tokens().split(split, dim=1)
    model(first, kv_cache=cache)
    with pytest.raises(memfold.InputError, match="mor: 3 sequences of one token, as with a cache"):
        model(second, kv_cache=cache)


class Masked(nn.Module):
    """A layer that is told which tokens see which."""

    def __init__(self):
        super().__init__()
        self.is_causal = True
        self.mix, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x, mask=None) -> torch.Tensor:
        return x + self.down(self.up(self.mix(x)).tanh())


class Stack(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call
        self.layers = nn.ModuleList(Masked() for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = self.call(layer, x)
        return x


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, x: layer(x, torch.ones(5, 5)),
        lambda layer, x: layer(x=x, mask=torch.ones(5, 5)),
    ],
)
def test_masks_are_refused(call):
    plain = memfold.compress(Stack(lambda layer, x: layer(x, None)), "mor")
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    assert plain(x).shape == x.shape
    with pytest.raises(memfold.InputError, match="mor: Masked is given mask, but all tokens of a"):
        memfold.compress(Stack(call), "mor")(x)
    with pytest.raises(memfold.InputError, match=r"mor: layers take \(5, 6\); rows of tokens"):
        plain(x[0])


def test_layers_that_no_token_reaches_give_every_parameter_a_gradient():
    """Otherwise the processes of DDP wait for each other."""
    model = memfold.compress(Stack(lambda layer, x: layer(x)), "mor", routing="token")
    x = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        getattr(model, ROUTER).copy_(torch.tensor([[1.0], [-1.0], [-1.0]]).expand(3, 6))
    assert not chosen_in(model, x)[1:].any()
    model(x).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert not gradients["layers.3.up.bias"].any()
    assert gradients["layers.1.up.bias"].any()


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 6)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: ViT(1, 8, 10, depth=8), {}, r"mor: blocks\.0 has no causal attention"),
        (encoder, {}, r"mor: layers\.0 has no causal attention"),
        (lambda: gpt(4), {}, "loops=3: of 4 repeated layers"),
        (gpt, {"capacity": [1.0, 0.5]}, r"capacity=\[1.0, 0.5\]: one number for each of 3 loops"),
        (gpt, {"capacity": [0.5, 0.6, 0.1]}, "none larger than the one before"),
        (gpt, {"capacity": [1.0, 0.5, 0.2], "routing": "token"}, "loops have no capacity"),
        (gpt, {"capacity": [1.0, 0.5, 0.0]}, "compression.capacity must be"),
        (gpt, {"layers": "blocks.*.attention"}, "blocks.0.attention is a part of blocks.0"),
        (gpt, {"routing": "both"}, "compression.routing must be"),
        (gpt, {"gate_scale": 0.0}, "compression.gate_scale must be"),
        (gpt, {"gate_scale": 0.5, "routing": "token"}, "gate_scale=0.5 is for compression.routing"),
        (gpt, {"gate_scale": 0.5, "gate": "none"}, "gate_scale=0.5 is for compression.routing"),
        (gpt, {"balance": -1.0}, "compression.balance must be"),
        (gpt, {"balance": 0.0, "gate": "none"}, "nothing would train the router"),
    ],
)
def test_what_cannot_be_is_refused(model, options, message):
    with pytest.raises(memfold.InputError, match=message):
        memfold.compress(model(), "mor", **options)
