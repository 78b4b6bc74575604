"""docs/callbacks.md and docs/report.md: the examples run, every callback and every key of a panel is documented."""

import json
import re
from pathlib import Path

import pytest

import trl_ext
from doc_examples import ROOT, examples, run
from trl_ext.report.policy_panels import POLICY


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
PAGE = "docs/callbacks.md"


def cheaper(example):
    """The same with 2 short steps; numbers are no part of what the page shows."""
    quick = 'max_steps=2, logging_steps=1, per_device_train_batch_size=4, bf16=False, save_strategy="no"'
    example = re.sub(r'(args=\w+\("[^"]+", )', rf"\1{quick}, ", example)
    return example.replace("beta=0.04)", "beta=0.04, num_generations=2, max_completion_length=4)")


@pytest.mark.parametrize("number", range(3))
def test_example_of_the_page_trains(workplace, number):
    trainer = run(cheaper(examples(PAGE)[number]), workplace)["trainer"]
    assert trainer.state.global_step == 2
    folder = Path(trainer.args.output_dir)
    if number == 0:
        assert (folder / "report.html").is_file()
        assert "eval_preference/accuracy_low" in json.dumps(trainer.state.log_history)
    if number == 1:
        assert all("coef/kl" in line for line in trainer.state.log_history if "kl" in line)
    if number == 2:
        assert (folder / "samples" / "step_00002.jsonl").is_file()
        assert (folder / "implicit_rewards" / "step_00002.jsonl").is_file()


def test_every_callback_is_on_the_page():
    rows = re.findall(r"^\| `(\w+Callback)` \|", (ROOT / PAGE).read_text(), flags=re.MULTILINE)
    assert sorted(rows) == sorted(name for name in trl_ext.__all__ if name.endswith("Callback"))


def test_every_panel_key_is_documented():
    """What the report looks for in a log stands in docs/metrics.md, or is TRL's own for GRPO."""
    documented = (ROOT / "docs" / "metrics.md").read_text()
    of_trl = {"kl", "reward", "entropy", "clip_ratio/region_mean", "learning_rate", "grad_norm"}
    keys = {key for panel in POLICY for key in panel.keys if not key.endswith("/")} - of_trl
    assert {key for key in keys if f"| `{key}` |" not in documented} == set()
