"""Backbones for tables and tokens: shapes, what they may not take, and compression of all."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

import memfold
from memfold.data.spec import Classes, DataSpec, Images, NextToken, Reals, Table, Tokens
from memfold.errors import InputError
from memfold.tasks import task_for
from memfold.training.networks import build_backbone

CONF = str(Path(__file__).parents[2] / "conf")
TABLE = DataSpec(Table(3, (4, 9)), Classes(3))
TEXT = DataSpec(Tokens(20, 12), NextToken(20))
PICTURES = DataSpec(Images(1, 8, 8), Classes(10))
WIDE = DataSpec(Images(3, 8, 12), Classes(10))
CASES = {
    "mlp": DataSpec(Table(3, (4, 9)), Reals((0.0, 1.0), (1.0, 2.0))),
    "table_transformer": TABLE,
    "gpt": TEXT,
    "lstm": DataSpec(Tokens(20, 12), Classes(5)),
    "vit": PICTURES,
}


def build(name: str, spec: DataSpec, *overrides: str) -> nn.Module:
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("train", [f"backbone={name}", *overrides])
    options = OmegaConf.to_container(config.backbone, resolve=True)
    assert isinstance(options, dict)
    return build_backbone(options, spec)


@pytest.mark.parametrize("name", CASES)
def test_the_config_builds_what_the_data_need_and_everything_gets_a_gradient(name: str) -> None:
    spec = CASES[name]
    torch.manual_seed(0)
    net = build(name, spec)
    inputs = spec.inputs.example(2)
    output = net(inputs)
    expected = (2, 12, 20) if spec is TEXT else (2, spec.num_outputs)
    assert output.shape == expected
    output.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", CASES)
def test_all_of_them_can_be_compressed_saved_and_made_dense(name: str, tmp_path: Path) -> None:
    spec = CASES[name]
    torch.manual_seed(0)
    net = memfold.compress(build(name, spec), "stable_rps", ratio=0.2).eval()
    inputs = spec.inputs.example(2)
    torch.testing.assert_close(memfold.densify(net)(inputs), net(inputs), rtol=1e-4, atol=1e-5)
    memfold.save(net, tmp_path / "m.safetensors")
    loaded = memfold.load(tmp_path / "m.safetensors", build(name, spec)).eval()
    torch.testing.assert_close(loaded(inputs), net(inputs))


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    [
        ("resnet20", TEXT, r"backbone=ResNet20 takes images .* and the data give tokens"),
        ("gpt", PICTURES, r"backbone=GPT takes tokens .* and the data give images"),
        ("mlp", TEXT, r"backbone=mlp takes images .* and the data give tokens"),
        ("table_transformer", PICTURES, r"takes tables .* and the data give images"),
        ("lstm", TABLE, "backbone=lstm takes tokens, and the data give tables"),
        ("cnn", WIDE, "backbone=CNN takes square images, and the data give 8 x 12"),
        ("vit", TEXT, "takes images .* and the data give tokens"),
        ("timm", TABLE, "backbone=timm takes images, and the data give tables"),
        ("gpt", TABLE, "takes tokens .* and the data give tables"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, spec: DataSpec, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        build(name, spec, *(["backbone.name=resnet18"] if name == "timm" else []))


def test_outputs_that_do_not_fit_are_refused_with_the_first_batch() -> None:
    tokens = torch.zeros(2, 12, dtype=torch.int64)
    classes = DataSpec(Tokens(20, 12), Classes(3))
    for spec, target, expected in (
        (classes, torch.zeros(2, dtype=torch.int64), r"\(2, 3\), not \(2, 12, 20\)"),
        (DataSpec(Tokens(30, 12), NextToken(30)), tokens, r"\(2, 12, 30\), not \(2, 12, 20\)"),
    ):
        task = task_for(spec, label_smoothing=0.0)
        with pytest.raises(InputError, match=f"these data a network must return {expected}"):
            task.training_loss(build("gpt", TEXT)(tokens), target)
    larger = task_for(DataSpec(Tokens(9, 12), NextToken(9)), label_smoothing=0.0)
    assert larger.loss(build("gpt", TEXT)(tokens), tokens).shape == ()
    with pytest.raises(InputError, match="the next of 5 tokens must follow as many kinds"):
        DataSpec(Images(1, 8, 8), NextToken(5))


def test_resnets_take_images_of_any_height_and_width() -> None:
    for name in ("resnet18", "resnet20"):
        assert build(name, WIDE).eval()(WIDE.inputs.example(2)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "override", "reason"),
    [
        ("gpt", "backbone.width=130", r"backbone\.width=130: must be a multiple of"),
        ("gpt", "backbone.positions=none", r"backbone\.positions"),
        ("gpt", "backbone.depth=0", r"backbone\.depth=0"),
        ("vit", "backbone.patch_size=3", r"backbone\.patch_size=3: must divide"),
        ("lstm", "backbone.width=0", r"backbone\.width=0"),
    ],
)
def test_bad_options_name_the_key(name: str, override: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        build(name, CASES[name], override)


@pytest.fixture(scope="module")
def transformers() -> object:
    return pytest.importorskip("transformers")


SMALL = "hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 32"
HF = {
    "gpt2": (TEXT, "{n_layer: 2, n_head: 2, n_embd: 16}"),
    "llama": (TEXT, f"{{{SMALL}, num_key_value_heads: 2}}"),
    "bert": (DataSpec(Tokens(20, 12), Classes(3)), f"{{{SMALL}}}"),
    "vit": (PICTURES, f"{{{SMALL}, patch_size: 4}}"),
}


@pytest.mark.parametrize("name", HF)
def test_models_of_transformers_by_type(name: str, transformers: object, tmp_path: Path) -> None:
    spec, config = HF[name]
    torch.manual_seed(0)
    net = build("hf", spec, f"backbone.name={name}", f"backbone.config={config}").eval()
    inputs = spec.inputs.example(2)
    expected = (2, 12, 20) if spec is TEXT else (2, spec.num_outputs)
    assert net(inputs).logits.shape == expected
    net.save_pretrained(tmp_path)  # type: ignore[operator]
    again = build("hf", spec, f"backbone.name={tmp_path}").eval()
    torch.testing.assert_close(again(inputs).logits, net(inputs).logits)


def test_a_folder_with_another_head_or_compressed_weights(
    transformers: object, tmp_path: Path
) -> None:
    spec, config = HF["bert"]
    net = build("hf", spec, "backbone.name=bert", f"backbone.config={config}")
    net.save_pretrained(tmp_path / "three")  # type: ignore[operator]
    other = DataSpec(spec.inputs, Classes(5))
    with pytest.raises(InputError, match="have other shapes than the model"):
        build("hf", other, f"backbone.name={tmp_path / 'three'}")
    anew = "backbone.config={ignore_mismatched_sizes: true}"
    five = build("hf", other, f"backbone.name={tmp_path / 'three'}", anew)
    assert five(other.inputs.example(2)).logits.shape == (2, 5)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(five.get_parameter(name), net.get_parameter(name))
    # What the Trainer of transformers saves of a compressed model.
    memfold.compress(net, "mag", ratio=0.5)
    net.save_pretrained(tmp_path / "small", state_dict=None)  # type: ignore[operator]
    with pytest.raises(InputError, match="have other shapes than the model"):
        build("hf", spec, f"backbone.name={tmp_path / 'small'}")


def test_encoders_are_decoders_where_they_predict(transformers: object, tmp_path: Path) -> None:
    for name in ("bert", "roberta"):
        torch.manual_seed(0)
        net = build("hf", TEXT, f"backbone.name={name}", f"backbone.config={{{SMALL}}}")
        task_for(TEXT, label_smoothing=0).check_network(net)
        net.config.is_decoder = False  # as it is where others classify
        net.save_pretrained(tmp_path / name)  # type: ignore[operator]
        again = build("hf", TEXT, f"backbone.name={tmp_path / name}")
        task_for(TEXT, label_smoothing=0).check_network(again)
        assert again.training
    sees = build(
        "hf", TEXT, "backbone.name=bert", f"backbone.config={{{SMALL}, is_decoder: false}}"
    )
    with pytest.raises(InputError, match=r"the last token changes the outputs before it"):
        task_for(TEXT, label_smoothing=0).check_network(sees)


def test_causal_models_classify_whole_sequences(transformers: object) -> None:
    spec = DataSpec(Tokens(20, 12), Classes(3))
    config = "backbone.config={n_layer: 1, n_head: 2, n_embd: 16}"
    net = build("hf", spec, "backbone.name=gpt2", config).eval()
    assert net(spec.inputs.example(5)).logits.shape == (5, 3)


@pytest.mark.parametrize("name", ["roberta", "mpnet"])
def test_no_token_of_the_data_is_padding(name: str, transformers: object) -> None:
    spec = DataSpec(Tokens(20, 12), Classes(3))
    torch.manual_seed(0)
    net = build("hf", spec, f"backbone.name={name}", f"backbone.config={{{SMALL}}}").eval()
    first, second = net(torch.ones(1, 12).long()).logits, net(torch.ones(1, 11).long()).logits
    assert not torch.equal(first, second)  # ones are counted
    first.sum().backward()
    embedding = net.get_input_embeddings()  # type: ignore[operator]
    assert embedding.weight.grad[1].abs().sum() > 0


@pytest.mark.parametrize(
    ("spec", "overrides", "reason"),
    [
        (TEXT, ["backbone.name=gtp2"], r"backbone\.name=gtp2: is no model type .* nearest: gpt2"),
        (TABLE, ["backbone.name=gpt2"], "backbone=hf takes images or tokens"),
        (TEXT, ["backbone.name=vit"], "vit takes no tokens .* has no AutoModelForCausalLM of it"),
        (PICTURES, ["backbone.name=gpt2"], "takes no images .* no AutoModelForImageClassification"),
        (
            TEXT,
            ["backbone.name=gpt2", "backbone.config={vocab_size: 19}"],
            r"config\.vocab_size=19: the data have 20 tokens",
        ),
        (
            TEXT,
            ["backbone.name=gpt2", "backbone.config={n_positions: 8}"],
            r"max_position_embeddings=8: the data have 12",
        ),
        (
            TEXT,
            ["backbone.name=gpt2", "backbone.config={n_layr: 2}"],
            r"config\.n_layr: gpt2 has no such field; nearest: n_layer",
        ),
        (PICTURES, ["backbone.name=vit"], r"patch_size=16: the images have 8 x 8 pixels"),
        (
            WIDE,
            ["backbone.name=vit", "backbone.config={num_channels: 1}"],
            r"num_channels=1: the images have 3",
        ),
        (
            PICTURES,
            ["backbone.name=vit", "backbone.config={patch_size: 4, image_size: 16}"],
            r"does not take images of 1 x 8 x 8 \(.*image_size=16, .*: Input image size",
        ),
        (TEXT, ["backbone.name=gpt2", "backbone.config={n_head: 5}"], r"backbone\.name=gpt2"),
        (TEXT, ["backbone.name=gpt2", "backbone.config={n_layer: two}"], r"\.name=gpt2: .*n_layer"),
        (PICTURES, ["backbone.name=swin"], r"name=swin: does not take images of 1 x 8 x 8"),
    ],
)
def test_what_transformers_has_not_is_said(
    spec: DataSpec, overrides: list[str], reason: str, transformers: object
) -> None:
    with pytest.raises(InputError, match=reason) as raised:
        build("hf", spec, *overrides)
    assert "\n" not in str(raised.value)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install -c constraints.txt -e '\.\[transformers\]'"):
        build("hf", TEXT, "backbone.name=gpt2")
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(InputError, match=r"pip install -c constraints.txt -e '\.\[timm\]'"):
        build("timm", PICTURES, "backbone.name=resnet18")
