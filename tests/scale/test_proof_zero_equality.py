"""
One process, two under DDP, ZeRO-2 and ZeRO-3: the same losses, gradient norms and final weights, over ten steps of
AdamW with clipping, on given responses whose lengths differ so much that a mean of means would be another number.
"""

import pytest

import equality_worker
import two_processes
import zero_runs
from measurements import differences


pytestmark = [pytest.mark.proof, pytest.mark.filterwarnings("ignore")]
TOLERANCE = 1e-4
WRAPPERS = {"ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equality")
    zero_runs.save(folder)
    return folder


@pytest.fixture(scope="module")
def measured(folder):
    return two_processes.measured(equality_worker.measure, folder, timeout=900)


@pytest.fixture(scope="module", params=equality_worker.CASES)
def case_and_alone(request, folder):
    without_budgets = dict.fromkeys(("micro_batch_tokens", "score_batch_tokens")) if "tokens" in request.param else {}
    return request.param, equality_worker.run(request.param, folder, None, 8, **without_budgets)


@pytest.mark.parametrize("layout", equality_worker.LAYOUTS)
def test_two_processes_learn_what_one_does(case_and_alone, measured, layout):
    case, alone = case_and_alone
    run = measured[f"{case}, {layout}"]
    assert run["wrapper"] == WRAPPERS[layout]
    assert len(run["lines"]) == 10
    if "stop" in case:
        assert 0 < sum(line["policy/steps_left_out"] for line in run["lines"]) < 8
    apart = differences(run, alone)
    assert {"loss", "grad_norm"} <= apart.keys()
    worst = max(apart, key=apart.get)
    print(f"\n{case}, {layout}: largest difference {apart[worst]:.1e} ({worst})")
    assert apart[worst] < TOLERANCE, sorted(apart.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_packed_rows_and_budgets_learn_what_padded_rows_do(measured, layout):
    packed, padded = measured[f"ppo, model, tokens, {layout}"], measured[f"padded, {layout}"]
    assert (packed["packs"], padded["packs"]) == (True, False)
    apart = differences(packed, padded)
    worst = max(apart, key=apart.get)
    print(f"\n{layout}: largest difference {apart[worst]:.1e} ({worst})")
    assert apart[worst] < 1e-5


def test_control_a_gradient_of_one_share_is_noticed(measured, folder):
    """The loss is a share of a sum over the ranks, whose gradients are averaged: the factor of two is forgotten."""
    alone = equality_worker.run("ppo, model", folder, None, 8)
    assert differences(measured["mistake"], alone)["grad_norm"] > 100 * TOLERANCE
