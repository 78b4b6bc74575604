"""Two processes give the losses, the parameters and the ledger's metrics of one."""

import pytest

import dpo_layouts


TOLERANCE = 1e-4  # of numbers near 0.1 and above, after four steps in float32


def difference(one, other):
    """The largest relative difference of logged numbers and, by norm, of parameters; what is near 0 counts as 0.1."""
    largest = (0.0, "")
    for mine, theirs in zip(one["lines"], other["lines"], strict=True):
        assert mine.keys() == theirs.keys()
        for key, number in theirs.items():
            largest = max(largest, (abs(mine[key] - number) / max(abs(number), 0.1), key))
    assert one["parameters"].keys() == other["parameters"].keys()
    for name, tensor in other["parameters"].items():
        apart = (one["parameters"][name] - tensor).norm().item()
        largest = max(largest, (apart / max(tensor.norm().item(), 0.1), name))
    return largest


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")  # accelerate and DeepSpeed import half of their optional dependencies
def test_two_processes_measure_what_one_does(of_two_processes):
    """The same run on one process and on two, of one and of two micro-batches each; a ledger per rank does show."""
    measured = dict(of_two_processes["dpo"])
    memory = measured.pop("hungry rank")
    alone = {case: dpo_layouts.run(8, 1, **options) for case, options in dpo_layouts.CASES.items()}
    assert alone["sigmoid"]["lines"][-1]["eval_preference/pairs"] == 11
    assert alone["sigmoid"]["lines"][0]["preference/pairs"] == 16
    differences = {name: difference(result, alone.get(name, alone["sigmoid"])) for name, result in measured.items()}
    assert differences.pop("ledger per rank")[0] > 1e-2
    assert differences.keys() == {*dpo_layouts.CASES, "2 x 2"}
    assert max(differences.values())[0] < TOLERANCE, differences
    assert memory["memory/evaluate"] - memory["memory/learn"] > 0.8 * 200 / 1024  # GiB, of the rank that needs most


@pytest.mark.integration
@pytest.mark.parametrize("case", dpo_layouts.CASES)
def test_micro_batches_change_nothing(case):
    """Four micro-batches of two pairs are one batch of eight."""
    options = dpo_layouts.CASES[case]
    assert difference(dpo_layouts.run(2, 4, **options), dpo_layouts.run(8, 1, **options))[0] < TOLERANCE
