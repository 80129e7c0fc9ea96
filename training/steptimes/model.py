"""A fitted model as a document: kept as JSON, asked for step times with their intervals.

It is fitted once per cluster and table (`fit_model`), taught a new model from a profile of one GPU
(`with_profile`), and carried to another GPU type by a measured ratio (`on_other_gpu`). Without any
measurement, `cold_model` starts from the catalogue, and its interval says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.catalogue import GPU_TYPES
from training.errors import TrainingError
from training.spec import Workload
from training.steptimes.fit import Fitted, fit, prior
from training.steptimes.form import OWN, SHARED
from training.steptimes.intervals import COVERAGE, Calibration, calibrate
from training.steptimes.table import MODELS_MAX, Floats, StepTable, TableError
from training.throughput import BYTES_PER_PARAMETER

DOCUMENT_BYTES_MAX: Final = 64 * 1024 * 1024
SCORES_KEPT_MAX: Final = 2_000
# One standard deviation of a normal distribution becomes a two-sided 90 % interval.
NORMAL_90: Final = 1.645
# What the catalogue knows: within a factor of e^0.8 = 2.2 either way, for nine of ten models.
COLD_HALF_WIDTH_LOG: Final = 0.8
# Launches and data loading, of a step with a batch of the workload's size, where nothing is measured.
COLD_OVERHEAD_SHARE: Final = 0.1


class StepModelError(TrainingError):
    """A model file that cannot be read, or a question that it cannot answer."""

    code = "step_model.invalid"


@dataclass(frozen=True, slots=True)
class Shape:
    """Where a job would run inside a site; `node_gpus` are the GPUs of the fullest node."""

    nodes: int
    gpus: int
    batch: int
    node_gpus: int | None = None


@dataclass(frozen=True, slots=True)
class StepPrediction:
    """A step in seconds with the bounds of its interval; samples/s of the whole site with theirs."""

    step_s: float
    low_s: float
    high_s: float
    samples_per_s: float
    samples_per_s_low: float
    samples_per_s_high: float


@dataclass(frozen=True, slots=True)
class StepModel:
    """A fit and its calibration; `loose` says that parameters are open beyond what was calibrated."""

    fitted: Fitted
    calibration: Calibration
    loose: bool = False
    cold: bool = False

    def predict(self, name: str, shapes: Sequence[Shape], coverage: float = COVERAGE) -> list[StepPrediction]:
        """Return a prediction for each shape of one model; StepModelError where it is not known."""
        asked = question(self.fitted.models, name, shapes)
        step, half = self.predict_table(asked, coverage)
        samples = asked.batch * asked.gpus / step
        factor = np.exp(half)
        columns = (step, step / factor, step * factor, samples, samples / factor, samples * factor)
        return [StepPrediction(*(float(value) for value in row)) for row in zip(*columns, strict=True)]

    def predict_table(self, table: StepTable, coverage: float = COVERAGE) -> tuple[Floats, Floats]:
        """Return each row's predicted step in seconds, and the half-width of its interval in log."""
        step = self.fitted.predict(table)
        half = np.broadcast_to(self.calibration.half_width_log(table.model, table.nodes, coverage), step.shape)
        if self.cold:
            half = np.full(step.shape, COLD_HALF_WIDTH_LOG)
        elif self.loose:
            half = np.hypot(half, NORMAL_90 * self.fitted.doubt_log(table))
        return step, half

    def with_profile(self, table: StepTable) -> StepModel:
        """Return the model of this cluster for what `table` measured, such as one GPU for some seconds.

        The cluster's figures are kept; each model of `table` starts at their mean.
        """
        fitted = fit(table, held=self.fitted)
        scatter = np.full(len(table.models), float(np.exp(np.mean(np.log(self.calibration.scatter)))))
        return StepModel(fitted, replace(self.calibration, scatter=scatter), loose=True)

    def on_other_gpu(self, compute_ratio: float) -> StepModel:
        """Return the model on GPUs that compute `compute_ratio` times as fast, the network as it is."""
        if not (math.isfinite(compute_ratio) and compute_ratio > 0):
            message = f"a ratio of speeds must be above 0, not {compute_ratio}; measure one batch on both GPU types"
            raise StepModelError(message)
        own = self.fitted.own.copy()
        for name in ("overhead_s", "sample_s"):
            own[:, OWN.index(name)] -= math.log(compute_ratio)
        return replace(self, fitted=replace(self.fitted, own=own), loose=True)


def fit_model(table: StepTable, progress: Callable[[str], None] | None = None) -> StepModel:
    """Return the model fitted to and calibrated on all of `table`; `progress` hears each stage."""
    tell = progress or (lambda _stage: None)
    tell(f"fitting {len(table.models)} models to {len(table)} measurements")
    fitted = fit(table)
    return StepModel(fitted, calibrate(table, progress=tell))


def cold_model(name: str, workload: Workload, gpu_type: str) -> StepModel:
    """Return what the catalogue says of a workload on a GPU type, before anything is measured."""
    gpu = GPU_TYPES[gpu_type]
    step_s = workload.batch_per_gpu * workload.flops_per_sample / (gpu.peak_flops_per_s * gpu.achieved_share)
    transfer_s = workload.parameters * BYTES_PER_PARAMETER * 8 / gpu.intra_site_bits_per_s
    mean, shared = prior()
    own = mean.copy()
    known = {
        "overhead_s": COLD_OVERHEAD_SHARE * step_s,
        "sample_s": (1 - COLD_OVERHEAD_SHARE) * step_s / workload.batch_per_gpu,
        "transfer_s": transfer_s / 2,  # a ring moves up to twice the gradients
    }
    for column, figure in known.items():
        own[OWN.index(column)] = math.log(figure)
    size = len(OWN) + len(SHARED)
    fitted = Fitted((name,), own[None, :], mean, shared, step_s, np.zeros((size, size)))
    return StepModel(fitted, Calibration(np.empty(0), np.array([COLD_HALF_WIDTH_LOG]), 0.0, 1.0), cold=True)


def question(models: tuple[str, ...], name: str, shapes: Sequence[Shape]) -> StepTable:
    """Return shapes of one model as rows without measurements."""
    if name not in models:
        message = f"the model file knows nothing of {name!r}; it has {', '.join(models[:20])}: fit a table with it"
        raise StepModelError(message)
    for shape in shapes:
        fullest = shape.node_gpus or math.ceil(shape.gpus / max(shape.nodes, 1))
        if min(shape.nodes, shape.batch, fullest) < 1 or shape.gpus < shape.nodes or fullest * shape.nodes < shape.gpus:
            message = f"{shape.gpus} GPUs on {shape.nodes} nodes, {fullest} on the fullest, is no shape; correct it"
            raise StepModelError(message)
    columns = np.array(
        [(s.nodes, s.gpus, s.node_gpus or math.ceil(s.gpus / s.nodes), s.batch) for s in shapes], dtype=np.float64
    ).reshape(-1, 4)
    unknown = np.full(len(shapes), np.nan)
    index = np.full(len(shapes), models.index(name), dtype=np.int64)
    nodes, gpus, node_gpus, batch = (np.ascontiguousarray(column) for column in columns.T)
    return StepTable(models, index, ("",) * len(shapes), nodes, gpus, node_gpus, batch, unknown, unknown)


def renamed(table: StepTable, models: tuple[str, ...]) -> StepTable:
    """Return `table` with its models numbered as in `models`; TableError where one is missing."""
    unknown = sorted(set(table.models) - set(models))
    if unknown:
        message = f"the fit knows nothing of {', '.join(unknown)}; fit a table that has them, or leave them out"
        raise TableError(message)
    index = np.array([models.index(name) for name in table.models], dtype=np.int64)[table.model]
    return replace(table, models=models, model=index)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Number = Annotated[float, Field(ge=-1e12, le=1e12)]


class _Document(_Strict):
    format: Literal["hansa.step-model"]
    version: Literal[1]
    models: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(min_length=1, max_length=MODELS_MAX)
    own_names: list[str]
    shared_names: list[str]
    own: list[list[Number]]
    mean: list[Number | None]
    shared: list[Number]
    unit_s: float = Field(gt=0, le=1e6)
    covariance_root: list[list[Number]]
    scores: list[Annotated[float, Field(ge=0, le=1e6)]]
    scatter: list[Annotated[float, Field(gt=0, le=100)]]
    growth: float = Field(ge=0, le=100)
    nodes_max: float = Field(ge=1, le=1e6)
    loose: bool
    cold: bool


def dump(model: StepModel) -> str:
    """Return the model as JSON; the scores of its calibration are thinned to quantiles."""
    fitted, scores = model.fitted, model.calibration.scores
    if len(scores) > SCORES_KEPT_MAX:
        scores = np.quantile(scores, np.linspace(0, 1, SCORES_KEPT_MAX))
    values, vectors = np.linalg.eigh(fitted.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    document = _Document(
        format="hansa.step-model",
        version=1,
        models=list(fitted.models),
        own_names=list(OWN),
        shared_names=list(SHARED),
        own=fitted.own.tolist(),
        mean=[None if math.isnan(value) else float(value) for value in fitted.mean],
        shared=fitted.shared.tolist(),
        unit_s=fitted.unit_s,
        covariance_root=root.tolist(),
        scores=scores.tolist(),
        scatter=model.calibration.scatter.tolist(),
        growth=model.calibration.growth,
        nodes_max=model.calibration.nodes_max,
        loose=model.loose,
        cold=model.cold,
    )
    return document.model_dump_json() + "\n"


def load(text: str) -> StepModel:
    """Return the model in a document of `dump`; StepModelError says what is wrong with it."""
    if len(text) > DOCUMENT_BYTES_MAX:
        raise StepModelError("the model file is larger than any that fit writes; write it anew with `fit`")
    try:
        document = _Document.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        message = f"not a model file of `hansa throughput fit`: {where}: {first['msg']}; write it anew with `fit`"
        raise StepModelError(message) from None
    models, size = len(document.models), len(document.models) * len(OWN) + len(SHARED)
    lengths = (
        (tuple(document.own_names), OWN),
        (tuple(document.shared_names), SHARED),
        ([len(row) for row in document.own], [len(OWN)] * models),
        (len(document.mean), len(OWN)),
        (len(document.shared), len(SHARED)),
        ([len(row) for row in document.covariance_root], [size] * size),
        (len(document.scatter), models),
        (len(set(document.models)), models),
    )
    if any(found != due for found, due in lengths):
        raise StepModelError("the model file's columns do not fit together; write it anew with `fit`")
    root = np.array(document.covariance_root).reshape(size, size)
    mean = np.array([np.nan if value is None else value for value in document.mean])
    fitted = Fitted(
        tuple(document.models), np.array(document.own), mean, np.array(document.shared), document.unit_s, root @ root.T
    )
    calibration = Calibration(
        np.sort(np.array(document.scores)), np.array(document.scatter), document.growth, document.nodes_max
    )
    return StepModel(fitted, calibration, document.loose, document.cold)


def read_model(path: Path) -> StepModel:
    """Return the model in a file; StepModelError where it is none, OSError where it cannot be read."""
    try:
        return load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise StepModelError(f"{path.name} is no text; give the file that `hansa throughput fit` wrote") from None
