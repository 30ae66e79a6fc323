import pytest
import torch

from memfold.benchmarking.workloads import WORKLOADS, workload
from memfold.errors import InputError

MILLIONS = {
    "mlp_tiny": 0.0069,
    "mlp38m": 37.8,
    "mlp50m": 53.6,
    "lenet300": 0.267,
    "resnet20": 0.272,
    "resnet20_8": 0.272,
    "gpt_small": 0.825,
    "vgg11": 9.23,
    "vit": 10.7,
    "gpt": 12.3,
    "linear4096": 16.8,
    "linear8192": 67.1,
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_models_have_their_size_and_a_loss(name):
    source = workload(name)
    with torch.device("meta"):
        model = source.build()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
        MILLIONS[name],
        rel=0.005,  # the list has 3 digits
    )
    inputs, target = (t.to("meta") for t in source.batch(2, torch.Generator()))
    assert source.loss(model(inputs), target).shape == ()
    assert inputs.shape[0] == target.shape[0] == 2


@pytest.mark.parametrize(("name", "tokens"), [("vit", 64), ("gpt", 128)])
def test_transformers_see_4096_tokens_a_batch(name, tokens):
    assert workload(name).batch_size * tokens == 4096


def test_the_gpt_sees_no_later_token():
    torch.manual_seed(0)
    model = workload("gpt").build().eval()
    tokens, _ = workload("gpt").batch(1, torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 64:] = 0
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :64], after[:, :64])
    assert not torch.allclose(before[:, 64:], after[:, 64:])


def test_unknown_models_are_refused():
    with pytest.raises(InputError, match="--models nothing: unknown; models: mlp_tiny"):
        workload("nothing")
