"""
Whole optimizer steps in random configurations: gradients are those of a slow oracle, which gets token ids alone, and
takes each sequence by itself, without padding, through plain models, from log-probabilities to the loss.
"""

import copy
import functools
import random
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, TrainerCallback

import oracles
import ppo_runs
import tiny
from families.configs import family_config, family_model
from plain import chosen, plain_distribution
from trl_ext.ppo.options import LAM


pytestmark = pytest.mark.integration

TEXTS = tiny.tiny_prompts(8, seed=3)["prompt"][:]
FORMS = ["text", "ids", "padded ids", "padded ids without a mask", "messages", "ids of messages"]
SPECIAL = len(tiny.SPECIAL_TOKENS)
CAME_WITH_THE_MODEL = {"do_sample": True, "min_p": 0.4, "repetition_penalty": 3.0, "num_beams": 2, "min_new_tokens": 2}


def some(choose):
    """Options of one configuration."""
    in_reward = choose([True, False])
    return {
        "critic": choose(["model", "head"]),
        "temperature": choose([0.7, 1.0, 1.4]),
        "response_length": choose([1, 3, 6]),
        "kl_placement": "reward" if in_reward else "loss",
        "kl_estimator": choose(["k1", "k2", "k3"] if in_reward else ["k2", "k3", "full"]),
        "kl_coef": choose([0.0, 0.2]),
        "vf_coef": choose([0.5, 1.3]),
        "ent_coef": choose([0.0, 0.03]),
        "old_kl_coef": choose([0.0, 0.5]),
        "cliprange": choose([0.05, 0.2]),
        "cliprange_value": choose([None, 0.1]),
        "gamma": choose([1.0, 0.9]),
        "lam": choose([1.0, 0.8]),
        "advantage_estimator": choose(["gae", "gae", "2_step", "reinforce", "reinforce_baseline"]),
        "whiten_advantages": choose([True, False]),
        "whiten_rewards": choose([True, False]),
        "missing_eos_penalty": choose([None, 0.7]),
        "reward_clip": choose([None, 0.5]),
        "num_mini_batches": choose([1, 2]),
        "per_device_train_batch_size": choose([2, 4]),
        "local_rollout_forward_batch_size": choose([1, 3]),
    }


def recipe_of(choose, options):
    """Options that later papers add to those."""
    lams = [{}, {"lam": LAM, "lam_alpha": 0.7}, {"critic_lam": 1.0}]
    clipping = choose([{}, {"cliprange_high": 0.4}, {"dual_clip": 1.5}])
    of_advantages = choose(lams) if options["advantage_estimator"] == "gae" else {}
    imitation = choose([{}, {"positive_nll_coef": 0.3, "positive_min_score": 0.0}])
    mask = choose([{}, {"policy_objective": "mask"}]) if "dual_clip" not in clipping else {}
    of_critic = choose([{}, {"critic_gate": True}]) if options["advantage_estimator"] != "reinforce" else {}
    if options["critic"] == "head" and options["advantage_estimator"] != "reinforce":
        of_critic |= choose([{}, {"critic_stop_gradient": True}])
    return options | clipping | of_advantages | imitation | mask | of_critic


def family(name):
    """Actor, reference, reward model and critic, of two layers: more of them round further in bfloat16."""
    if name == "rotary":
        return tiny.tiny_actor(0), tiny.tiny_actor(5), tiny.tiny_reward_model(1), tiny.tiny_reward_model(7)

    def small(kind, seed, of=None):
        return family_model(family_config(kind, n_layer=2, num_labels=1), seed, of)

    actor = small("gpt2" if name == "absolute" else "bloom", 0)
    return actor, small("gpt2", 5), *(small("gpt2", seed, AutoModelForSequenceClassification) for seed in (1, 7))


def ids_of_prompts(form):
    texts = [f"<user> {text} <eos> <assistant>" for text in TEXTS] if "messages" in form else TEXTS
    return tiny.tiny_tokenizer()(texts)["input_ids"]


def prompts_as(form):
    rows = ids_of_prompts(form)
    if form == "text":
        return Dataset.from_dict({"prompt": TEXTS})
    if form == "messages":
        return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in TEXTS]})
    if "padded" not in form:
        return Dataset.from_dict({"input_ids": rows})
    padded = tiny.tiny_tokenizer()(TEXTS, padding="max_length", max_length=11)
    names = ["input_ids"] if "without" in form else ["input_ids", "attention_mask"]
    return Dataset.from_dict({name: padded[name] for name in names})


def shifted(id_):
    """The id of a token in the reward model's own vocabulary: special tokens keep theirs."""
    return id_ if id_ < SPECIAL else SPECIAL + id_ % (len(tiny.VOCABULARY) - SPECIAL)


def shifted_tokenizer():
    tokenizer = tiny.tiny_tokenizer()
    ids = {word: shifted(i) for i, word in enumerate(tiny.VOCABULARY)}
    tokenizer._tokenizer.model = type(tokenizer._tokenizer.model)(ids, unk_token="<unk>")
    return tokenizer


def by_sum(completion_ids, **kwargs):
    return [None if sum(ids) % 4 == 0 else sum(ids) % 7 / 3 - 1 for ids in completion_ids]


def by_first(completion_ids, **kwargs):
    return [None if ids[0] % 5 == 0 else ids[0] % 3 - 1.0 for ids in completion_ids]


REWARDS = {
    "function": ([by_sum], None),
    "two functions": ([by_sum, by_first], [1.0, -0.5]),
    "model": ([], None),
    "model and function": ([by_first], [0.8, 1.5]),
}


def play(prompts, trainer):
    """Random responses in which a tool has written some tokens: holes at the start, in the middle and at the end."""
    draw = random.Random(len(prompts))
    lengths = [draw.randint(1, trainer.args.response_length) for _ in prompts]
    masks = [[draw.random() < 0.6 for _ in range(length)] for length in lengths]
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [[draw.randrange(SPECIAL, 64) for _ in range(length)] for length in lengths],
        "logprobs": None,
        "env_mask": [[int(own) for own in mask] if any(mask) else [1] * len(mask) for mask in masks],
    }


def places_of(rollout):
    """Of each response, the places of the tokens that count; what a tool wrote does not."""
    return [mask[real].nonzero()[:, 0].tolist() for mask, real in zip(rollout.mask, rollout.attended, strict=True)]


class Steps(TrainerCallback):
    """Weights and gradients of every optimizer step, and the sequences that it learned from."""

    def __init__(self):
        self.taken, self.trainer = [], None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        trainer, n = self.trainer, args.gradient_accumulation_steps
        last = (trainer._step - 1) % args.steps_per_generation
        steps = trainer.run_state.micro_batches[last + 1 - n : last + 1]
        rows = [row for step in steps for part in step for row in part.rows.tolist()]
        named = dict(trainer.model.named_parameters())
        weights = {name: parameter.detach().clone() for name, parameter in named.items()}
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in named.items()}
        self.taken.append((rows, weights, gradients))


class Oracle:
    """The four models, each asked for one sequence at a time."""

    def __init__(self, models, args, own_vocabulary):
        self.own_vocabulary = own_vocabulary
        self.actor, self.reference, self.reward, self.value_model = (copy.deepcopy(model).eval() for model in models)
        self.head, self.args = nn.Linear(models[0].config.hidden_size, 1), args

    def load(self, weights):
        critic = self.head if self.args.critic == "head" else self.value_model
        prefix = "critic.score." if self.args.critic == "head" else "critic.model."
        critic.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)})
        own = {name: weight for name, weight in weights.items() if not name.startswith("critic.")}
        self.actor.load_state_dict(own, strict=False)  # a tied head has no name of its own
        self.trained = {f"{prefix}{n}": p for n, p in critic.named_parameters()} | dict(self.actor.named_parameters())
        assert self.trained.keys() == weights.keys()

    def distributions(self, model, prompt, response):
        """(T, V) log-probabilities of each token of the response."""
        return plain_distribution(model, prompt, response, self.args.temperature)

    def values(self, prompt, response):
        ids, model = torch.tensor([prompt + response]), self.value_model
        if self.args.critic == "head":
            states = self.actor.base_model(input_ids=ids).last_hidden_state
            states = states.detach() if self.args.critic_stop_gradient else states
            return self.head(states)[0, len(prompt) - 1 : -1, 0]
        return model.score(model.base_model(input_ids=ids).last_hidden_state)[0, len(prompt) - 1 : -1, 0]

    def score(self, prompt, response, functions, weights):
        """The weighted sum of what was said; `None` if nothing was."""
        said = [function([response])[0] for function in functions]
        if len(weights) > len(said):  # the reward model was trained on texts with one end token behind them
            text = list(response)
            if text[-1] < len(tiny.SPECIAL_TOKENS):
                text.pop()
            ids = [*prompt, *text, 2]
            if self.own_vocabulary:  # it reads the text of the answer, which has no special tokens
                ids = [shifted(id_) for id_ in (*prompt, *(id_ for id_ in text if id_ >= SPECIAL), 2)]
            said.insert(0, self.reward(input_ids=torch.tensor([ids])).logits.item())
        known = [weight * value for weight, value in zip(weights, said, strict=True) if value is not None]
        return sum(known) if known else None


def drift(old, new, estimator):
    """An estimate of KL(new ‖ old) from the log-probabilities of the tokens."""
    log = new - old
    return {"k1": log, "k2": log**2 / 2, "k3": (-log).exp() - 1 + log}[estimator]


def whitened(rows, keep_mean):
    """By the mean and the variance of all numbers in `rows`."""
    _, mean, variance = oracles.moments([number for row in rows for number in row])
    shift = mean if keep_mean else 0.0
    return [[(number - mean) / (variance + 1e-8) ** 0.5 + shift for number in row] for row in rows]


@torch.no_grad()
def experience(oracle, sequences, scores):
    """Per sequence: log-probabilities and values of the start, advantages and returns; `None` without a score."""
    args, found = oracle.args, []
    for (prompt, response, places), score in zip(sequences, scores, strict=True):
        if score is None:
            found.append(None)
            continue
        score = score if args.reward_clip is None else max(-args.reward_clip, min(args.reward_clip, score))
        if args.missing_eos_penalty is not None and response[-1] != 2:
            score -= args.missing_eos_penalty
        both = (oracle.distributions(model, prompt, response) for model in (oracle.actor, oracle.reference))
        logps, ref_logps = (chosen(distribution, response)[places] for distribution in both)
        paid = args.kl_coef if args.kl_placement == "reward" else 0.0
        leash = drift(ref_logps, logps, args.kl_estimator).tolist() if paid else [0.0] * len(places)
        rewards = oracles.token_rewards(score, leash, paid)
        found.append([logps, oracle.values(prompt, response)[places], rewards])
    known = [each for each in found if each is not None]
    rewards = [each[2] for each in known]
    if args.whiten_rewards and known:
        rewards = whitened(rewards, keep_mean=True)
    advantages = []
    for each, own in zip(known, rewards, strict=True):
        values = each[1].tolist()
        advantage, target = estimate(args, own, values)
        advantages.append(advantage)
        each[2] = torch.tensor(target)
    if args.critic_gate and known:
        to_go = [oracles.rewards_to_go(own, args.gamma) for own in rewards]
        numbers, guesses = ([x for row in rows for x in row] for rows in (to_go, [each[1].tolist() for each in known]))
        if len({*numbers}) == 1 or oracles.explained_variance(guesses, numbers) <= 0:
            mean = sum(numbers) / len(numbers)
            advantages = [[number - mean for number in row] for row in to_go]
    if args.whiten_advantages and known:
        advantages = whitened(advantages, keep_mean=False)
    for each, own in zip(known, advantages, strict=True):
        each.insert(2, torch.tensor(own))
    return found


def estimate(args, rewards, values):
    """Advantages and returns."""
    to_go = oracles.rewards_to_go(rewards, args.gamma)
    if args.advantage_estimator == "reinforce":  # nothing is subtracted, so the critic learns the sums themselves
        return to_go, to_go
    elif args.advantage_estimator == "reinforce_baseline":
        advantage = [a - v for a, v in zip(to_go, values, strict=True)]
    elif args.advantage_estimator == "2_step":
        advantage = oracles.n_step(rewards, values, args.gamma, 2)
    else:
        lam = args.lam if args.lam_alpha is None else max(0.0, 1 - 1 / (args.lam_alpha * max(len(values), 1)))
        advantage = oracles.gae(rewards, values, args.gamma, lam)
        if args.critic_lam is not None:
            of_critic = oracles.gae(rewards, values, args.gamma, args.critic_lam)
            return advantage, [a + v for a, v in zip(of_critic, values, strict=True)]
    return advantage, [a + v for a, v in zip(advantage, values, strict=True)]


def loss_of(oracle, sequences, made, scores):
    """Of the sequences of one step, over the number of their tokens; `None` without one."""
    args, total, count, imitated = oracle.args, 0.0, 0, []
    for (prompt, response, places), each, score in zip(sequences, made, scores, strict=True):
        if each is None:
            continue
        old_logps, old_values, advantages, returns = each
        policy = oracle.distributions(oracle.actor, prompt, response)
        logps, policy = chosen(policy, response)[places], policy[places]
        ratio = (logps - old_logps).exp()
        high = args.cliprange if args.cliprange_high is None else args.cliprange_high
        gained = torch.minimum(ratio * advantages, ratio.clamp(1 - args.cliprange, 1 + high) * advantages)
        if args.policy_objective == "mask":
            gained = ratio * advantages * ((1 - args.cliprange <= ratio) & (ratio <= 1 + high))
        if args.dual_clip is not None:
            gained = gained.where(advantages >= 0, torch.maximum(gained, args.dual_clip * advantages))
        total = total - gained.sum()
        values = oracle.values(prompt, response)[places]
        error = (values - returns) ** 2
        if args.cliprange_value is not None:
            near = old_values + (values - old_values).clamp(-args.cliprange_value, args.cliprange_value)
            error = torch.maximum(error, (near - returns) ** 2)
        total = total + args.vf_coef * error.sum() / 2 + args.ent_coef * (policy.exp() * policy).sum()
        total = total + args.old_kl_coef * (ratio - 1 - (logps - old_logps)).sum()
        if args.kl_placement == "loss" and args.kl_coef:
            with torch.no_grad():
                reference = oracle.distributions(oracle.reference, prompt, response)
            if args.kl_estimator == "full":
                leash = (policy.exp() * (policy - reference[places])).sum()
            else:
                leash = drift(chosen(reference, response)[places], logps, args.kl_estimator).sum()
            total = total + args.kl_coef * leash
        count += len(places)
        if args.positive_nll_coef and score >= args.positive_min_score:
            imitated.append(-logps)
    imitated = torch.cat(imitated) if imitated else torch.zeros(0)
    return total / count + args.positive_nll_coef * imitated.sum() / max(len(imitated), 1) if count else None


def run(folder, seed, bf16=False, weights_in=torch.float32, fixed=None):
    """A run of one rollout: what was noted at each step, the oracle, the reward, and the ids of the prompts."""
    choose = random.Random(seed).choice
    options, reward = some(choose), choose(list(REWARDS))
    if fixed is not None:
        options |= fixed
    elif not bf16:  # where rounding decides which side of a clip is worse, so that seeds are chosen
        options = recipe_of(random.Random(seed + 1000).choice, options)
    models, form = family(choose(["rotary", "absolute", "ALiBi beside absolute"])), choose(FORMS)
    own_vocabulary = choose([True, False]) and "model" in reward
    if own_vocabulary:
        models[2].config.pad_token_id = 3
    for model in models:
        model.to(weights_in)
    before = tuple(copy.deepcopy(model).float() for model in models)
    actor, reference, reward_model, value_model = models
    if choose([True, False]):
        actor.generation_config.update(**CAME_WITH_THE_MODEL)
    functions, weights = REWARDS[reward]
    given = {
        "model": actor,
        "ref_model": reference if options["kl_coef"] else None,
        "value_model": value_model if options["critic"] == "model" else None,
        "reward_model": reward_model if "model" in reward else None,
        "reward_funcs": functions,
        "train_dataset": prompts_as(form),
        "callbacks": [steps := Steps()],
    }
    if own_vocabulary:
        given["reward_processing_classes"] = [shifted_tokenizer(), *[None] * len(functions)]
    if (choose([True, False]) and form == "text") or fixed:
        given["rollout_func"] = play
    batch = {"gradient_accumulation_steps": 8 // options["per_device_train_batch_size"], "total_episodes": 8}
    rest = {
        "reward_weights": weights,
        "max_grad_norm": 0.0,
        "learning_rate": 5e-3,
        "seed": seed,
        "bf16": bf16,
        "use_cpu": True,
    }
    steps.trainer = ppo_runs.ppo_trainer(folder, given, **(options | batch | rest))
    if options["critic"] == "head":
        nn.init.normal_(steps.trainer.critic.score.weight, std=0.5)
    steps.trainer.train()
    weights = weights or [1.0] * (len(functions) + ("model" in reward))
    return steps, Oracle(before, steps.trainer.args, own_vocabulary), functions, weights, ids_of_prompts(form)


def worst_difference(folder, seed, bf16=False, **how):
    return difference_of(run(folder, seed, bf16, **how))


def difference_of(made, wrong=None):
    """
    The largest relative difference of a gradient in any step (with bf16 of all together: small ones are rounding), and
    the steps with tokens. `wrong`: options that the oracle takes instead.
    """
    steps, oracle, functions, weights, given = made
    oracle = copy.copy(oracle)
    oracle.args = SimpleNamespace(**(vars(oracle.args) | (wrong or {})))
    rollout = steps.trainer.run_state.rollout
    rows = zip(ppo_runs.sequences(rollout), places_of(rollout), strict=True)
    sequences = [(*ids, places) for ids, places in rows]
    assert sorted(prompt for prompt, _, _ in sequences) == sorted(given)
    oracle.load(steps.taken[0][1])
    with torch.no_grad():
        scores = [oracle.score(prompt, response, functions, weights) for prompt, response, _ in sequences]
    made, worst, learned = experience(oracle, sequences, scores), 0.0, 0
    for rows, at_step, gradients in steps.taken:
        oracle.load(at_step)
        loss = loss_of(
            oracle, [sequences[row] for row in rows], [made[row] for row in rows], [scores[row] for row in rows]
        )
        if loss is None:
            assert all(gradient is None for gradient in gradients.values())
            continue
        learned += 1
        named = list(oracle.trained.items())
        expected = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
        pairs = [
            [torch.zeros_like(parameter) if one is None else one for one in (gradients[name], gradient)]
            for (name, parameter), gradient in zip(named, expected, strict=True)
        ]
        if oracle.args.bf16:
            pairs = [[torch.cat([one.flatten() for one in side]) for side in zip(*pairs, strict=True)]]
        scale = max(gradient.norm().item() for _, gradient in pairs)
        for found, gradient in pairs:
            # Where every token is clipped all gradients are 0, and so have ours to be.
            size = max(gradient.norm().item(), 1e-3 * scale, 1e-6)
            worst = max(worst, (found - gradient).norm().item() / size)
    return worst, learned


@pytest.fixture(autouse=True)
def _no_warning_of_rollout_func(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


EXACT = 1e-4
BF16 = 0.08  # bfloat16 has 8 bits; gradients that are exact are within 0.04
# Every term of the loss, on responses with holes.
ALL_TERMS = {
    "temperature": 0.7,
    "response_length": 6,
    "kl_placement": "loss",
    "kl_estimator": "k2",
    "kl_coef": 0.2,
    "ent_coef": 0.03,
    "old_kl_coef": 0.5,
    "cliprange": 0.05,
    "cliprange_value": 0.1,
    "gamma": 0.9,
    "lam": 0.8,
    "advantage_estimator": "gae",
    "critic": "model",
}
PLAIN_TEXTS = 125  # a seed that draws text, scored by a model and a function


@pytest.mark.parametrize(
    "kl_estimator, cliprange_value", [("k2", 0.1), ("k3", None), ("full", 0.1), ("k1 in the reward", None)]
)
@pytest.mark.parametrize("critic", ["model", "head"])
def test_gradients_of_every_term_are_the_oracles(tmp_path, critic, kl_estimator, cliprange_value):
    estimator, *in_reward = kl_estimator.split(" in the ")
    placement = {"kl_placement": "reward" if in_reward else "loss", "kl_estimator": estimator}
    fixed = ALL_TERMS | placement | {"critic": critic, "cliprange_value": cliprange_value}
    worst, learned = worst_difference(tmp_path, PLAIN_TEXTS, fixed=fixed)
    assert learned >= 2
    assert worst < EXACT


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("critic", ["model", "head"])
def test_gradients_in_bfloat16_are_the_oracles_within_its_rounding(tmp_path, critic, weights):
    fixed = ALL_TERMS | {"critic": critic}
    worst, learned = worst_difference(tmp_path, PLAIN_TEXTS, bf16=True, weights_in=weights, fixed=fixed)
    assert learned >= 2
    assert worst < BF16


@pytest.mark.parametrize("seed", [2, 13])
def test_gradients_of_a_random_configuration_are_the_oracles(tmp_path, seed):
    worst, learned = worst_difference(tmp_path, seed)
    assert learned
    assert worst < EXACT


@pytest.mark.parametrize(
    "bf16, seeds, bound",
    [
        pytest.param(False, range(40), EXACT, marks=pytest.mark.proof, id="float32"),
        pytest.param(True, range(10), BF16, marks=pytest.mark.proof, id="bfloat16"),
        pytest.param(False, range(40, 100), EXACT, marks=pytest.mark.measure, id="float32, more"),
    ],
)
def test_gradients_of_many_random_configurations_are_the_oracles(tmp_path, bf16, seeds, bound):
    differences = {seed: worst_difference(tmp_path / str(seed), seed, bf16)[0] for seed in seeds}
    print(f"largest relative difference of a gradient: {max(differences.values()):.1e}")
    assert {seed: worst for seed, worst in differences.items() if worst >= bound} == {}


# What the oracle takes for an option, or does; that it is noticed shows that the tests above can fail.
WRONG_OPTIONS = [
    {"temperature": 1.0},
    {"kl_estimator": "k3"},
    {"kl_coef": 0.1},
    {"vf_coef": 0.1},
    {"ent_coef": -0.03},
    {"old_kl_coef": 0.0},
    {"cliprange": 0.5},
    {"cliprange_value": None},
    {"gamma": 1.0},
    {"lam": 1.0},
    {"critic_lam": 0.1},
    {"cliprange_high": 0.001},
    {"dual_clip": 1.06},
    {"lam_alpha": 0.7},
    {"policy_objective": "mask"},
    {"positive_nll_coef": 0.3, "positive_min_score": 0.0},
    {"critic_gate": True},
]


@pytest.fixture(scope="module")
def all_terms(tmp_path_factory):
    """A run with every term, of each precision once."""

    @functools.cache
    def of(bf16=False, **more):
        return run(tmp_path_factory.mktemp("run"), PLAIN_TEXTS, bf16, fixed=ALL_TERMS | more)

    return of


@pytest.mark.parametrize("wrong", WRONG_OPTIONS, ids=str)
def test_control_an_option_that_the_oracle_takes_otherwise_shows(all_terms, wrong):
    assert difference_of(all_terms(), wrong)[0] > 10 * EXACT


def tools_count(monkeypatch):
    monkeypatch.setitem(globals(), "places_of", lambda rollout: [list(range(n)) for n in rollout.attended.sum(1)])


def padding_is_read(monkeypatch, values=Oracle.values):
    monkeypatch.setattr(Oracle, "values", lambda self, prompt, response: values(self, [0, *prompt], response))


def values_come_late(monkeypatch, values=Oracle.values):
    monkeypatch.setattr(Oracle, "values", lambda self, prompt, response: values(self, prompt, response).roll(1))


def scores_are_doubled(monkeypatch, score=Oracle.score):
    def doubled(self, *args):
        said = score(self, *args)
        return None if said is None else 2 * said

    monkeypatch.setattr(Oracle, "score", doubled)


@pytest.mark.parametrize("bf16, smallest", [(False, 10 * EXACT), (True, BF16)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mistake", [tools_count, padding_is_read, values_come_late, scores_are_doubled])
def test_control_a_mistake_of_the_oracle_shows(all_terms, monkeypatch, mistake, bf16, smallest):
    made = all_terms(bf16, whiten_advantages=False)
    mistake(monkeypatch)
    assert difference_of(made)[0] > smallest
