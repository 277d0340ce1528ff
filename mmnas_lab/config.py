"""Schema of everything that is read from conf/.

Nodes with a `_target_` (dataset, backbone, search_space, objective, strategy) are checked against the
constructor that they name, in `build.py`; every other node has its model here. Unknown keys are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[int, Field(ge=0)]

StageName = Literal["backbone", "features", "search", "pretrain", "train", "test"]
Node = dict[str, Any]


class Model(BaseModel):
    """A node of the configuration: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())


class Optimizer(Model):
    """An optimizer of torch and its rate; betas are Adam's, momentum is SGD's."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Positive = 1e-3
    weight_decay: NonNegative = 1e-4
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    momentum: Probability = 0.9


class FitSettings(Model):
    """What every loop over batches has: how long, how large, at which rate."""

    epochs: Amount
    batch_size: Count
    optimizer: Optimizer
    schedule: Literal["one_cycle", "cosine", "constant"] = "cosine"
    final_lr: NonNegative = 1e-6
    clip_norm: Positive | None = None


class FeatureViews(Model):
    """Feature-level views of one stage: dropout, Gaussian noise (in standard deviations), lost modalities."""

    dropout: Probability = 0.0
    noise: NonNegative = 0.0
    drop_modality: Probability = 0.0


class PixelViews(Model):
    """Views of pictures in one stage, for networks that read pixels: see `dataset.pixel_views`."""

    crop_padding: Amount = 0
    least_area: Probability = 1.0
    flip: bool = False
    jitter: NonNegative = 0.0
    grey: Probability = 0.0
    solarise: Probability = 0.0
    cutout: Amount = 0


class Features(Model):
    """The stage `features`: cached views of raw samples, `num_views` of each in train and val.

    0 leaves feature-level views only. The views have a seed of their own, so that all seeds share them. The
    signal strength is that of views of audio, series, skeletons, tables and video; where no encoder reads
    texts or signals, their views are drawn live at these strengths.
    """

    num_views: Amount = 4
    view_seed: int = 0
    image_strength: NonNegative = 1.0
    text_strength: NonNegative = 1.0
    signal_strength: NonNegative = 1.0


class WeightedRegulariser(Model):
    """A penalty of the mixing weights, and its weight in the loss of the architecture half-step."""

    weight: NonNegative
    function: Node


class Search(FitSettings):
    """The stage `search`.

    The architecture optimizer moves alpha, beta and gamma; for `warmup_epochs` only the weights move. Epochs
    are raised until there are `min_steps` weight steps, so that a search on a small share is not cut short.
    `regularisers` join the loss of the architecture half-step, each logged by its name here.

    Attributes:
        on: a label-free search trains weights on train and moves the architecture on val (`train_val`), or
            takes two random halves of train (`train`, as DARTS splits CIFAR). A supervised one always splits
            its labelled share.
        view_probability: share of the samples of a one-view objective's step that are views.
    """

    arch_optimizer: Optimizer
    regularisers: dict[str, WeightedRegulariser] = {}
    min_steps: Amount = 0
    warmup_epochs: Amount = 0
    on: Literal["train_val", "train"] = "train_val"
    view_probability: Probability = 0.0
    views: FeatureViews = FeatureViews()
    pixel_views: PixelViews = PixelViews()


class Pretrain(FitSettings):
    """The stage `pretrain`: contrastive, label-free; epochs 0 leaves it out."""

    objective: Node
    dropout: Probability | None = None
    evaluations: Count = 20
    views: FeatureViews = FeatureViews()
    pixel_views: PixelViews = PixelViews()


class Train(FitSettings):
    """The stage `train`: the classifier on the labelled share.

    Attributes:
        objective: the head's settings.
        min_steps: epochs are raised until there are so many steps, so that a small share is not undertrained.
        dropout: of the found network in this stage; null for the search space's.
        view_probability: share of the samples of a step that are views, not the sample itself.
        evaluations: how often the validation split is read, evenly spaced, the last epoch included.
        on: `train` selects on val; `train_val` trains on both and takes the last epoch.
    """

    objective: Node
    min_steps: Amount = 0
    dropout: Probability | None = None
    view_probability: Probability = 0.0
    evaluations: Count = 30
    on: Literal["train", "train_val"] = "train"
    views: FeatureViews = FeatureViews()
    pixel_views: PixelViews = PixelViews()


class Test(Model):
    """The stage `test`: `select` is the state that is tested; best_test is what some papers report."""

    select: Literal["validation", "best_test"] = "validation"


class Trainer(Model):
    """Hardware only; nothing here but `precision` and `devices` changes a result."""

    accelerator: Literal["cpu", "gpu"] = "cpu"
    devices: Count = 1
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    threads: Count | None = None
    checkpoint_seconds: NonNegative = 30
    deterministic: bool = True
    timeout_seconds: Positive = 600


class Logger(Model):
    """Where metrics go besides the CSV file."""

    name: Literal["csv", "wandb", "tensorboard"] = "csv"
    project: str = "mmnas_lab"
    mode: Literal["auto", "offline", "online"] = "auto"


class Config(Model):
    """The root. `conf/config.yaml` holds the defaults and says what each key does."""

    experiment: str
    scale: str
    seed: Amount
    labelled_share: float
    stages: list[StageName]
    baselines: list[str]
    random_draws: Count
    output: str
    dataset: Node
    backbone: Node
    search_space: Node
    objective: Node
    strategy: Node
    features: Features
    encoder_pretrain: Pretrain
    search: Search
    pretrain: Pretrain
    train: Train
    test: Test
    trainer: Trainer
    logger: Logger
