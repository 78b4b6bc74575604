"""Model cards of PPO, DPO and reward runs; and what `push_to_hub` would upload: `create_commit` gets the files."""

import itertools
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from trl.trainer import dpo_trainer as trl_dpo

import tiny
from dpo_runs import TRLS, dpo_run, dpo_trainer, tiny_model, tiny_pairs
from ppo_runs import ppo_run, ppo_trainer
from reward_runs import reward_trainer
from trl_ext import ReportCallback
from trl_ext.data.conversions import to_conversations
from trl_ext.dpo.card import FORMULAS, SMOOTHED
from trl_ext.runs.card import Metric, _cell, _table, hub_name


pytestmark = pytest.mark.integration
HELD_OUT = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}


def lora(task="CAUSAL_LM", **options):
    return LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type=task, **options)


def read(folder):
    return (Path(folder) / "README.md").read_text(encoding="utf-8")


def section(card, title):
    return card.partition(f"## {title}\n")[2].split("\n## ")[0]


def table(text, first):
    """Rows of the table whose heading row begins with `first`, by their first cell."""
    _, _, rest = text.partition(f"| {first} |")
    lines = rest.splitlines()[2:]
    rows = [line[1:-1].split("|") for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}


def facts(card):
    rows = re.findall(r"^\| ([^|]+) \| ([^|]*) \|$", section(card, "What was trained, and how"), flags=re.MULTILINE)
    return dict(rows)


def python_of(card, title="How to load it"):
    (block,) = re.findall(r"```python\n(.*?)```", section(card, title), flags=re.DOTALL)
    return block


def load(card, where, placeholder=None):
    """The names that the card's own lines leave, with the folder where it is here."""
    code = python_of(card)
    line = next(line for line in code.splitlines() if line.startswith("folder = "))
    assert placeholder is None or placeholder in line
    names: dict = {}
    exec(code.replace(line, f"folder = {str(where)!r}"), names)
    return names


def same_tensors(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def same_weights(model, other):
    return same_tensors(model.state_dict(), other.state_dict())


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
    """A run with evaluations, saved as a script does."""
    folder = tmp_path_factory.mktemp("ppo") / "my-ppo"
    models = {"eval_dataset": tiny.tiny_prompts(4, seed=3)}
    trainer = ppo_run(folder, models, num_sample_generations=0, kl_coef=0.04, ent_coef=0.02, **HELD_OUT)
    trainer.save_model()
    return trainer, folder, read(folder)


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo") / "my-dpo"
    models = {"eval_dataset": tiny_pairs(6, seed=5), "ref_model": tiny_model()}
    trainer = dpo_run(folder, models, beta=0.3, label_smoothing=0.1, **HELD_OUT)
    trainer.save_model()
    return trainer, folder, read(folder)


# --- what the card says


def test_loss_of_a_ppo_card_adds_up_to_the_logged_loss(ppo):
    trainer, _, card = ppo
    line = [line for line in trainer.state.log_history if "loss" in line][-1]
    text = section(card, "The loss")
    rows = table(text, "term")
    coefficients = {"clip_objective": -1, "kl": 0.04, "value_loss": 0.5, "entropy": -0.02, "old_kl": 0}
    assert coefficients.items() <= {name: float(row[1]) for name, row in rows.items()}.items()
    for name, (_, coefficient, value, contribution) in rows.items():
        assert float(value) == pytest.approx(line[f"terms/{name}"], rel=1e-3, abs=1e-6)
        assert float(contribution) == pytest.approx(float(coefficient) * float(value), abs=1e-5)
    assert sum(float(row[3]) for row in rows.values()) == pytest.approx(line["loss"], abs=5e-5)
    assert f"`loss` was {line['loss']:+.4f} at step 4" in text
    assert "−clip_objective + kl_coef·kl + vf_coef·value_loss − ent_coef·entropy + old_kl_coef·old_kl" in text


def test_kl_in_the_reward_has_no_term_in_the_card_and_cites_its_paper(tmp_path):
    trainer = ppo_run(
        tmp_path, max_steps=1, kl_placement="reward", kl_controller="proportional", kl_target=3.0, lam=1.0,
        advantage_estimator="reinforce", critic="head",
    )  # fmt: skip
    trainer.save_model()
    card = read(tmp_path)
    row = table(section(card, "The loss"), "term")["kl"]
    assert "in the reward of each token, not in the loss, estimator k1" in row[0]
    assert "follows a target of 3.0 nats per sequence" in row[0]
    assert row[2:] == ["", ""]
    assert "ziegler2019fine" in card
    assert "schulman2016high" not in card  # no GAE
    assert "`reinforce`" in section(card, "The loss")
    assert same_weights(load(card, tmp_path)["critic"], trainer.critic)


def test_held_out_metrics_stand_before_and_after_with_their_intervals(ppo):
    trainer, _, card = ppo
    lines = [line for line in trainer.state.log_history if "eval_reward/score" in line]
    first, last = lines[0], lines[-1]
    results = section(card, "Results")
    assert "| held out | step 0 | step 4 |" in results
    rows = table(results, "held out")
    for row, line in zip(rows["score"], (first, last), strict=True):
        assert row == f"{line['eval_reward/score']:+.3f} ± {line['eval_reward/score_ci95']:.3f}"
    assert rows["KL to the reference, nats per sequence"][1] == f"{last['eval_kl/ref']:.3f}"
    assert "| in training | step 1 | step 4 |" in results
    in_training = [line for line in trainer.state.log_history if "terms/entropy" in line]
    entropies = [f"{line['terms/entropy']:.3f}" for line in (in_training[0], in_training[-1])]
    assert table(results, "in training")["entropy, nats per token"] == entropies


def test_cell_of_another_step_than_its_columns_says_which():
    log = [{"step": 1, "loss": 0.5}, {"step": 10, "loss": 0.25, "late": 3.0}, {"step": 12, "other": 1.0}]
    rows = _table("in training", log, [Metric(key, key) for key in ("loss", "late", "other", "none")], "").splitlines()
    assert rows == [
        "| in training | step 1 | step 12 |",
        "|---|---:|---:|",
        "| loss | 0.500 | 0.250, step 10 |",
        "| late |  | 3.000, step 10 |",
        "| other |  | 1.000 |",
    ]


def test_evaluation_of_ties_alone_has_no_accuracy_in_the_metadata(tmp_path):
    """A policy that has not moved is right about nothing: the table says so, and the hub is told nothing."""
    models = {"eval_dataset": tiny_pairs(6, seed=5), "ref_model": tiny_model()}
    trainer = dpo_run(tmp_path, models, learning_rate=0.0, **HELD_OUT)
    trainer.save_model()
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert "preference/accuracy" not in [result.metric_type for result in results]
    assert "loss" in [result.metric_type for result in results]
    rows = table(section(read(tmp_path), "Results"), "held out")
    assert rows["pairs in the right order (95% interval)"] == ["all ties"] * 2


def test_dpo_card_has_the_loss_the_implicit_reward_and_the_accuracy_with_its_interval(dpo):
    trainer, _, card = dpo
    text = section(card, "The loss")
    assert "β = 0.3, label smoothing ε = 0.1" in text
    assert table(text, "loss type") == {"sigmoid": ["1", "−(1 − ε)·log σ(m) − ε·log σ(−m)"]}
    assert "r = β·(log π_θ(y|x) − log π_ref(y|x))" in text
    assert "β·[(log π_θ(y_w|x) − log π_ref(y_w|x)) − (log π_θ(y_l|x) − log π_ref(y_l|x))]" in text
    last = [line for line in trainer.state.log_history if "eval_preference/accuracy" in line][-1]
    low, high = last["eval_preference/accuracy_low"], last["eval_preference/accuracy_high"]
    rows = table(section(card, "Results"), "held out")
    shown = f"{last['eval_preference/accuracy']:.1%} ({low:.1%} to {high:.1%})"
    assert rows["pairs in the right order (95% interval)"] == ["all ties", shown]
    assert rows["calibration error"] == ["all ties", f"{last['eval_preference/calibration_error']:.3f}"]
    assert rows["loss"][1] == f"{last['eval_loss']:.4f}"
    assert facts(card)["beta"] == "0.3"
    ran = trainer.state.log_history[-1]["train_runtime"]  # after a resume, of the last call alone
    assert facts(card)["time of the last `train()`"] == f"{ran:.0f} s"
    assert facts(card)["reference"] == "a frozen model of its own"
    assert "rafailov2023direct" in card
    assert same_weights(load(card, dpo[1], '"my-dpo"')["model"], trainer.model)


def test_several_held_out_sets_have_a_table_each(tmp_path):
    sets = {"near": tiny_pairs(4, seed=1), "far": tiny_pairs(4, seed=2)}
    trainer = dpo_run(tmp_path, {"eval_dataset": sets}, **HELD_OUT)
    trainer.save_model()
    results = section(read(tmp_path), "Results")
    for name in sets:
        last = [line for line in trainer.state.log_history if f"eval_{name}_loss" in line][-1]
        assert table(results, f"held out, {name}")["loss"][1] == f"{last[f'eval_{name}_loss']:.4f}"
    assert facts(read(tmp_path))["held-out data"] == "near 4 rows, far 4 rows"


MATHEMATICS = {"sigma": lambda x: 1 / (1 + math.exp(-x)), "log": math.log, "exp": math.exp}


def transliterated(formula):
    """A formula of the card as Python."""
    signs = {"−": "-", "·": "*", "²": "**2", "½ ": "0.5*", "2ε": "2*eps", "ε": "eps", "2β": "2*beta", "β": "beta"}
    signs |= {"σ": "sigma", "ℓ": "l", "Δ̄": "delta"}
    for sign, code in signs.items():
        formula = formula.replace(sign, code)
    formula = re.sub(r"log (sigma\([^()]*\)|eps)", r"log(\1)", formula).replace("log (", "log(")
    formula, _, where = formula.partition(", s = ")
    if where:
        formula = re.sub(r"\bs\b", f"({where.replace('τ', 'tau')})", formula)
    return formula


@pytest.mark.filterwarnings("ignore")
def test_formulas_on_the_card_are_the_losses_that_trl_computes(tmp_path):
    """Each is evaluated for one pair and compared with `trl.DPOTrainer`; what sorts or averages otherwise is not."""
    trainer = dpo_trainer(tmp_path, {"train_dataset": tiny_pairs(4).select([0])}, side=TRLS, beta=0.3)
    assert set(FORMULAS) == set(re.findall(r'loss_type == "(\w+)"', Path(trl_dpo.__file__).read_text()))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.label_smoothing = 0.1
    for kind, formula in (FORMULAS | {"sigmoid smoothed": SMOOTHED}).items():
        if kind in ("aot", "aot_unpaired", "sft", "sigmoid smoothed"):
            continue
        trainer.loss_types, trainer.loss_weights = [kind], [1.0]
        trainer._metrics["train"].clear()
        trainer.model.train()
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, batch).item()
        logged = {key: values[-1] for key, values in trainer._metrics["train"].items()}
        rewards = logged["rewards/chosen"], logged["rewards/rejected"]
        lengths = batch["completion_mask"].sum(dim=1).tolist()
        ratios = [reward / 0.3 for reward in rewards]
        names = MATHEMATICS | {"r_w": rewards[0], "r_l": rewards[1], "m": rewards[0] - rewards[1]}
        names |= {"l_w": ratios[0], "l_l": ratios[1], "delta": ratios[0] / lengths[0] - ratios[1] / lengths[1]}
        names |= {"beta": 0.3, "eps": 0.1, "tau": trainer.args.discopop_tau}
        assert abs(names["m"]) > 0.1
        assert eval(transliterated(formula), names) == pytest.approx(loss, rel=1e-4), kind


def test_a_formula_with_another_sign_would_be_noticed():
    """The control of the test above."""
    names = MATHEMATICS | {"m": 0.7}
    assert eval(transliterated(FORMULAS["sigmoid"]), names) == pytest.approx(math.log1p(math.exp(-0.7)))
    assert eval(transliterated("−log σ(−m)"), names) == pytest.approx(math.log1p(math.exp(0.7)))


def test_facts_of_a_ppo_card_are_the_options_and_the_roles_of_the_run(ppo):
    trainer, _, card = ppo
    options = "num_ppo_epochs kl_coef kl_placement kl_estimator cliprange vf_coef ent_coef gamma lam learning_rate"
    expected = {name: str(getattr(trainer.args, name)) for name in options.split()}
    expected |= {"base model": "LlamaForCausalLM", "critic": "model (ValueModel)", "rewards": "reward_model"}
    expected |= {"optimizer steps": "4", "prompts per rollout": "4"}
    assert expected.items() <= facts(card).items()
    assert "Proximal Policy Optimization" in card
    assert "1707.06347" in card


def test_options_on_the_card_are_those_that_were_changed(ppo):
    _, _, card = ppo
    (block,) = re.findall(r"```yaml\n(.*?)```", section(card, "Options"), flags=re.DOTALL)
    options = yaml.safe_load(block)
    assert options.items() >= {"kl_coef": 0.04, "ent_coef": 0.02, "response_length": 6, "num_ppo_epochs": 2}.items()
    assert not options.keys() & {"output_dir", "lam", "vf_coef", "hub_token", "accelerator_config"}


def test_snippet_loads_actor_and_critic(ppo):
    trainer, folder, card = ppo
    names = load(card, folder, '"my-ppo"')
    trained = {name: t for name, t in trainer.model.state_dict().items() if not name.startswith("critic")}
    assert same_tensors(names["model"].state_dict(), trained)
    assert same_weights(names["critic"], trainer.critic.model)
    assert names["tokenizer"].get_vocab() == tiny.tiny_tokenizer().get_vocab()


def test_trls_own_text_stays_and_a_card_written_again_is_the_same(ppo, dpo):
    for trainer, folder, card in (ppo, dpo):
        for own in ("## Quick start", "It has been trained using [TRL]", "- TRL: 1.16", "vonwerra2020trl"):
            assert own in card
        assert "None" not in card.replace("ref_model_quantization", "")
        assert f"# Model Card for {folder.name}\n" in card
        assert card.count("\n## Citations\n") == 1
        assert str(folder.parent) not in card  # where things lie on this machine
        headings = re.findall(r"^#+ .+$", card, flags=re.MULTILINE)
        assert len(headings) == len(set(headings))
        trainer.create_model_card()
        assert read(folder) == card


def test_metadata_is_what_huggingface_hub_reads(ppo, dpo):
    trainer, folder, _ = ppo
    data = ModelCard.load(folder / "README.md").data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert {"trl", "ppo", "trl-ext", "generated_from_trainer"} == set(data.tags)
    last = [line for line in trainer.state.log_history if "eval_reward/score" in line][-1]
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values["reward/score"] == pytest.approx(last["eval_reward/score"], abs=1e-6)
    assert data.model_name == "my-ppo"
    assert "licence" not in data.to_dict()
    assert set(ModelCard.load(dpo[1] / "README.md").data.tags) == {"trl", "dpo", "trl-ext", "generated_from_trainer"}


def test_numbers_that_are_not_finite_stay_off_the_card(tmp_path):
    trainer = ppo_trainer(tmp_path)
    trainer.state.log_history = [
        {"eval_reward/score": 1.0, "eval_kl/ref": 2.0, "step": 0},
        {"eval_reward/score": math.nan, "eval_kl/ref": 3.0, "step": 2},
    ]
    trainer.create_model_card()
    assert table(read(tmp_path), "held out")["score"] == ["", "+1.000, step 0"]
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {r.metric_type: r.metric_value for r in results} == {"reward/score": 1.0, "kl/ref": 3.0}


def test_trainer_that_has_logged_nothing_has_a_card_without_results(tmp_path):
    ppo_trainer(tmp_path).create_model_card()
    card = read(tmp_path)
    assert "## Results" not in card
    assert table(section(card, "The loss"), "term")["kl"][1:] == ["0.05", "", ""]
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None


def test_interval_takes_the_form_of_its_value():
    line = {"a": 0.5, "a_ci95": 0.25, "b": 0.5, "b_low": 0.25, "b_high": 0.75, "c": -1.0}
    assert _cell(line, Metric("a", "", "{:+.2f}"), "") == "+0.50 ± 0.25"
    assert _cell(line, Metric("b", "", "{:.0%}"), "") == "50% (25% to 75%)"
    assert _cell(line, Metric("c", ""), "") == "-1.000"


# --- what it was trained from, and on


@pytest.fixture
def base(tmp_path):
    """A model in a folder, with a card that names its licence."""
    path = tiny.save_tiny(tmp_path)["actor"]
    (Path(path) / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# A base\n")
    return path


@pytest.mark.parametrize("kind", ["ppo", "dpo"])
def test_card_of_an_adapter_names_it_its_base_and_its_licence(tmp_path, base, kind):
    if kind == "ppo":
        trainer = ppo_run(tmp_path / "run", {"model": base, "peft_config": lora()}, max_steps=1, critic="adapter")
    else:
        trainer = dpo_run(tmp_path / "run", {"model": base, "ref_model": None, "peft_config": lora()}, max_steps=1)
    trainer.save_model()
    card = read(tmp_path / "run")
    of_adapter = 2 * 2 * 2 * 16 * 2  # 2 layers, 2 modules, A and B, hidden 16, r = 2
    of_base = sum(parameter.numel() for parameter in tiny.tiny_actor().parameters())
    assert facts(card)["trained"] == (
        f"LoRA adapter, r = 2, alpha = 6, on q_proj, v_proj; {of_adapter:,} of {of_base + of_adapter:,} parameters"
    )
    assert facts(card)["base model"] == "actor"
    assert "fine-tuned version of `actor`" in card
    assert "PEFT" in facts(card)["versions, beside those below"]
    trainer.save_model()  # PEFT reads the card that it finds and writes one of its own, before TRL's
    assert read(tmp_path / "run") == card
    data = ModelCard.load(tmp_path / "run" / "README.md").data
    assert (data.library_name, data.license, data.base_model) == ("peft", "apache-2.0", None)
    names = load(card, tmp_path / "run")
    loaded = {name: tensor for name, tensor in names["model"].state_dict().items() if "lora_" in name}
    trained = {name: t for name, t in trainer.model.state_dict().items() if "lora_" in name and "critic" not in name}
    assert same_tensors(loaded, trained)
    if kind == "ppo":
        assert names["critic"].get_base_model().config.num_labels == 1
    else:
        assert facts(card)["reference"] == "the base without the adapter that is trained"


def test_quantised_base_is_named(tmp_path):
    trainer = ppo_trainer(tmp_path)
    trainer.model.config.quantization_config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    trainer.create_model_card()
    assert facts(read(tmp_path))["quantisation"] == "4 bits (nf4), bitsandbytes"


def test_base_and_dataset_of_the_hub_are_linked_and_in_the_metadata(tmp_path):
    trainer = dpo_trainer(tmp_path)
    trainer.model.config._name_or_path = "some/base"
    trainer.create_model_card(dataset_name="some/pairs")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.base_model_relation, data.datasets) == ("some/base", "finetune", "some/pairs")
    assert facts(read(tmp_path))["base model"] == "[some/base](https://huggingface.co/some/base)"
    assert facts(read(tmp_path))["training data"].startswith("some/pairs, ")


@pytest.mark.parametrize("name", ["pairs.jsonl", "/home/somebody/pairs"])
def test_dataset_of_ones_own_is_named_and_not_linked(tmp_path, name):
    trainer = dpo_trainer(tmp_path)
    trainer.args.deepspeed = "/home/somebody/zero2.json"
    trainer.create_model_card(dataset_name=name)
    card = read(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.datasets is None
    assert f"huggingface.co/datasets/{name}" not in card
    assert facts(card)["training data"] == f"{Path(name).name}, 8 rows"
    assert "/home/somebody" not in card
    assert "deepspeed: zero2.json\n" in card


def test_name_of_a_folder_is_none_of_the_hubs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()
    assert [hub_name(name) for name in (None, "own", "rows.csv", "/x/y", "org/name")] == [None] * 4 + ["org/name"]


# --- reward models


def test_card_of_a_reward_model_says_what_was_trained(tmp_path):
    short = {"max_steps": 1, "center_rewards_coefficient": 0.01, "logging_steps": 1}
    trainer = reward_trainer(tmp_path, tiny_pairs(), tiny_pairs(4, seed=2), **short)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(dataset_name="pairs.jsonl")
    card = read(tmp_path)
    assert "−log σ(s(x, y_w) − s(x, y_l)) + 0.01 · (s(x, y_w) + s(x, y_l))²" in section(card, "The loss")
    assert table(card, "held out")["pairs in the right order"] == [f"{metrics['eval_accuracy']:.1%}"]
    assert "This is a reward model: it scores answers.\n" in card
    assert "\n\n\n" not in card
    assert "rewarder(text)[0]" in python_of(card, "Quick start")
    assert facts(card)["trained by"] == "`trl_ext.RewardTrainerX`"
    assert "bradley1952rank" in card
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == "text-classification"
    assert same_weights(load(card, tmp_path)["model"], trainer.model)
    trainer.create_model_card()
    assert read(tmp_path).count("## The loss") == 1


def test_quick_start_of_a_reward_model_of_chats_scores_what_it_reads(tmp_path):
    pairs = to_conversations(Dataset.from_list([{"prompt": "two three", "chosen": "happy", "rejected": "sad"}] * 4))
    trainer = reward_trainer(tmp_path, pairs, None, max_steps=1)
    trainer.train()
    trainer.save_model()
    code = python_of(read(tmp_path), "Quick start")
    known = {}
    exec(re.sub('model="[^"]*"', f'model="{tmp_path}"', code).replace('device_map="auto"', 'device="cpu"'), known)
    ids = trainer.processing_class.apply_chat_template(known["chat"], return_tensors="pt", return_dict=True)
    with torch.no_grad():
        score = trainer.model(**ids).logits.sigmoid().item()  # the pipeline gives one label as a probability
    assert known["output"]["score"] == pytest.approx(score, abs=1e-4)


# --- the picture


def test_picture_of_this_run_is_shown_and_that_of_an_earlier_run_is_not(tmp_path):
    trainer = dpo_trainer(tmp_path)
    picture, begun = tmp_path / "report.png", tmp_path / "run.json"
    picture.write_bytes(b"png")
    begun.write_text(json.dumps({"data": "my pairs", "facts": {}}))
    os.utime(begun, (1000, 1000))
    os.utime(picture, (999, 999))
    trainer.create_model_card()
    assert "report.png" not in read(tmp_path)
    os.utime(picture, (1001, 1001))
    trainer.create_model_card()
    assert "](report.png)" in section(read(tmp_path), "Results")
    assert facts(read(tmp_path))["training data"] == "my pairs, 8 rows"


# --- push_to_hub


@pytest.fixture
def hub(monkeypatch):
    """The commits that would be made: their messages, and the content of every file by its path."""
    commits = []

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_commit(self, repo_id, operations, *, commit_message, **kwargs):
        files = {}
        for operation in operations:
            with operation.as_file() as file:
                files[operation.path_in_repo] = file.read()
        commits.append(SimpleNamespace(repo=repo_id, message=commit_message, files=files))
        return SimpleNamespace(commit_url="https://huggingface.co/me/x/commit/1", oid="1")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False)  # one commit, not a stream of them
    monkeypatch.setattr(huggingface_hub.HfApi, "_validate_yaml", lambda *args, **kwargs: None)  # asks the hub
    return commits


def pushing_run(kind, folder, **options):
    options = {"push_to_hub": True, "hub_model_id": "me/mine", "save_strategy": "steps", "save_steps": 2} | options
    callbacks = [ReportCallback(seconds=0, facts={"data": "own rows"})]
    if kind == "ppo":
        return ppo_run(folder, {"callbacks": callbacks}, total_episodes=4, **options)
    return dpo_run(folder, {"callbacks": callbacks}, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["ppo", "dpo"])
def test_push_at_the_end_uploads_model_tokenizer_card_and_picture(tmp_path, hub, kind):
    trainer = pushing_run(kind, tmp_path, hub_strategy="end")
    assert hub == []
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").is_file()
    trainer.push_to_hub(dataset_name="some/rows")
    (commit,) = hub
    assert (commit.repo, commit.message) == ("me/mine", "End of training")
    expected = {"model.safetensors", "config.json", "tokenizer.json", "README.md", "report.png", "report.html"}
    expected |= {"critic/model.safetensors", "critic/config.json"} if kind == "ppo" else set()
    assert expected <= commit.files.keys()
    assert not [path for path in commit.files if "checkpoint" in path or "optimizer" in path or "scheduler" in path]
    assert commit.files["report.png"].startswith(b"\x89PNG")
    card = commit.files["README.md"].decode()
    for title in ("Results", "What was trained, and how", "The loss", "Options", "How to load it", "Citations"):
        assert card.count(f"\n## {title}\n") == 1
    assert "](report.png)" in card
    assert "datasets: some/rows" in card
    assert 'snapshot_download("me/mine")' in python_of(card)
    assert "# Model Card for mine\n" in card
    assert ModelCard(card).data.model_name == "mine" or ModelCard(card).data.eval_results is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["ppo", "dpo"])
def test_every_save_pushes_the_model_of_the_checkpoint(tmp_path, hub, kind):
    """PPO's critic too; and saving the model at the end pushes once more, with the picture."""
    trainer = pushing_run(kind, tmp_path, hub_strategy="every_save")
    commit, *others = hub
    assert others == []
    assert commit.message == "Training in progress, step 2"
    checkpoint = tmp_path / "checkpoint-2"
    paths = ["model.safetensors"] + (["critic/model.safetensors", "critic/config.json"] if kind == "ppo" else [])
    for path in paths:
        assert commit.files[path] == (checkpoint / path).read_bytes()
    assert "## The loss" in commit.files["README.md"].decode()
    assert not [path for path in commit.files if path.startswith("checkpoint") or "optimizer" in path]
    trainer.save_model()
    assert [each.message for each in hub] == ["Training in progress, step 2", "Model save"]
    assert "report.png" in hub[-1].files
    assert "](report.png)" in hub[-1].files["README.md"].decode()
    assert read(tmp_path).encode() == hub[-1].files["README.md"]
