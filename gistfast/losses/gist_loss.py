"""The loss for sentence-transformers' trainer: `GISTEmbedLoss` with the guide read from a store.

Exchange `guide=` for a `GuideStore`, and give the dataset a `label` column that holds, for each row, the
store's text ids of its columns: `store.to_dataset()` makes such a dataset.

Shapes: B rows, C columns, D student width.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank
from torch import Tensor, nn

from gistfast.errors import ConfigError, ShapeError
from gistfast.losses.functional import Backend, MarginStrategy, guided_contrastive_loss
from gistfast.losses.inputs import by_column, check_options, check_triplet, roles
from gistfast.losses.schedules import LearnedTemperature
from gistfast.losses.triplet import DEFAULT_MARGIN, Triplet
from gistfast.store import GuideStore


class GISTLoss(nn.Module):
    """Guided in-sample selection of negatives (GISTEmbed), with the guide's vectors read from a store.

    Where the store holds several guides, they judge by the mean, lowest or highest of their scores, as the store says.

    Inputs: two or more text columns (anchor, positive, then any number of negatives), and a label column of
    text ids, one for each text column. Works with `BatchSamplers.NO_DUPLICATES`, several datasets,
    `MatryoshkaLoss` and evaluation.

    Attributes:
        last_stats: Of the last batch, scalar tensors: for each block in use the share of its candidates that was
            dropped ("dropped/ap", "dropped/aa", "dropped/pp", "dropped/an"), and the mean student scores of the rows'
            own positives and of their hardest candidates ("score/positive", "score/hardest"); also the mean triplet
            term ("triplet") where there is one.

    Example:
        >>> store = GuideStore.open("store")  # doctest: +SKIP
        >>> loss = GISTLoss(model, store)  # doctest: +SKIP
        >>> rows = store.to_dataset("train")  # doctest: +SKIP
        >>> SentenceTransformerTrainer(model, train_dataset=rows, loss=loss).train()  # doctest: +SKIP

    Source: GISTEmbed, arXiv:2402.16829.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        store: GuideStore,
        *,
        temperature: float | LearnedTemperature = 0.01,
        margin: float = 0.0,
        margin_strategy: MarginStrategy = "absolute",
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        hard_only: bool = False,
        triplet: Triplet | None = None,
        triplet_margin: float = DEFAULT_MARGIN,
        gather_across_devices: bool = False,
        backend: Backend = "auto",
    ) -> None:
        """Take the options of `gistfast.guided_contrastive_loss`.

        Args:
            model: The student.
            store: Guide vectors of every text that the dataset holds.
            temperature: Divides student scores; above 0. A `LearnedTemperature` is trained with the student.
            margin: How far below the positive's guide score a candidate is dropped already.
            margin_strategy: "absolute" or "relative".
            contrast_anchors: Whether anchors are contrasted with each other.
            contrast_positives: Whether positives are contrasted with each other.
            hard_only: Drop candidates that the student scores below the own positive, too.
            triplet: "soft" or "hard" adds a triplet term (`gistfast.losses.triplet`); None adds none.
            triplet_margin: By how much nearer than its negatives the term wants a row's positives, in cosines.
            gather_across_devices: Take candidates from all processes of a distributed run, which must have
                batches of one size. The gradient, averaged over them, is that of one process on the joint
                batch.
            backend: Who computes the loss: "auto", "triton", "chunked" or "reference".

        Raises:
            ConfigError: When an option is out of its range.
        """
        super().__init__()
        self.learned_temperature = temperature if isinstance(temperature, LearnedTemperature) else None
        temperature = temperature().item() if isinstance(temperature, LearnedTemperature) else temperature
        check_options(temperature, margin, margin_strategy)
        check_triplet(triplet, triplet_margin)
        self.model = model
        self.store = store
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "margin": margin,
            "margin_strategy": margin_strategy,
            "contrast_anchors": contrast_anchors,
            "contrast_positives": contrast_positives,
            "hard_only": hard_only,
            "triplet": triplet,
            "triplet_margin": triplet_margin,
            "backend": backend,
        }
        self.gather_across_devices = gather_across_devices
        self.last_stats: dict[str, Tensor] = {}

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The mean loss of a batch, a scalar.

        Args:
            sentence_features: Features of each column, anchors first.
            labels: (B, C) text ids.

        Raises:
            ConfigError: When there are no labels.
            ShapeError: When the labels, or the batches of several processes, do not fit together.
            StoreError: When a label is not in the store.
            VectorError: When the student gives a vector that is zero or not finite.
        """
        columns = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self._loss(columns, labels)

    def _loss(self, columns: list[Tensor], labels: Tensor | None) -> Tensor:
        """The mean loss of a batch from its columns' vectors, each (B, D)."""
        ids = self._ids(columns, labels)
        row_offset, num_rows = 0, len(columns[0])
        if self.gather_across_devices:
            columns, ids = self._gathered(columns, ids)
            row_offset = num_rows * get_rank()
        # The store is on the host: one copy of the ids, which waits for the device, serves both look-ups.
        on_host = ids.cpu()
        guides = by_column(self.store.gather(on_host), ids.device)
        identities = by_column(self.store.identity(on_host), ids.device)
        return self.contrast(columns, guides, identities, row_offset=row_offset, num_rows=num_rows)

    def contrast(
        self,
        columns: Sequence[Tensor],
        guides: Sequence[Tensor],
        identities: Sequence[Tensor],
        *,
        row_offset: int = 0,
        num_rows: int | None = None,
    ) -> Tensor:
        """The mean loss of rows from all that it depends on, anchors first; sets `last_stats`.

        Args:
            columns: (B, D) student vectors of each column.
            guides: (B, G) guide vectors of each column.
            identities: (B,) text identities of each column.
            row_offset: First row whose loss is taken; the others are candidates alone.
            num_rows: How many rows' loss is taken; None for all from `row_offset` on.
        """
        anchor, positive, negative = roles(columns)
        guide_anchor, guide_positive, guide_negative = roles(guides)
        # Where the store's entries can be counted in int32: the kernel wants that.
        dtype = torch.int32 if self.store.num_texts < 2**31 else torch.int64
        anchor_ids, positive_ids, negative_ids = roles([ids.to(dtype) for ids in identities])
        options = self.options
        if self.learned_temperature is not None:
            options = {**options, "temperature": self.learned_temperature()}
        loss, stats = guided_contrastive_loss(
            anchor, positive, negative,
            guide_anchor=guide_anchor, guide_positive=guide_positive, guide_negative=guide_negative,
            guide_widths=self.store.guide_widths, guide_score=self.store.guide_score,
            anchor_ids=anchor_ids, positive_ids=positive_ids, negative_ids=negative_ids,
            row_offset=row_offset, num_rows=num_rows, return_stats=True, **options,
        )  # fmt: skip
        self.last_stats = stats.means()
        return loss

    def _ids(self, columns: list[Tensor], labels: Tensor | None) -> Tensor:
        """The labels as text ids, (B, C) int64, beside the columns' vectors.

        Raises:
            ConfigError: When there are none.
            ShapeError: When they are not one whole number for each text.
        """
        if labels is None:
            raise ConfigError(
                f"{type(self).__name__} was given no labels: the dataset needs a column `label` with the "
                "store's text ids of each row, as store.to_dataset() makes it"
            )
        num_rows, num_columns = len(columns[0]), len(columns)
        if num_columns < 2 or labels.shape != (num_rows, num_columns) or labels.is_floating_point():
            raise ShapeError(
                f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}, the batch has {num_rows} "
                f"rows of {num_columns} columns: give one text id for each column of a row, anchor first, "
                "and at least an anchor and a positive"
            )
        return labels.to(columns[0].device, torch.int64)

    def _gathered(self, columns: list[Tensor], ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """Vectors, with their gradients, and ids of all processes, in the order of their ranks.

        Raises:
            ShapeError: When the batches of the processes cannot be joined.
        """
        # Gathering unequal batches hangs or mixes rows up, and ids of another store stand for other texts.
        own = torch.tensor([[*ids.shape, int(self.store.fingerprint[:15], 16)]], device=ids.device)
        if (all_gather(own) != own).any():
            raise ShapeError(
                f"this process has {len(ids)} rows of {len(columns)} columns from {self.store.path}, another "
                "process has other numbers or another store: gather_across_devices needs equal batches from "
                "one store, so set dataloader_drop_last=True and train on one dataset, or leave it off"
            )
        return [all_gather_with_grad(column) for column in columns], all_gather(ids)

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        return {
            "guide": ", ".join(guide.name for guide in self.store.manifest.guides),
            "store": self.store.fingerprint,
            **self.options,
            "gather_across_devices": self.gather_across_devices,
        }

    @property
    def citation(self) -> str:
        """The paper, as BibTeX."""
        return """
@misc{solatorio2024gistembed,
    title={GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning},
    author={Aivin V. Solatorio},
    year={2024},
    eprint={2402.16829},
    archivePrefix={arXiv},
    primaryClass={cs.LG}
}
"""


def rows_of_all(columns: Tensor) -> Tensor:
    """Columns of the rows of all W processes, (C, W B, ...), in the order of their ranks.

    Args:
        columns: This process's, (C, B, ...), as many rows as every other's.
    """
    # NCCL takes no other layout.
    columns = columns.contiguous()
    gathered = all_gather_with_grad(columns) if columns.requires_grad else all_gather(columns)
    by_process: Tensor = gathered.view(-1, *columns.shape)
    return by_process.transpose(0, 1).flatten(1, 2)
