"""What DPO's options may be: TRL's names and no others, and what makes sense together."""

import inspect
import re

import pytest
from trl.trainer import dpo_trainer

import dpo_runs
from trl_ext.dpo.config import DIVERGENCES, LOSS_TYPES, TRUNCATIONS


def test_loss_types_divergences_and_truncations_are_trls():
    """Those that TRL compares with, at the first step or in the first batch."""
    source = inspect.getsource(dpo_trainer)
    assert set(LOSS_TYPES) == set(re.findall(r'if loss_type == "(\w+)"', source))
    assert set(DIVERGENCES) == set(re.findall(r'if self\.f_divergence_type == "(\w+)"', source))
    assert set(TRUNCATIONS) == set(re.findall(r'if self\.truncation_mode == "(\w+)"', source))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"loss_type": "sigmoyd"},
            r"`loss_type` has unknown values \['sigmoyd'\]\. Did you mean `loss_type='sigmoid'`",
        ),
        ({"loss_type": ["sigmoid", "rpo"]}, r"`loss_type` has unknown values \['rpo'\]"),
        ({"f_divergence_type": "kl"}, "`f_divergence_type` is 'kl'; it must be one of"),
        ({"truncation_mode": "middle"}, "`truncation_mode` is 'middle'; it must be one of"),
        ({"beta": 0.0}, r"`beta` is 0.0; .* needs a β > 0"),
        ({"beta": -0.1}, r"`beta` is -0.1"),
        ({"beta": float("nan")}, r"`beta` is nan"),
        ({"label_smoothing": 0.5}, r"`label_smoothing` is 0.5; .* in \[0, 0.5\)"),
        ({"label_smoothing": -0.1}, r"`label_smoothing` is -0.1"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, r"changes nothing with `loss_type=\['hinge'\]`"),
        ({"label_smoothing": 0.1, "use_weighting": True}, r"not defined together with `use_weighting=True`"),
        ({"num_eval_samples": "a"}, r"`num_eval_samples` is 'a'; it must be an integer of at least 1"),
        ({"beta": "a"}, r"`beta` is 'a'; it must be above 0"),
        ({"label_smoothing": "a"}, r"`label_smoothing` is 'a'; it must be in \[0, 0\.5\)"),
        ({"num_eval_samples": 0}, r"`num_eval_samples` is 0; it must be an integer of at least 1"),
        ({"eval_max_new_tokens": 0}, r"`eval_max_new_tokens` is 0"),
        ({"ref_model_quantization": "2bit"}, r"`ref_model_quantization` is '2bit'; it must be one of"),
        ({"ref_model_quantization": "4bit", "sync_ref_model": True}, "`sync_ref_model` copies the policy's weights"),
    ],
    ids=str,
)
def test_option_that_means_nothing_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        dpo_runs.dpo_config(tmp_path, **options)


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"])
def test_label_smoothing_is_taken_by_every_loss_that_reads_it(tmp_path, loss_type):
    assert dpo_runs.dpo_config(tmp_path, loss_type=loss_type, label_smoothing=0.49).label_smoothing == 0.49
