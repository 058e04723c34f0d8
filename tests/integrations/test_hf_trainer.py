"""FOP under Hugging Face's Trainer: the same weights as a loop written by hand, and its checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fop import FOP
from tiny import (
    OPTIONS,
    STEPS_BETWEEN_UPDATES,
    Sentences,
    assert_same_weights,
    assert_trained,
    distance,
    run_block,
    weights,
    windows,
)

transformers = pytest.importorskip("transformers")


SIZES = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 0}


def gpt2(dropout: float = 0.0) -> Any:
    """GPT-2: Conv1D layers, whose weights are stored transposed, and a head that shares the embedding."""
    torch.manual_seed(0)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    config = transformers.GPT2Config(n_positions=8, n_embd=16, n_layer=2, n_head=2, **SIZES, **rates)
    return transformers.GPT2LMHeadModel(config)


def bert(kind: str) -> Any:
    """BERT; as BertForMaskedLM its head shares the embedding, which has a padding token, but has a bias."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        num_labels=3,
        **SIZES,
    )
    return getattr(transformers, kind)(config)


class OwnOptimizer(transformers.Trainer):
    """A trainer that makes its optimizer itself, from the module."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = FOP(self.model, **OPTIONS)
        return self.optimizer


WAYS = ["module", "parameters", "create_optimizer", "optimizer_cls_and_kwargs"]


def trainer(model: Any, way: str = "module", data: Any = None, **options: Any) -> Any:
    """A trainer that gets FOP in one of the ways that Trainer knows."""
    args = transformers.TrainingArguments(
        **{
            "output_dir": "out",
            "per_device_train_batch_size": 4,
            "train_sampling_strategy": "sequential",
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "max_grad_norm": 0.5,
            "weight_decay": OPTIONS["weight_decay"],
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        }
    )
    data = data or Sentences()
    sets = {"train_dataset": data, "eval_dataset": data}
    if way == "create_optimizer":
        return OwnOptimizer(model, args, **sets)
    if way == "optimizer_cls_and_kwargs":
        # The trainer makes two parameter groups: biases and norms are in one without weight decay.
        own = {key: value for key, value in OPTIONS.items() if key != "weight_decay"}
        return transformers.Trainer(model, args, optimizer_cls_and_kwargs=(FOP, own), **sets)
    optimizer = FOP(model if way == "module" else model.parameters(), **OPTIONS)
    return transformers.Trainer(model, args, optimizers=(optimizer, None), **sets)


def by_hand(model: Any, steps: int, accumulate: int = 1, groups: Any = None, bf16: bool = False) -> None:
    """What Trainer says it does: the mean over all tokens of a window, clipping, step, schedule."""
    optimizer = FOP(groups or model, **OPTIONS)
    schedule = transformers.get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=steps)
    model.train()
    for _ in range(steps):
        for window in windows(DataLoader(Sentences(), batch_size=4), accumulate):
            tokens = sum(batch["labels"].ne(-100).sum() for batch in window)
            for batch in window:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = model(**batch, num_items_in_batch=tokens).loss
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if schedule.last_epoch == steps:
                return


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_same_weights_as_by_hand(way: str, accumulate: int) -> None:
    """6 batches an epoch, the last one smaller; windows of 4 leave one of 2. Evaluation in between."""
    model, expected = gpt2(), gpt2()
    initial = weights(model)
    run = trainer(
        model, way, max_steps=6, gradient_accumulation_steps=accumulate, eval_strategy="steps", eval_steps=2
    )
    run.train()
    assert_trained(weights(model), initial)
    groups = None
    if way == "optimizer_cls_and_kwargs":
        decayed = run.get_decay_parameter_names(expected)
        named = list(expected.named_parameters())
        groups = [
            {"params": [p for n, p in named if n in decayed]},
            {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
        ]
    by_hand(expected, steps=6, accumulate=accumulate, groups=groups)
    assert_same_weights(weights(model), weights(expected))


def test_bf16_is_autocast() -> None:
    """Trainer's bf16=True gives the weights of torch.autocast, close to those of float32."""
    model, expected, precise = gpt2(), gpt2(), gpt2()
    initial = weights(model)
    trainer(model, max_steps=6, bf16=True).train()
    by_hand(expected, steps=6, bf16=True)
    assert_same_weights(weights(model), weights(expected))
    by_hand(precise, steps=6)
    assert distance(weights(model), weights(precise)) < 0.2 * distance(weights(precise), initial)


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, checkpointed = gpt2(), gpt2()
    trainer(plain, max_steps=4).train()
    trainer(checkpointed, max_steps=4, gradient_checkpointing=True).train()
    assert_same_weights(weights(checkpointed), weights(plain))


@pytest.mark.parametrize("way", WAYS)
def test_resumed_run_equals_uninterrupted_one(way: str) -> None:
    """With dropout and shuffled data, in a new process's objects, between two curvature updates."""
    saved = STEPS_BETWEEN_UPDATES
    options = {"max_steps": saved + 5, "train_sampling_strategy": "random", "save_strategy": "steps"}
    whole, resumed = gpt2(dropout=0.1), gpt2(dropout=0.1)
    trainer(whole, way, **options, save_steps=saved).train()
    run = trainer(resumed, way, **options, save_steps=100)
    run.train(resume_from_checkpoint=f"out/checkpoint-{saved}")
    assert run.state.global_step == saved + 5
    assert_same_weights(weights(resumed), weights(whole))


def test_training_goes_on_in_a_second_call() -> None:
    """train() twice keeps the optimizer, and the model it drives."""
    model = gpt2()
    run = trainer(model, "create_optimizer", max_steps=2)
    run.train()
    first = weights(model)
    run.train()
    assert_trained(weights(model), first)


def test_loss_falls() -> None:
    model = bert("BertForSequenceClassification")
    sentences = Sentences(32)
    data = [
        {"input_ids": tokens, "attention_mask": torch.ones(8, dtype=torch.long), "labels": tokens[0] % 3}
        for tokens in sentences.tokens
    ]
    run = trainer(model, "optimizer_cls_and_kwargs", data, max_steps=30, per_device_train_batch_size=16)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before / 2


@pytest.mark.parametrize("way", WAYS)
def test_every_matrix_of_gpt2_takes_the_fop_step(way: str) -> None:
    model = gpt2()
    run = trainer(model, way, max_steps=2)
    run.train()
    summary = run.optimizer.optimizer.summary()
    paths = {row.name: row.path for row in summary.rows}
    assert paths.keys() == dict(model.named_parameters()).keys()
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    conv1d = [f"transformer.h.{block}.{part}" for block in (0, 1) for part in parts]
    matrices = {"transformer.wte.weight", "transformer.wpe.weight"} | {f"{name}.weight" for name in conv1d}
    biases = {f"{name}.bias" for name in conv1d}
    assert {name for name, path in paths.items() if path == "FOP"} == matrices | biases
    assert all(row.reason for row in summary.rows if row.path != "FOP")


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_every_matrix_of_bert_takes_the_fop_step(kind: str) -> None:
    model = bert(kind)
    optimizer = FOP(model, **OPTIONS)
    tokens = Sentences(4).tokens
    labels = tokens[:, 0] % 3 if kind == "BertForSequenceClassification" else tokens
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
    summary = optimizer.summary()
    left = [row.name for row in summary.rows if len(row.shape) > 1 and row.path != "FOP"]
    assert not left
    assert all(row.reason for row in summary.rows if row.path != "FOP")


def test_script_of_the_docs() -> None:
    model = gpt2()
    initial = weights(model)
    run_block("Hugging Face Trainer", model=model, train_set=Sentences())
    assert_trained(weights(model), initial)


def test_script_of_the_docs_in_which_the_trainer_makes_the_optimizer() -> None:
    """With the rates of the script, and weight decay from the arguments for matrices alone."""
    initial, data = weights(gpt2()), Sentences()
    title = "Hugging Face Trainer makes the optimizer"
    run = run_block(title, model_init=lambda: gpt2(), train_set=data)["trainer"]
    assert_trained(weights(run.model), initial)
    optimizer = run.optimizer.optimizer
    named = ("weight_decay", "base_lr", "adamw_lr")
    groups = [tuple(group[name] for name in named) for group in optimizer.param_groups]
    assert groups == [(1e-3, 0.2, 3e-3), (0.0, 0.2, 3e-3)]
    assert {row.path for row in optimizer.summary().rows if len(row.shape) > 1} == {"FOP"}
