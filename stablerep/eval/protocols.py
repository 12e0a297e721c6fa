"""The numbers that a protocol gives for one encoder and data set: each has a name (its setting) before it is computed."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stablerep.eval.config import EvaluateConfig
from stablerep.eval.datasets import Dataset, Files, Labelled
from stablerep.eval.encoders import Encoder
from stablerep.eval.features import Features
from stablerep.eval.fewshot import fewshot
from stablerep.eval.finetune import finetune, setting_of
from stablerep.eval.knn import neighbours, votes
from stablerep.eval.linear import Pair, linear_scores
from stablerep.eval.linear_sgd import sgd_scores
from stablerep.eval.metrics import measure
from stablerep.eval.score import Score, over_repetitions
from stablerep.eval.zeroshot import class_names, templates_for, zeroshot
from stablerep.runtime import dist
from stablerep.runtime.errors import UsageError

ALL: tuple[str, ...] = ("train", "val", "test")


@dataclass
class Number:
    """A number to be computed: what names it, and how many repetitions it is the mean of. Where it `needs` the features of
    splits, rank 0 computes it once they are there; else all ranks do together."""

    setting: dict[str, Any]
    repetitions: int
    compute: Callable[[], Score]
    needs: tuple[str, ...] = ()
    scratch: Path | None = None  # what it goes on from where it was cut off, of no use once it is there


@dataclass
class Subject:
    """What is scored, on what, and where."""

    encoder: Encoder
    data: Dataset
    features: Features
    config: EvaluateConfig
    device: str
    scratch: Path  # folder of what is resumed
    report: Callable[[str], None]
    note: Callable[[str], None]


def numbers(protocol: str, subject: Subject) -> Iterator[Number]:
    """All numbers of a protocol. Raises UsageError where it does not fit the encoder or the data set."""
    return {"linear": _linear, "knn": _knn, "fewshot": _fewshot, "zeroshot": _zeroshot, "finetune": _finetune}[protocol](
        subject
    )


def _linear(subject: Subject) -> Iterator[Number]:
    config = subject.config
    for count in _counts(subject):
        solver = config.solver
        if solver == "auto":
            solver = "sgd" if subject.data.name == "imagenet" and not count else "lbfgs"
        setting: dict[str, Any] = {"labels_per_class": count or "all"}
        scores_of: Callable[[Subject, int, int], np.ndarray] = _lbfgs
        needs, scratch = ALL, None
        if solver == "sgd":
            setting |= {"solver": "sgd", **asdict(config.sgd)}
            needs, scratch = (), _scratch(subject, setting)
            scores_of = partial(_sgd, folder=scratch)
        draws = config.resamples if count else 1
        yield Number(setting, draws, partial(_drawn, subject, count, draws, scores_of, setting), needs, scratch)


def _lbfgs(subject: Subject, count: int, draw: int) -> np.ndarray:
    data, features = subject.data, subject.features
    rows = sample(data.train.labels, count, draw)
    val = (features.of(data.val), data.val.labels) if data.val is not None and not count else None
    train: Pair = (features.of(data.train)[rows], data.train.labels[rows])
    return linear_scores(train, val, features.of(data.test), len(data.classes), data.metric, draw)


def _sgd(subject: Subject, count: int, draw: int, *, folder: Path) -> np.ndarray:
    data, config = subject.data, subject.config
    if count:
        train = data.train.take(sample(data.train.labels, count, draw))
        data = Dataset(data.name, train, data.test, None, data.classes, data.metric)
    place, workers = folder / str(draw), config.workers
    return sgd_scores(
        subject.encoder, data, subject.features.of, config.sgd, draw, subject.device, workers, place, subject.report
    )


def _scratch(subject: Subject, setting: dict[str, Any]) -> Path:
    """A folder of one number's own."""
    what = json.dumps([subject.encoder.weights, subject.data.sha256, setting], sort_keys=True)
    return subject.scratch / hashlib.sha256(what.encode()).hexdigest()[:16]


def _drawn(
    subject: Subject, count: int, draws: int, scores_of: Callable[[Subject, int, int], np.ndarray], setting: dict[str, Any]
) -> Score:
    """One draw with its interval over test pictures, or the mean over several with Student's."""
    data = subject.data
    found = [measure(data.metric, scores_of(subject, count, draw), data.test.labels, setting) for draw in range(draws)]
    return found[0] if draws == 1 else over_repetitions([s.value for s in found], data.metric, len(data.test), setting)


def _knn(subject: Subject) -> Iterator[Number]:
    config = subject.config.knn
    for count in _counts(subject):
        draws = subject.config.resamples if count else 1
        for k in config.k:
            for temperature in config.temperature:
                setting = {"labels_per_class": count or "all", "k": k, "temperature": temperature}
                scores_of = partial(_vote, k=k, temperature=temperature)
                yield Number(setting, draws, partial(_drawn, subject, count, draws, scores_of, setting), ALL)


def _vote(subject: Subject, count: int, draw: int, *, k: int, temperature: float) -> np.ndarray:
    data = subject.data
    rows, labels, features = sample(data.train.labels, count, draw), data.train.labels, subject.features.of(data.train)
    if data.val is not None and not count:
        features = np.concatenate([features, subject.features.of(data.val)])
        labels = np.concatenate([labels, data.val.labels])
        rows = np.arange(len(labels))
    similarity, nearest = neighbours(features[rows], subject.features.of(data.test), k, subject.device)
    return votes(similarity, labels[rows][nearest], len(data.classes), temperature)


def _fewshot(subject: Subject) -> Iterator[Number]:
    config, test = subject.config.fewshot, _one_class("fewshot", subject).test
    for shot in config.shot:
        words: dict[str, Any] = {"way": config.way, "shot": shot, "queries": config.queries, "classifier": config.classifier}

        def compute(words: dict[str, Any] = words) -> Score:
            return fewshot(subject.features.of(test), test.labels, **words, episodes=config.episodes, seed=0)

        yield Number(words, config.episodes, compute, ("test",))


def _zeroshot(subject: Subject) -> Iterator[Number]:
    from stablerep.text import load_image_text

    data = _one_class("zeroshot", subject)
    if subject.encoder.run is None:
        raise UsageError(f"zeroshot needs a run that was trained beside a text tower: {subject.encoder.name} is none")
    tower = load_image_text(str(subject.encoder.run))
    templates = templates_for(data.name)

    def compute() -> Score:
        names = class_names(data.name, data.classes)
        return zeroshot(tower, subject.features.of(data.test), data.test.labels, names, templates, subject.device, data.metric)

    yield Number({"templates": len(templates)}, 1, compute, ("test",))


def _finetune(subject: Subject) -> Iterator[Number]:
    data, config = _one_class("finetune", subject), subject.config.finetune
    train = data.train if data.val is None else _join(data.train, data.val)
    named = setting_of(config, len(train), dist.world())
    folder = _scratch(subject, named)

    def compute() -> Score:
        model, classes, device = subject.encoder.model, data.classes, subject.device
        return finetune(model, train, data.test, classes, config, device, folder, subject.report, data.metric)

    yield Number(named, 1, compute, scratch=folder)


def _join(a: Labelled, b: Labelled) -> Labelled:
    labels = np.concatenate([a.labels, b.labels])
    if not isinstance(a.pictures, Files):
        return Labelled(np.concatenate([a.pictures, b.pictures]), labels)
    files = [str(Path(p.root) / item) if isinstance(item, str) else item for p in (a.pictures, b.pictures) for item in p.items]
    return Labelled(Files(files, a.pictures.size, "", a.pictures.margin), labels)


def sample(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` rows of each class (0: all rows); a function of its arguments, whatever the encoder."""
    if not count:
        return np.arange(len(labels))
    random = np.random.default_rng(seed)
    return np.concatenate([random.permutation(np.flatnonzero(labels == c))[:count] for c in np.unique(labels)])


def _counts(subject: Subject) -> list[int]:
    """The label counts that the training split can give; says which it cannot."""
    labels, kept = subject.data.train.labels, []
    fewest = int(np.bincount(labels).min()) if labels.ndim == 1 else 0
    for count in subject.config.labels:
        if count <= fewest or not count:
            kept.append(count)
        else:
            why = f"a class has {fewest} pictures" if labels.ndim == 1 else "a picture shows several classes"
            subject.note(f"{subject.data.name}: no number with {count} labels a class, {why}")
    return kept


def _one_class(protocol: str, subject: Subject) -> Dataset:
    if subject.data.train.labels.ndim == 2:
        raise UsageError(f"{protocol} needs one class a picture: {subject.data.name} has several")
    return subject.data
