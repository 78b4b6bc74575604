"""One family of each kind is proved; the page holds what the proof says; the proof notices mistakes."""

import re
from pathlib import Path

import datasets
import pytest
import transformers

import pair_forwards
from families import dpo_family, ppo_family, table
from families.configs import families, family_config, family_model
from families.prove import quiet
from families.prove_one import prove
from families.verdict import NOISE
from trl_ext._trl import add_fused_lm_head
from trl_ext.packing.forward import PackedForward
from trl_ext.ppo.roles.forward import ActorCriticForward
from trl_ext.ppo.roles.padding import LeftPadding


PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"

KINDS = [
    "llama",
    "gpt2",  # absolute positions
    "gpt_neo",  # a window that counts row positions
    "bloom",  # ALiBi
    "gemma3_text",  # a window in some layers
    "mixtral",  # experts, and noise in their router
    "opt",  # a trunk that ends narrower than it is
    "modernbert-decoder",  # a head that is more than one matrix
    "doge",  # a mask that is learnt
    "recurrent_gemma",
    "gpt_oss",  # sinks
    "deepseek_v3",  # keys and values in a latent space
]

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _quiet():
    """Other tests of this process print as they do."""
    verbosity = transformers.logging.get_verbosity()
    quiet()
    yield
    transformers.logging.set_verbosity(verbosity)
    datasets.enable_progress_bars()


def rows_of_page() -> dict[str, list[str]]:
    rows = re.findall(r"^\| `([\w-]+)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {family: cells.split(" | ") for family, cells in rows}


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")  # of the families' own code, about their own options
@pytest.mark.parametrize("family", KINDS)
def test_family_is_as_the_page_says(family):
    result = prove(family, NOISE)
    cells = [table.cell(result, *column) for column in table.COLUMNS]
    assert not table.BAD & set(cells), {name: result[name] for name in ("dpo", "ppo")}
    assert cells == rows_of_page()[family]


def test_page_has_every_family_of_this_transformers():
    text = PAGE.read_text(encoding="utf-8")
    if (
        f"transformers {transformers.__version__}," in text
    ):  # with another version, `make families` writes another page
        missing = [family for family in families() if f"`{family}`" not in text]
        assert not missing


# In bfloat16 two experts of one token are within rounding: another row of tokens chooses the other (docs/ppo.md).
ROUTED_OTHERWISE = {("kolibri1", "PPO, bf16")}


def test_page_proves_sixty_families_of_each_trainer_and_none_is_wrong():
    rows = rows_of_page()
    cells = {
        (name, heading): cell for name, row in rows.items() for heading, cell in zip(table.HEADINGS, row, strict=True)
    }
    assert {place for place, cell in cells.items() if cell in table.BAD} <= ROUTED_OTHERWISE
    for heading in table.HEADINGS:
        if heading != "PPO, model":  # transformers has fewer classifiers
            column = table.HEADINGS.index(heading)
            assert sum(cells[column] in ("shared rows", "TRL's rows", "exact") for cells in rows.values()) >= 60, (
                heading
            )


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")
def test_family_that_is_packed_without_a_trial_would_pass_it(monkeypatch):
    """As under ZeRO-3, where no model can run before training."""
    untried = []
    for family in families():
        try:
            model = family_model(family_config(family))
        except Exception:  # a config that is too large, or a model of several parts
            continue
        with monkeypatch.context() as patched:
            patched.setattr("trl_ext.packing.forward.is_partitioned", lambda model: True)
            packing = PackedForward(model, plain=None, packed=None)
            packing.switch_on(by_mask=False)
        if packing.on:
            untried.append(family)
            add_fused_lm_head(model)
            forward = ActorCriticForward(model, packs=True)
            forward.settle()
            assert forward.packing.on, family
    assert len(untried) > 80


# The proof notices


def test_control_a_wrong_mask_of_shared_rows_is_wrong(monkeypatch):
    pair_forwards.tails_come_late(monkeypatch)
    assert dpo_family.judge_one("llama", "float32", noise=0.0).outcome == "wrong"


def test_control_positions_that_count_padding_are_wrong(monkeypatch):
    def without_positions(self, kwargs):
        return {name: value for name, value in kwargs.items() if name != "position_ids"}

    monkeypatch.setattr(LeftPadding, "inputs", without_positions)
    monkeypatch.setattr(PackedForward, "switch_on", lambda self, by_mask: "padded rows are tried here")
    assert ppo_family.judge_one("gpt2", "head", "float32", noise=0.0).outcome == "wrong"


def test_control_an_error_of_another_library_is_no_refusal(monkeypatch):
    def crash(*args, **kwargs):
        raise ValueError("from elsewhere")

    monkeypatch.setattr(ppo_family, "Step", crash)
    assert ppo_family.judge_one("llama", "head", "float32", noise=0.0).outcome == "crashed"


# Its configs


@pytest.mark.parametrize("family, field", [("gemma3_text", "sliding_window"), ("doge", "keep_window_size")])
def test_config_has_windows_shorter_than_the_rows(family, field):
    longest = max(len(prompt) + len(side) for prompt, *sides in dpo_family.tokenised_pairs() for side in sides)
    assert getattr(family_config(family), field) < longest // 2


def test_config_with_noise_has_it_everywhere():
    config = family_config("mixtral", noise=0.1)
    assert config.attention_dropout == config.router_jitter_noise == 0.1
