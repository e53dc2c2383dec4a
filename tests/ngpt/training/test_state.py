"""The state of a run can be copied, and keeps the names of its fields in checkpoints."""

from ngpt.training.state import TrainState


def test_a_state_copies_all_fields_of_another() -> None:
    one, other = TrainState(step=3, microbatch_halvings=1), TrainState(step=7, recent=[1.0], skipped_batches=2)
    one.restore(other)
    assert one == other


def test_a_saved_state_has_the_field_names_of_the_first_version() -> None:
    state = TrainState(step=7, microbatch_halvings=1, eval_halvings=2, batch_halvings=3, skipped_batches=4)
    saved = state.to_saved()
    assert saved.keys() == {
        *("step", "recent", "timed_tokens", "timed_seconds", "last_eval", "rollbacks"),
        *("initial_val_loss", "eval_blocks", "extended", "seconds", "train_seconds"),  # added later
        *("splits", "eval_splits", "halvings", "left_out", "skipped", "passed_over"),
    }
    assert (saved["splits"], saved["eval_splits"], saved["halvings"], saved["passed_over"]) == (1, 2, 3, 4)
    assert TrainState.from_saved(saved) == state


def test_the_train_loss_is_the_mean_of_the_recent_losses() -> None:
    assert TrainState().train_loss is None
    assert TrainState(recent=[1.0, 2.0, 6.0]).train_loss == 3.0
