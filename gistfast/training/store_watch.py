"""A run's look at its stores: they may grow beside it, and must not change under it."""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gistfast.errors import StoreError
from gistfast.store import GuideStore
from gistfast.store.watch import StoreWatch
from gistfast.training.ranks import Ranks

logger = logging.getLogger(__name__)


class WatchStores(TrainerCallback):
    """Looks at the stores where a step is logged, and at their files where one is evaluated or saved.

    A store that is gone or replaced ends the run after the step, with a checkpoint: what the steps were made of is
    mapped and stays what it was. A file that was changed in place may have been read already: nothing is saved then.

    Attributes:
        error: Why the run was ended, if it was.
    """

    def __init__(self, stores: Sequence[GuideStore], ranks: Ranks) -> None:
        """Remember the stores as they are; what one process of the run finds ends all of them."""
        self._ranks = ranks
        self.error: StoreError | None = None
        self._watches = {store: StoreWatch(store) for store in stores}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Warn of what was added; end the run where a store is another one.

        Raises:
            StoreError: When a file of a store is gone or has other bytes.
        """
        kept = control.should_evaluate or control.should_save or control.should_training_stop
        if not kept and not control.should_log:
            return
        try:
            with self._ranks.together():
                self._look()
        except StoreError as error:
            self.error = error
            control.should_save = control.should_training_stop = True
            return
        if kept:
            with self._ranks.together():
                for watch in self._watches.values():
                    watch.look_at_files()

    def _look(self) -> None:
        for store, watch in self._watches.items():
            if (gained := watch.look()) is not None and self._ranks.first:
                logger.warning(
                    "%s got %s: this run goes on with the %d rows and the guides that it began with",
                    *(store.path, gained, store.num_rows),
                )
