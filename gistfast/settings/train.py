"""The settings of a training run."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, Literal

from gistfast.errors import ConfigError
from gistfast.settings.base import (
    Settings,
    argument,
    comma_separated,
    learning_rates,
    numbers,
    refuse_both,
    setting,
)
from gistfast.settings.train_checks import refuse_useless_options


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """Stage 2: from a guide store to a trained student."""

    about = "Train a student against the guide store STORE, or against several."
    when_stopped = "stopped: the same command with --resume goes on from here"
    sections: ClassVar = {
        "temperature": "Loss",
        "tokens_per_forward": "Forward passes",
        "epochs": "Batches",
        "learning_rate": "Steps",
        "bf16": "Device",
        "keep_layers": "Student",
        "logging_steps": "Log, evaluations and checkpoints",
    }

    store: tuple[str, ...] = argument(
        "Folder of the guide store, or of several, whose rows never meet in a batch.", several=True
    )
    student: str = setting(MISSING, "Student model to start from: a folder or a hub id.")
    out: str = setting(MISSING, "Folder of the trained student.")

    temperature: float = setting(0.01, "Divides student scores.", above=0)
    temperature_decay: float | None = setting(
        None, "Temperature is this to the power of the steps taken, but at most --temperature.", above=0, below=1
    )
    learn_temperature: bool = setting(
        False, "Train the temperature, too; --learning-rates temperature=1e-3 gives it a rate of its own."
    )
    min_temperature: float | None = setting(
        None, "Lowest temperature of the two settings before; 0.001 when left out.", above=0
    )
    margin: float = setting(0.0, "Moves the guide's threshold below the positive's score.", at_least=-2, at_most=2)
    margin_end: float | None = setting(
        None, "Margin of the last step; it moves there from --margin in equal steps.", at_least=-2, at_most=2
    )
    margin_strategy: Literal["absolute", "relative"] = setting(
        "absolute", "Whether the margin is a score or a share of the positive's score."
    )
    contrast_anchors: bool = setting(True, "Use other anchors as candidates.")
    contrast_positives: bool = setting(True, "Let positives meet other positives as candidates.")
    hard_only: bool = setting(False, "Also drop candidates that the student scores below the positive.")
    triplet: Literal["soft", "hard"] | None = setting(
        None,
        "Add a triplet term: what the guide takes for positives is to lie nearer than the rest, in the mean (soft), or "
        "the farthest of it nearer than the nearest of the rest (hard).",
    )
    triplet_margin: float | None = setting(
        None, "With --triplet: by how much nearer, in cosines; 0.2 when left out.", at_least=0, at_most=2
    )
    mined_negatives: int = setting(0, "Hard negatives to add to each row, of those that the store has.", at_least=0)
    matryoshka_dims: tuple[int, ...] = setting(
        (),
        "Widths that the student's vectors may be cut to, e.g. 256,128,64; the loss is taken at each and at the whole.",
        parse=numbers(int, "--matryoshka-dims", "256,128,64"),
    )
    matryoshka_weights: tuple[float, ...] = setting(
        (),
        "What the loss counts at each width of --matryoshka-dims; 1 when left out.",
        parse=numbers(float, "--matryoshka-weights", "1,0.5,0.25"),
    )
    backend: Literal["auto", "reference", "chunked", "triton"] = setting("auto", "Implementation of the loss.")
    tokens_per_forward: int | None = setting(
        None, "Tokens of a forward pass, padding included; chosen for the device when left out.", at_least=1
    )
    attention: Literal["auto", "padded", "unpadded"] = setting(
        "auto", "Texts padded to one length or in one row; auto is one row where that runs and gives the same vectors."
    )
    cached: bool = setting(False, "Embed every text twice, so that memory no longer limits the batch.")
    replay_tolerance: float = setting(
        0.0,
        "With --cached: embed only those texts twice that carry the gradient; relative length of what is left out.",
        at_least=0,
        below=1,
    )
    replay_unbiased: bool = setting(
        False, "With --replay-tolerance: draw some of the texts that would be left out to stand for the others."
    )

    epochs: float = setting(1.0, "Passes over the rows.", above=0)
    max_steps: int | None = setting(None, "Steps to take, in place of --epochs.", at_least=1)
    batch_size: int = setting(
        64, "Rows of a step; of each process, where torchrun starts several, and the step has them all.", at_least=2
    )
    batching: Literal["random", "length", "task", "cluster"] = setting(
        "random", "Which rows meet in a batch: any, or those of similar length, of one task, of one cluster."
    )
    clusters: int | None = setting(
        None, "Clusters of anchors with --batching cluster; of eight batches each when left out.", at_least=2
    )
    mixing: Literal["proportional", "round_robin"] | None = setting(
        None,
        "With several stores: every batch of each, in random order (proportional, when left out), or a batch of each "
        "in turn until the smallest is used up (round_robin).",
    )
    learning_rate: float = setting(2e-5, "Highest learning rate.", above=0)
    learning_rates: Mapping[str, float] | None = setting(
        None,
        "Learning rates of weights whose name a regular expression finds, e.g. embeddings=1e-6,head=1e-3; the last one "
        "that finds a name counts.",
        parse=learning_rates,
    )
    warmup: float = setting(0.1, "Share of the steps in which the learning rate rises.", at_least=0, below=1)
    seed: int = setting(42, "Decides the order of the rows and every other draw.", at_least=0, at_most=2**32 - 1)
    dropout: float | None = setting(None, "Dropout of the student; its own when left out.", at_least=0, below=1)
    bf16: bool = setting(False, "Compute in bfloat16 where it is safe.")
    compile: bool = setting(
        False,
        "Compile the student's transformer, one graph for passes of any size, padded: for GPUs, a CPU gains nothing.",
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations instead of keeping them.")
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "Device of the student; CUDA_VISIBLE_DEVICES chooses among GPUs."
    )
    workers: int = setting(0, "Processes that prepare batches.", at_least=0)

    keep_layers: tuple[int, ...] | None = setting(
        None,
        "Layers of the student to keep, e.g. 0,1,2; all when left out.",
        parse=numbers(int, "--keep-layers", "0,1,2"),
    )
    pooling: Literal["mean", "cls", "last", "max", "weightedmean", "mean_sqrt_len"] | None = setting(
        None, "How the student makes one vector of its tokens: a plain transformers student needs it."
    )
    dim: int | None = setting(
        None, "Width of the student's vectors, through a new head after pooling; its own when left out.", at_least=1
    )
    normalize: bool | None = setting(
        None, "Whether the student's vectors have length 1; as the student has it when left out."
    )
    freeze: tuple[str, ...] = setting(
        (),
        "Parts of the student that are not trained, of those it keeps: embeddings, numbers of layers.",
        parse=comma_separated,
    )
    lora_rank: int | None = setting(
        None,
        "Train an adapter (LoRA) of this rank in place of the transformer's weights; merged when saved.",
        at_least=1,
    )
    lora_alpha: float | None = setting(
        None, "The adapter counts alpha / rank; alpha is twice the rank when left out.", above=0
    )
    lora_dropout: float = setting(0.0, "Dropout before the adapter.", at_least=0, below=1)
    lora_targets: tuple[str, ...] = setting(
        (), "Linear layers that get the adapter, e.g. query,value; all when left out.", parse=comma_separated
    )
    max_length: int | None = setting(None, "Tokens of a text that the student sees.", at_least=3)
    query_prompt: str | None = setting(None, "Prompt that the student puts before anchors; its own when left out.")
    document_prompt: str | None = setting(
        None, "Prompt that the student puts before positives and negatives; its own when left out."
    )
    student_revision: str | None = setting(None, "Revision of a student from the hub.")
    trust_remote_code: bool = setting(False, "Run code that comes with the student. Only for models you trust.")

    logging_steps: int = setting(1, "Steps between two lines of the log.", at_least=1)
    eval_steps: int = setting(0, "Steps between two evaluations on the held-out rows; 0 for none.", at_least=0)
    eval_sts: str | None = setting(
        None,
        "File of scored pairs (columns sentence1, sentence2 and score) that is evaluated beside the held-out rows, or "
        "alone where there are none.",
    )
    keep_best: bool = setting(
        False,
        "Save the student of the evaluation with the highest nDCG@10, or Spearman where no rows are held out, in place "
        "of the last one.",
    )
    patience: int | None = setting(
        None, "Evaluations without a better score after which the run stops, with --keep-best.", at_least=1
    )
    save_steps: int = setting(500, "Steps between two checkpoints; 0 for none but at Ctrl-C.", at_least=0)
    save_total_limit: int = setting(2, "Checkpoints to keep.", at_least=1)
    trackers: tuple[str, ...] | None = setting(
        None,
        "Where the log goes besides metrics.jsonl: tensorboard, wandb, trackio or none; "
        "TensorBoard where it is installed when left out.",
        parse=comma_separated,
    )
    push_to_hub: str | None = setting(
        None,
        "Hub repository, such as me/student, that gets checkpoints and student in the background; made, and private, "
        "when it is not there.",
    )
    picture: bool = setting(True, "Draw the log as training.png at the end, where matplotlib is installed.")
    resume: bool = setting(False, "Go on from the last checkpoint in --out.")
    overwrite: bool = setting(False, "Replace the run in --out when the first step begins.")
    dry_run: bool = setting(
        False, "Take up to ten steps elsewhere, say what the run would be, and leave nothing in --out."
    )

    def check(self) -> None:
        """Refuse settings that contradict each other."""
        refuse_both(self, "resume", "overwrite")
        if not self.store:
            raise ConfigError("STORE is needed: give the folder of a guide store, or of several")
        if self.clusters and self.batching != "cluster":
            raise ConfigError(f"--clusters {self.clusters} does nothing with --batching {self.batching}: leave it out")
        if self.replay_tolerance and not self.cached:
            raise ConfigError("--replay-tolerance does nothing without --cached: give both")
        if self.replay_unbiased and not self.replay_tolerance:
            raise ConfigError("--replay-unbiased does nothing without --replay-tolerance: give one, such as 0.05")
        unknown = set(self.trackers or ()) - {"tensorboard", "wandb", "trackio"}
        if unknown:
            raise ConfigError(f"--trackers knows tensorboard, wandb and trackio, found {', '.join(sorted(unknown))}")
        refuse_useless_options(self)
