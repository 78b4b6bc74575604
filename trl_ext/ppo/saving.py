"""
What `PPOTrainerX` saves and loads: the actor, the critic in a folder of its own, and the run, as it is now or, where a
signal ends a rollout, as it was at the end of the last step.
"""

import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers.trainer_utils import HubStrategy

from .. import _trl
from ..models.fingerprint import save_base_fingerprint
from ..models.loading import restore_weights
from ..runs.saving import SavesWhole
from .ahead.rollouts import RolloutsAhead
from .checkpoint import save_run
from .roles import critic as critic_module
from .roles.adapters import restore_adapter, saving_one_adapter


class SavesActorAndCritic(SavesWhole):
    """A trainer of actor and critic that saves both. Name it before TRL's trainer."""

    critic: Any
    phases: Any
    is_amid_rollout: Any
    is_world_process_zero: Any
    is_deepspeed_enabled: Any
    is_fsdp_enabled: Any
    push_in_progress: Any
    _ahead: RolloutsAhead | None
    _step_end: str  # a folder with this rank's files of a checkpoint, before a rollout
    _tokens_at_step_end = 0
    _has_left_step = False  # a signal has ended the rollout after a step

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the actor, and the critic in the folder `critic/`."""
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if state_dict is None:
            state_dict = self.model.state_dict()
        actor, critic = critic_module.split_state_dict(self.model, self.critic, state_dict)
        with saving_one_adapter(self.model):
            super()._save(output_dir, actor)  # type: ignore[misc]
        folder = Path(output_dir) / critic_module.FOLDER
        if self.args.should_save and critic:
            self.critic.save_pretrained(folder, critic)
        if self.args.should_save and is_peft_model(self.model):
            folders = [output_dir, Path(output_dir) / self.model.active_adapter, folder]
            config = self.model.config
            save_base_fingerprint(folders, _trl.get_config_model_id(config), getattr(config, "_commit_hash", None))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the critic's folder with the model's files of a checkpoint, which the Trainer pushes."""
        critic = Path(checkpoint_folder) / critic_module.FOLDER
        pushes = not self._saves_now and self.args.hub_strategy != HubStrategy.END
        if pushes and self.is_world_process_zero() and critic.is_dir():
            is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
            if self.args.hub_always_push or not is_busy:  # as the Trainer decides
                shutil.copytree(critic, Path(self.args.output_dir) / critic_module.FOLDER, dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random numbers, and everything else of the run on this rank, as they were at the step's end."""
        if self._has_left_step:
            shutil.copytree(self._step_end, output_dir, dirs_exist_ok=True)
        else:
            super()._save_rng_state(output_dir)  # type: ignore[misc]
            save_run(self, output_dir)
        self.accelerator.wait_for_everyone()  # the Trainer's own state comes last, after that of every rank

    def _note_step_end(self) -> None:
        """Keep what a checkpoint has of this rank before a rollout, which a signal may end."""
        if not self.is_amid_rollout:
            if self._ahead is not None:  # what is kept of it has to be there
                with self.phases.during("generate"):
                    self._ahead.settle()
            self._save_rng_state(self._step_end)
            self._tokens_at_step_end = self.state.num_input_tokens_seen

    def _back_to_step_end(self) -> None:
        self._has_left_step = self._has_stepped
        if self._has_stepped:
            self.state.num_input_tokens_seen = self._tokens_at_step_end

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the actor from its own files, the critic from its folder."""
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        folder = Path(resume_from_checkpoint)
        if is_peft_model(self.model):  # the Trainer would mistake the critic's adapter for one of the actor's
            name = self.model.active_adapter
            restore_adapter(self.model, folder if name == "default" else folder / name)
        else:
            restore_weights(self.model, folder, but_not=critic_module.ATTRIBUTE)
        self.critic.restore(folder / critic_module.FOLDER)

    def _load_best_model(self) -> None:
        self._last_loaded_step = -1  # vLLM has the last weights, not the best
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # the checkpoint holds the whole engine, the critic too
            return super()._load_best_model()  # type: ignore[misc]
        self._load_from_checkpoint(self.state.best_model_checkpoint)
