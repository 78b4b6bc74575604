"""One DPO run on fixed pairs, cut into batches and processes as one likes, and what it measures."""

import tempfile
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig

import dpo_runs
from trl_ext import DPOTrainerX


def pairs(size: int, seed: int) -> Dataset:
    data = dpo_runs.tiny_pairs(size, seed)
    return data.add_column("source", [("books", "films", "songs")[i % 3] for i in range(size)])


# Held-out pairs: 11, so that on two processes the last batches are filled up with pairs that were there before.
DATA = {"train_dataset": pairs(16, 0), "eval_dataset": pairs(11, 4)}

SETTINGS = {
    "train_sampling_strategy": "sequential",
    "max_steps": 4,
    "logging_steps": 2,
    "max_grad_norm": 1e6,
    "gradient_checkpointing": True,
}

# TRL's means over the tokens of a micro-batch, averaged over micro-batches: these depend on how a batch is cut.
OF_MICRO_BATCHES = ("entropy", "logits/", "mean_token_accuracy")
OF_THE_MACHINE = ("time/", "memory/", "tokens_per_second")

CASES = {
    "sigmoid": {},
    "smoothed": {"label_smoothing": 0.1},
    "precomputed": {"precompute_ref_log_probs": True},
    "adapter": {"adapter": True},
}


def run(size: int, accumulation: int, adapter: bool = False, data: dict[str, Dataset] = DATA, **options):
    """
    Log lines and parameters of 4 steps of 8 pairs, `size × accumulation` of them per process, and an evaluation, of
    which only the ledger's metrics are kept: TRL's are means over batches, some of which are filled up.
    """
    models = dict(data)
    if adapter:
        models |= {"ref_model": None, "peft_config": LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)}
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    with tempfile.TemporaryDirectory() as folder, dpo_runs.not_at_the_start():
        trainer = dpo_runs.dpo_run(folder, models, **(SETTINGS | sizes | options))
        trainer.evaluate()
    assert trainer._forwards[0].packing.on
    train, (held_out,) = dpo_runs.lines(trainer), dpo_runs.lines(trainer, "eval_loss")
    assert not trainer._ledgers["eval"]._batches
    own = ("preference/", "rewards/margins_", "kl/", "_drift", "_std", "_below_zero")
    left_out = OF_MICRO_BATCHES + OF_THE_MACHINE
    lines = [{key: value for key, value in line.items() if not key.startswith(left_out)} for line in train]
    lines.append({key: value for key, value in held_out.items() if any(part in key for part in own)})
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {"lines": lines, "parameters": {name: p.detach().clone() for name, p in model.named_parameters()}}


def fill(*_):
    """Takes 200 MiB and gives them back, where no gradient is wanted."""
    if not torch.is_grad_enabled():
        torch.ones(200 * 2**20, dtype=torch.int8)


def memory_of_a_hungry_rank(data):
    """What is logged where the second of two processes needs 200 MiB to evaluate."""
    model = dpo_runs.tiny_model()
    if torch.distributed.get_rank() == 1:
        model.register_forward_pre_hook(fill)
    with tempfile.TemporaryDirectory() as folder:
        trainer = dpo_runs.dpo_run(folder, data | {"model": model}, max_steps=1)
        trainer.evaluate()
    return {k: v for line in trainer.state.log_history for k, v in line.items() if k.startswith("memory/")}


def ledger_per_rank():
    """The mistake: the ledger sees the pairs of one rank."""
    record = DPOTrainerX._record

    def record_own(self, *args):
        with (
            mock.patch.object(self.accelerator, "gather", lambda x: x),
            mock.patch.object(self.accelerator, "gather_for_metrics", lambda x: x),
            mock.patch("trl_ext.dpo.trainer.gather_object", lambda x: x),
        ):
            record(self, *args)

    return mock.patch.object(DPOTrainerX, "_record", record_own)


def save(folder: Path) -> None:
    """Writes the data where `measure` reads it: TRL hands precomputed references on in the cache beside it."""
    for name, data in DATA.items():
        data.save_to_disk(str(folder / name))


def measure(folder: Path):
    """In each of two processes: every case, and the mistake."""
    data = {name: load_from_disk(str(folder / name)) for name in DATA}
    measured = {name: run(4, 1, data=data, **options) for name, options in CASES.items()}
    measured["2 x 2"] = run(2, 2, data=data)
    with ledger_per_rank():
        measured["ledger per rank"] = run(4, 1, data=data)
    measured["hungry rank"] = memory_of_a_hungry_rank(data)
    return measured
