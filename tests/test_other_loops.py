"""What docs/loops.md says: compressed models in the loops and formats of other libraries."""

import shutil
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import memfold

STRATEGIES: dict[str, dict[str, Any]] = {
    "stable_rps": {"ratio": 0.3},
    "rigl": {"ratio": 0.3, "update_every": 2},
    "low_rank": {"ratio": 0.5},
}
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(1, 50, (64, 16), generator=GENERATOR)
SAMPLES = TensorDataset(
    torch.randn(64, 8, generator=GENERATOR), torch.randint(0, 4, (64,), generator=GENERATOR)
)


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    return memfold.compress(net, name, **STRATEGIES[name])


def language_model(transformers: Any, kind: str = "gpt2") -> nn.Module:
    sizes = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes |= {"max_position_embeddings": 32, "hidden_size": 32, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 48}
    if kind == "llama":
        sizes["num_key_value_heads"] = 1
    if kind == "gpt2":
        del sizes["intermediate_size"]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config)


def same(first: nn.Module, second: nn.Module) -> bool:
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(states[0][k], states[1][k]) for k in states[0] | states[1])


class Own(lightning.LightningModule):
    """A LightningModule that knows nothing of memfold but the turn before a step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        total = int(self.trainer.estimated_stepping_batches)
        memfold.before_step(self, optimizer, step=self.global_step, total_steps=total)


@pytest.mark.filterwarnings("ignore")  # of Lightning's own
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_plain_lightning_trainer_goes_on_from_its_checkpoint(name: str, tmp_path: Path) -> None:
    def fit(path: Path | None = None) -> nn.Module:
        module = Own(network(name))
        trainer = lightning.Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            callbacks=[ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)] if path is None else [],
            enable_checkpointing=path is None,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(SAMPLES, batch_size=16), ckpt_path=path, weights_only=True)
        return module.net

    whole = fit()
    assert not same(whole, network(name))
    assert same(fit(tmp_path / "epoch=0.ckpt"), whole)


@pytest.mark.parametrize("name", STRATEGIES)
def test_accelerate_goes_on_from_its_state(name: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def train(first_step: int) -> nn.Module:
        accelerator = accelerate.Accelerator(cpu=True)
        net = network(name)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
        net, optimizer, loader = accelerator.prepare(
            net, optimizer, DataLoader(SAMPLES, batch_size=8)
        )
        if first_step > 0:
            accelerator.load_state(tmp_path / "state")
        for step, (inputs, targets) in enumerate(loader):
            if step < first_step:
                continue
            if step == 4 and first_step == 0:
                accelerator.save_state(tmp_path / "state")
            accelerator.backward(nn.functional.cross_entropy(net(inputs), targets))
            memfold.before_step(net, optimizer, step=step, total_steps=len(loader))
            optimizer.step()
            optimizer.zero_grad()
        return accelerator.unwrap_model(net)

    whole = train(0)
    assert not same(whole, network(name))
    assert same(train(4), whole)


@pytest.mark.filterwarnings("ignore")  # of transformers' own
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_trainer_of_transformers_goes_on_from_its_checkpoint(
    name: str, transformers: Any, tmp_path: Path
) -> None:
    class Turn(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            steps = {"step": state.global_step, "total_steps": state.max_steps}
            memfold.before_step(given["model"], given["optimizer"], **steps)

    def train(resume: Path | None) -> nn.Module:
        net = memfold.compress(language_model(transformers), name, **STRATEGIES[name])
        arguments = transformers.TrainingArguments(
            tmp_path / "run",
            max_steps=8,
            save_steps=4,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            max_grad_norm=0,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        rows = [{"input_ids": row, "labels": row} for row in TOKENS]
        trainer = transformers.Trainer(net, arguments, train_dataset=rows, callbacks=[Turn()])
        trainer.train(resume_from_checkpoint=resume)
        return net

    whole = train(None)
    start = tmp_path / "start"
    shutil.move(tmp_path / "run" / "checkpoint-4", start)
    assert same(train(start), whole)
    # What it has saved is for the compressed model alone.
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(start)
    with pytest.raises(memfold.InputError, match=r"memfold\.densify\(model\)"):
        whole.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    dense = memfold.densify(whole)
    dense.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert same(read, dense)


@pytest.mark.filterwarnings("ignore")  # of transformers' own
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_generation_checkpointing_and_export(name: str, kind: str, transformers: Any) -> None:
    net = language_model(transformers, kind)
    memfold.compress(net, name, **STRATEGIES[name]).eval()
    model: Any = net
    dense: Any = memfold.densify(net)
    prompt = TOKENS[:2, :5]
    for options in ({"do_sample": False}, {"do_sample": True}):
        drawn = []
        for one in (model, dense):
            torch.manual_seed(3)
            drawn.append(one.generate(prompt, max_new_tokens=12, use_cache=True, **options))
        assert torch.equal(*drawn)

    program = torch.export.export(dense, (prompt,), {"use_cache": False}).module()
    expected = model(prompt).logits
    torch.testing.assert_close(program(prompt, use_cache=False).logits, expected)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(5)  # of dropout
        model(input_ids=prompt, labels=prompt, use_cache=False).loss.backward()
        return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    model.train()
    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradients(), expected)
