"""With an adapter on the actor, pairs are scored over shared rows too: PEFT's call names what it does not pass."""

import pytest
from peft import LoraConfig

import dpo_runs


pytestmark = pytest.mark.integration


def rows_embedded(tmp_path, adapter: bool) -> list[tuple[int, ...]]:
    """Shapes of the ids that the actor's trunk reads in two steps."""
    models = {"ref_model": None}
    if adapter:
        models["peft_config"] = LoraConfig(r=2, task_type="CAUSAL_LM")
    trainer = dpo_runs.dpo_trainer(tmp_path, models, precompute_ref_log_probs=True)
    shapes = []
    embedding = trainer.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    trainer.train()
    return shapes


def test_adapter_leaves_rows_shared(tmp_path):
    with_adapter, without = (rows_embedded(tmp_path / str(on), on) for on in (True, False))
    assert with_adapter == without
    assert all(rows == 1 for rows, _ in with_adapter)  # a batch of four pairs is one row
