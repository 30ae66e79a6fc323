"""Parts that belong to a weight, to a group of weights, or to the model."""

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import memfold
from memfold.compression import compression_of
from memfold.data.spec import Classes, DataSpec, Images
from memfold.errors import InputError
from memfold.strategies.layers.masa import Masa
from memfold.tasks import Classification, TaskModule
from strategies import basis

X = torch.randn(7, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _basis_is_known() -> Iterator[None]:
    with basis.registered():
        yield


def network() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)]
    return nn.Sequential(*layers, nn.Linear(16, 5)).double()


def compressed(**options: object) -> nn.Sequential:
    return memfold.compress(network(), "three_levels", seed=3, **options)


def test_each_part_lies_with_what_it_belongs_to() -> None:
    model = compressed()
    names = {name for name, _ in model.named_parameters() if "bias" not in name}
    mixes = {f"{i}.weight_mix" for i in (0, 2, 4, 5)}
    # 2 and 5 have 16 columns.
    bases = {f"{i}.weight_basis" for i in (0, 2, 4)}
    assert names == mixes | bases | {"basis_strength"}
    compression = compression_of(model)
    assert compression.part(3, "basis") is model[2].weight_basis
    weights = {f"{i}.weight" for i in (0, 2, 4, 5)}  # empty in a state dict
    assert compression.owned_names() == names | weights | {"compression_marks"}
    assert memfold.footprint(model).value_bytes == 8 * sum(
        parameter.numel() for name, parameter in model.named_parameters() if name in names
    )
    assert [name for name, _ in memfold.densify(model).named_parameters()] == [
        name for name, _ in network().named_parameters()
    ]


def test_a_part_of_a_group_gets_the_gradients_of_all_its_weights() -> None:
    model = compressed()
    dense = memfold.densify(model)
    for net in (model, dense):
        net(X).square().sum().backward()
    torch.testing.assert_close(model(X), dense(X))

    def through(layer: int) -> Tensor:
        return model[layer].weight_mix.detach().T @ dense[layer].weight.grad

    torch.testing.assert_close(model[2].weight_basis.grad, through(2) + through(5))
    torch.testing.assert_close(model[4].weight_basis.grad, through(4))
    strength = sum((dense[i].weight.grad * dense[i].weight).sum() for i in (0, 2, 4, 5))
    torch.testing.assert_close(model.basis_strength.grad, strength.detach().view(1) / 100)


def test_dense_weights_that_are_views_of_one_part_become_tensors_of_their_own() -> None:
    class Same(basis.BasisWeights):
        def weight(self, index: int) -> Tensor:
            return self.part(index, "basis").view(24, 24)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    memfold.compress(model, "three_levels")
    compression = compression_of(model)
    compression.__class__ = Same
    dense = memfold.densify(model)
    assert torch.equal(dense[0].weight, model[0].weight_basis)
    addresses = {part.data_ptr() for part in (dense[0].weight, dense[1].weight)}
    assert len(addresses | {model[0].weight_basis.data_ptr()}) == 3


def test_copies_states_and_artifacts_carry_the_parts(tmp_path) -> None:
    model = compressed()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    expected = model(X)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = compressed()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    memfold.save(model, tmp_path / "model.safetensors")
    packed = memfold.load(tmp_path / "model.safetensors", network())
    for same in (other, packed, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(X), expected)
    with pytest.raises(RuntimeError, match="belong to another seed, ratio or strategy"):
        memfold.compress(network(), "three_levels", seed=4).load_state_dict(model.state_dict())


@pytest.mark.parametrize("change", [lambda given: given[1:], lambda given: [*given, given[0]]])
def test_parts_in_another_number_are_refused_before_anything_changes(monkeypatch, change) -> None:
    attach, model = basis.BasisWeights.attach, network()

    def changed(self, parts) -> None:
        attach(self, {**parts, "mix": change(parts["mix"])})

    monkeypatch.setattr(basis.BasisWeights, "attach", changed)
    with pytest.raises(ValueError, match=r"[35] tensors of mix are given, not 4"):
        memfold.compress(model, "three_levels")
    assert [name for name, _ in model.named_parameters()] == list(network().state_dict())


def test_parts_of_another_shape_are_refused_before_anything_changes(monkeypatch) -> None:
    start, model = Masa.start, nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])

    def changed(*given):
        parts = start(*given)
        return {**parts, "atoms": [atoms.flatten() for atoms in parts["atoms"]]}

    monkeypatch.setattr(Masa, "start", changed)
    with pytest.raises(ValueError, match=r"atoms of shape \(36,\) is given, not \(1, 6, 6\)"):
        memfold.compress(model, "masa", include=["*"])
    assert [*model.state_dict()] == [f"{i}.{name}" for i in range(3) for name in ("weight", "bias")]


@pytest.mark.parametrize(
    ("layer", "name", "message"),
    [
        (0, "weight_mix", "0.weight_mix exists: "),
        (2, "weight_basis", "2.weight_basis exists: "),
        (None, "basis_strength", "the model has an attribute basis_strength, "),
    ],
)
def test_a_name_that_a_part_needs_is_refused_before_anything_changes(
    layer: int | None, name: str, message: str
) -> None:
    model = network()
    (model if layer is None else model[layer]).register_buffer(name, torch.zeros(1))
    before = list(model.state_dict())
    with pytest.raises(InputError, match=message):
        memfold.compress(model, "three_levels")
    assert list(model.state_dict()) == before


def test_a_strategy_adds_a_term_to_the_loss_in_any_loop() -> None:
    model = compressed()
    bases = [model[i].weight_basis for i in (0, 2, 4)]
    expected = basis.PENALTY * sum(base.detach().square().sum() for base in bases)
    for holder in (model, nn.Sequential(model)):
        loss = 0 * holder(X).sum() + memfold.extra_loss(holder)
        model.zero_grad()
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected)
        for base in bases:
            torch.testing.assert_close(base.grad, 2 * basis.PENALTY * base.detach())
    for other in (network(), memfold.compress(network(), "mag")):
        assert memfold.extra_loss(other) == 0


def test_the_task_trains_with_that_term(monkeypatch: pytest.MonkeyPatch) -> None:
    net = compressed()
    task = TaskModule(
        net,
        Classification(DataSpec(Images(1, 1, 1), Classes(5)), label_smoothing=0.0),
        lambda net, _: torch.optim.SGD(net.parameters()),
        lambda *_, **__: None,  # type: ignore[arg-type]
    )
    monkeypatch.setattr(task, "_step", lambda *_: torch.tensor(2.0))
    expected = 2 + memfold.extra_loss(net)
    assert torch.equal(task.training_step((X, torch.zeros(7)), 0), expected)
