"""Few-shot, zero-shot and fine-tuning against oracles: scikit-learn, SciPy, open_clip, and formulas written out here."""

import json
import multiprocessing

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import REPO
from PIL import Image
from ranks import _start_server, small_config
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.distributed import TCPStore

from stablerep import arch
from stablerep.eval import finetune as ft
from stablerep.eval.datasets import PER_CLASS, Labelled
from stablerep.eval.features import extract
from stablerep.eval.fewshot import draw_episodes, fewshot
from stablerep.eval.finetune_config import FinetuneConfig
from stablerep.eval.zeroshot import class_names, class_weights, templates_for, zeroshot
from stablerep.methods import method_class
from stablerep.runtime import dist
from stablerep.runtime.errors import UsageError, WorkError
from stablerep.text import load_image_text, tokenize

FIVE = {"way": 5, "shot": 5, "queries": 15}


def clusters(spread, classes=8, each=30, width=128):
    """Features around one centre a class."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), each)
    centres = random.normal(size=(classes, width))
    return (centres[labels] + spread * random.normal(size=(len(labels), width))).astype(np.float32), labels


# Few-shot


def test_episodes_are_disjoint_whole_and_repeatable():
    labels = np.array([0] * 20 + [1] * 21 + [2] * 19 + [3] * 40)  # class 2 is too small for 5 + 15
    drawn = list(draw_episodes(labels, way=3, shot=5, queries=15, episodes=50, seed=3))
    for support, query in drawn:
        assert support.shape == (3, 5) and query.shape == (3, 15)
        assert len(np.unique(np.concatenate([support.ravel(), query.ravel()]))) == 60
        assert (labels[support] == labels[support[:, :1]]).all() and (labels[query] == labels[support[:, :1]]).all()
        assert sorted(labels[support[:, 0]]) == [0, 1, 3]
    again = draw_episodes(labels, way=3, shot=5, queries=15, episodes=50, seed=3)
    assert all((a == c).all() and (b == d).all() for (a, b), (c, d) in zip(drawn, again, strict=True))
    other = next(draw_episodes(labels, way=3, shot=5, queries=15, episodes=1, seed=4))
    assert (drawn[0][0] != other[0]).any()


def test_fewshot_equals_the_formulas_on_the_same_episodes():
    """Prototypes by distances written out; logistic regression by gradient descent on its convex loss."""
    features, labels = clusters(4.0)
    expected = {"prototype": [], "logistic": []}
    for support, query in draw_episodes(labels, episodes=20, seed=1, **FIVE):
        truth, s, q = np.repeat(np.arange(5), 5), features[support.ravel()], features[query.ravel()]
        centre = s.mean(0)
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s - centre, q - centre))
        prototypes = np.stack([a[truth == c].mean(0) for c in range(5)])
        nearest = ((b[:, None] - prototypes) ** 2).sum(2).argmin(1)
        expected["prototype"].append(100 * (nearest == np.repeat(np.arange(5), 15)).mean())
        a, b = (torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True)).double() for x in (s, q))
        weight, bias = (torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in ((128, 5), 5))
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss(a=a, weight=weight, bias=bias, truth=truth, optimizer=optimizer):
            optimizer.zero_grad()
            errors = nn.functional.cross_entropy(a @ weight + bias, torch.from_numpy(truth), reduction="sum")
            value = errors + 0.5 * (weight**2).sum()
            value.backward()
            return value

        optimizer.step(loss)
        found = (b @ weight + bias).argmax(1).detach().numpy()
        expected["logistic"].append(100 * (found == np.repeat(np.arange(5), 15)).mean())
    for kind, values in expected.items():
        score = fewshot(features, labels, episodes=20, seed=1, classifier=kind, **FIVE)
        assert 30 < score.value < 95, "the task is neither trivial nor hopeless"
        assert score.values == pytest.approx(values, abs=1.4), "at most one query in 75 falls on the other side of a tie"
        assert score.value == pytest.approx(np.mean(values), abs=0.2)


def test_fewshot_classifiers_agree_where_classes_are_apart_and_are_at_chance_without_signal():
    features, labels = clusters(0.1)
    for kind in ("logistic", "prototype"):
        assert fewshot(features, labels, episodes=10, seed=0, classifier=kind, **FIVE).values == [100.0] * 10
        noise = fewshot(np.random.default_rng(1).normal(size=(240, 8)), labels, episodes=100, seed=0, classifier=kind, **FIVE)
        assert abs(noise.value - 20) < 3


def test_fewshot_interval_is_students_over_episodes():
    features, labels = clusters(4.0)
    score = fewshot(features, labels, episodes=30, seed=0, **FIVE)
    low, high = scipy.stats.t.interval(0.95, 29, np.mean(score.values), scipy.stats.sem(score.values))
    assert (score.low, score.high) == pytest.approx((low, high)) and score.n == 30
    assert score.setting == {"way": 5, "shot": 5, "queries": 15, "classifier": "logistic"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"way": 9}, "8 classes"),
        ({"shot": 16}, "0 classes"),
        ({"way": 1}, "at least 2"),
        ({"classifier": "svm"}, "none of logistic"),
    ],
)
def test_fewshot_refuses_what_it_cannot_draw(change, words):
    features, labels = clusters(1.0)
    with pytest.raises(UsageError, match=words):
        fewshot(features, labels, episodes=1, seed=0, **{**FIVE, **change})


# Zero-shot


def language_run(folder, name="clip"):
    """RUN/final as training writes it, of an untrained method."""
    import stablerep.train

    torch.manual_seed(0)
    description = arch.describe("vit_micro", 16)
    method = method_class(name)(arch.create(description), small_config("-", "-", method=name, image_size=16))
    stablerep.train.save_final(folder, description, method)
    return method


@pytest.fixture
def plain_parameters(monkeypatch):
    """Without DeepSpeed the float32 master of a parameter is the parameter."""
    monkeypatch.setattr("stablerep.train.full_parameter", lambda p: p.detach())


@pytest.mark.parametrize("name", ["clip", "stablerep_plus"])
def test_text_tower_comes_back_as_it_was(tmp_path, plain_parameters, name):
    method = language_run(tmp_path, name)
    loaded = load_image_text(str(tmp_path))
    tokens, x = tokenize(["a photo of a cat", "ten hats"], 16), torch.randn(2, 3, 16, 16)
    assert not loaded.training
    assert loaded.encode_text(tokens).equal(method.image_text.eval().encode_text(tokens))
    assert loaded.image_projection.equal(method.image_text.image_projection)
    assert arch.load_encoder(str(tmp_path))(x).equal(method.encoder.eval()(x))
    assert load_image_text(str(tmp_path / "final" / "encoder.safetensors")).logit_scale.equal(loaded.logit_scale)


def test_runs_without_text_are_refused_in_one_line(tmp_path, plain_parameters):
    language_run(tmp_path / "simclr", "simclr")
    for path in (tmp_path / "simclr", tmp_path / "nothing"):
        with pytest.raises(UsageError, match="zeroshot needs a finished run of clip or stablerep_plus"):
            load_image_text(str(path))
    language_run(tmp_path / "clip")
    (tmp_path / "clip/final/image_text.safetensors").write_bytes(b"torn")
    with pytest.raises(UsageError, match="does not fit"):
        load_image_text(str(tmp_path / "clip"))


def test_zeroshot_equals_open_clip_and_numpy(tmp_path, plain_parameters):
    from open_clip.zero_shot_classifier import build_zero_shot_classifier

    language_run(tmp_path)
    tower = load_image_text(str(tmp_path))
    classes, templates = ["red cat", "dog", "hat"], ["a photo of a {}.", "a bad {}", "{}"]

    class Theirs(nn.Module):
        def encode_text(self, tokens, normalize):
            assert normalize
            return nn.functional.normalize(tower.encode_text(tokens), dim=-1)

    theirs = build_zero_shot_classifier(Theirs(), lambda texts: tokenize(texts, 16), classes, templates)
    ours = class_weights(tower, classes, templates, "cpu")
    assert torch.allclose(ours, theirs.T, atol=1e-6) and not ours.isnan().any()

    features = np.random.default_rng(0).normal(size=(300, 128)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 3, 300)
    images = features @ tower.image_projection.detach().numpy()
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    found = (images @ theirs.numpy()).argmax(1)
    score = zeroshot(tower, features, labels, classes, templates)
    assert score.value == pytest.approx(100 * (found == labels).mean()) and score.n == 300
    assert 0 < score.low < score.value < score.high < 100
    assert zeroshot(tower, features, found, classes, templates).value == 100
    score = zeroshot(tower, features, labels, classes, templates, metric=PER_CLASS)
    assert (score.metric, score.value) == (PER_CLASS, pytest.approx(100 * balanced_accuracy_score(labels, found)))


def test_templates_and_names():
    templates = templates_for("imagenet")
    assert len(templates) == 80 and all(t.count("{}") == 1 for t in templates) and templates[0] == "a bad photo of a {}."
    assert class_names("imagenet", [f"n{i:08d}" for i in range(1000)])[:2] == ["tench", "goldfish"]
    assert templates_for("pets")[0].format(class_names("pets", ["Maine_Coon"])[0]) == "a photo of a Maine Coon, a type of pet."
    assert templates_for("my own") == ["a photo of a {}."]


# Fine-tuning


def small_vit(width=48, depth=3, heads=3, patch=4):
    """A random ViT for 16 px. timm's initialisation is for widths of hundreds: narrow ones hardly see their input with it."""
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    model = arch.create({"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": args})
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    nn.init.normal_(model.pos_embed, std=0.5)
    return model


def fashion_at_16():
    """Training split, test split and class names of the bundled pictures, at half their size."""
    folder = REPO / "assets" / "fashion"
    arrays = np.load(folder / "fashion.npz")

    def split(part):
        grey = 255 - np.pad(arrays[f"{part}_images"], ((0, 0), (2, 2), (2, 2)))
        small = grey.reshape(-1, 16, 2, 16, 2).mean((2, 4)).astype(np.uint8)
        return Labelled(np.repeat(small[:, None], 3, axis=1), arrays[f"{part}_labels"].astype(np.int64))

    return split("train"), split("test"), json.loads((folder / "classes.json").read_text())


@pytest.fixture(scope="module")
def fashion():
    return fashion_at_16()


def few(split, count):
    """The first pictures of each class."""
    rows = np.concatenate([np.flatnonzero(split.labels == c)[:count] for c in np.unique(split.labels)])
    return Labelled(split.pictures[rows], split.labels[rows])


def test_learning_rates_fall_from_layer_to_layer():
    config = FinetuneConfig(layer_decay=0.5, weight_decay=0.1)
    model = ft.classifier(small_vit(), 10, config)
    optimizer = ft.make_optimizer(model, config, rate=1.0)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    depth = 3
    for name, p in model.named_parameters():
        group = of[id(p)]
        if name.startswith("head"):
            above = 0
        elif name.startswith("blocks"):
            above = depth - int(name.split(".")[1])
        elif name.startswith("norm"):
            above = 1  # beside the last block
        else:
            above = depth + 1  # patches, CLS token, positions
        assert group["lr_scale"] == pytest.approx(0.5**above), name
        assert group["weight_decay"] == (0.1 if p.ndim > 1 and name not in ("cls_token", "pos_embed") else 0.0), name
    schedule = ft.make_schedule(optimizer, FinetuneConfig(epochs=10, warmup_epochs=2), steps=5)
    for step, share in ((0, 0), (5, 0.5), (10, 1), (30, 0.5), (49, 0.5 * (1 + np.cos(np.pi * 39 / 40)))):
        schedule.step_update(step)
        assert all(g["lr"] == pytest.approx(share * g["lr_scale"]) for g in optimizer.param_groups)


def test_head_starts_near_zero_and_stochastic_depth_rises():
    model = ft.classifier(small_vit(), 10, FinetuneConfig(drop_path=0.2))
    assert [b.drop_path2.drop_prob for b in model.blocks] == pytest.approx([0, 0.1, 0.2])
    assert model.head.weight.abs().max() < 1e-3 and (model.head.bias == 0).all()


def test_mixed_targets_are_shares_of_the_mixed_pictures():
    config = FinetuneConfig(smoothing=0.1, cutmix=0.0)
    pictures = torch.eye(4)[:, :, None, None].expand(4, 4, 2, 2).clone()  # picture i is 1 in channel i
    np.random.seed(0)
    mixed, targets = ft.make_mixup(config, 4)(pictures, torch.arange(4))
    share = mixed[0, 0, 0, 0].item()
    assert 0 < share < 1
    smooth = 0.9 * np.eye(4) + 0.1 / 4
    assert targets.numpy() == pytest.approx(share * smooth + (1 - share) * smooth[::-1], abs=1e-6)
    plain, targets = ft.make_mixup(FinetuneConfig(mixup=0.0, cutmix=0.0), 4)(pictures.clone(), torch.arange(4))
    assert plain.equal(pictures) and targets.numpy() == pytest.approx(smooth, abs=1e-6)


def test_augmentation_is_a_function_of_seed_epoch_and_row(fashion):
    split, config = few(fashion[0], 2), FinetuneConfig()
    one, same, later = (ft.Augmented(split, config, epoch) for epoch in (0, 0, 1))
    first = one[5][0]
    one[0]
    assert same[5][0].equal(first) and one[5][0].equal(first) and not later[5][0].equal(first)

    class Files:
        """Pictures that are read when they are needed."""

        shape = split.pictures.shape

        def open(self, row):
            return Image.fromarray(split.pictures[row].transpose(1, 2, 0))

    assert ft.Augmented(Labelled(Files(), split.labels), config, 0)[5][0].equal(first)
    plain = FinetuneConfig(augment="", crop_min=1.0, erase=0.0)
    values = [ft.Augmented(split, plain, e)[3][0] for e in range(8)]  # crops of all: only the ratio and the flip are left
    assert values[0].shape == (3, 16, 16) and all(v.min() >= -1 and v.max() <= 1 for v in values)


def test_the_strongest_posterisation_is_black(fashion):
    """Magnitude 9 with deviation 0.5 comes to 10 now and then, where timm keeps no bit and Pillow raises."""
    config = FinetuneConfig(augment="rand-m10-mstd0-inc1")
    (policy,) = (step for step in ft.Augmented(fashion[0], config, 0).transform.transforms if hasattr(step, "ops"))
    (op,) = (op for op in policy.ops if op.name == "PosterizeIncreasing")
    op.prob = 1.0
    assert op(Image.new("RGB", (4, 4), (200, 200, 200))).getextrema() == ((0, 0),) * 3
    op.magnitude = 5
    assert op(Image.new("RGB", (4, 4), (200, 200, 200))).getextrema() == ((192, 192),) * 3


def test_batches_come_in_pairs_on_every_rank():
    config = FinetuneConfig(batch=64, micro_batch=12)
    assert ft.batch_sizes(config, 1000, 1) == (64, 8) and ft.batch_sizes(config, 1000, 4) == (64, 8)
    assert ft.batch_sizes(config, 27, 2) == (24, 12)
    for pictures, ranks, changes in ((1, 1, {}), (1000, 3, {}), (1000, 1, {"epochs": 5})):
        with pytest.raises(UsageError, match="fine-tuning"):
            ft.batch_sizes(FinetuneConfig(batch=64, **changes), pictures, ranks)


QUICK = {"epochs": 3, "batch": 64, "warmup_epochs": 1.0, "workers": 0, "lr": 8e-3}


def test_a_killed_finetuning_goes_on_exactly(fashion, tmp_path):
    train, test, classes = few(fashion[0], 20), few(fashion[1], 20), fashion[2]

    def run(folder, config=None, encoder=None, report=lambda line: None):
        config = config or FinetuneConfig(**QUICK)
        return ft.finetune(encoder or small_vit(), train, test, classes, config, "cpu", tmp_path / folder, report)

    class Killed(BaseException):
        pass

    def kill(line):
        raise Killed

    lines = []
    whole = run("whole", report=lines.append)
    with pytest.raises(Killed):
        run("cut", report=kill)
    assert torch.load(tmp_path / "cut/finetune.pt")["epoch"] == 1
    assert run("cut", report=lines.append) == whole
    assert len(lines) == 3 + 2 and "epoch 3/3" in lines[-1]
    weights = [torch.load(tmp_path / name / "finetune.pt")["model"] for name in ("whole", "cut")]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
    assert not weights[0]["blocks.0.attn.qkv.weight"].equal(small_vit().state_dict()["blocks.0.attn.qkv.weight"])
    assert run("cut") == whole, "what is done is only scored"

    other = small_vit()
    other.cls_token.data += 1
    for change in ({"config": FinetuneConfig(**{**QUICK, "lr": 1e-2})}, {"encoder": other}):
        with pytest.raises(UsageError, match="another encoder, labels or settings"):
            run("cut", **change)
    (tmp_path / "cut/finetune.pt").write_bytes(b"torn")
    with pytest.raises(UsageError, match="is broken"):
        run("cut")
    with pytest.raises(WorkError, match="not finite"):
        run("wild", FinetuneConfig(**{**QUICK, "lr": 1e30}))


def finetune_rank(rank, world, port, folder):
    """One rank of a fine-tuning without what depends on who mixes what."""
    store = TCPStore("127.0.0.1", port, world, is_master=False)
    dist.start(store, rank, world, local_rank=rank, gpus=0, timeout_s=120)
    plain_finetune(folder, lambda line: None)
    dist.finish()
    dist.skip_destructors()


def plain_finetune(folder, report):
    train, test, classes = fashion_at_16()
    config = FinetuneConfig(**{**QUICK, "epochs": 2, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0})
    score = ft.finetune(small_vit(), few(train, 20), few(test, 21), classes, config, "cpu", folder, report)
    (folder / f"score-{dist.rank()}.json").write_text(json.dumps([score.value, score.n]))


def test_two_ranks_compute_what_one_does(tmp_path):
    plain_finetune(tmp_path / "one", lambda line: None)
    context = multiprocessing.get_context("forkserver")
    _start_server(context)
    (tmp_path / "two").mkdir()
    store = TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    ranks = [context.Process(target=finetune_rank, args=(r, 2, store.port, tmp_path / "two"), daemon=True) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [p.exitcode for p in ranks] == [0, 0]
    one, two = (torch.load(tmp_path / name / "finetune.pt")["model"] for name in ("one", "two"))
    for name, value in one.items():
        if not name.endswith("qkv.bias"):  # keys' biases have no gradient but rounding, which AdamW blows up
            assert torch.allclose(value, two[name], atol=1e-4), name
    scores = [json.loads((tmp_path / f).read_text()) for f in ("one/score-0.json", "two/score-0.json", "two/score-1.json")]
    assert scores[0] == scores[1] == scores[2] and scores[0][1] == 210


def test_finetuning_beats_the_linear_probe(fashion, tmp_path):
    """Of a random encoder that training can only improve: one block, eight features. The encoder itself stays as it was."""
    train, test, classes = fashion
    encoder = small_vit(8, 1, 2, patch=8)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    features, test_features = (extract(encoder, split.pictures, "cpu") for split in (train, test))
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features, train.labels)
    probe = 100 * linear.score(test_features, test.labels)
    light = {"mixup": 0.0, "cutmix": 0.0, "augment": "", "crop_min": 1.0, "erase": 0.0, "drop_path": 0.0}
    config = FinetuneConfig(**{**QUICK, "epochs": 5, "batch": 32, "lr": 0.1, "warmup_epochs": 0.5, **light})
    score = ft.finetune(encoder, train, test, classes, config, "cpu", tmp_path, lambda line: None)
    assert score.value > probe + 10 and score.low < score.value < score.high and score.n == 2000
    assert score.setting["epochs"] == 5 and score.setting["mixup"] == 0.0 and score.setting["batch"] == 32
    assert all(v.equal(encoder.state_dict()[k]) for k, v in before.items()) and isinstance(encoder.head, nn.Identity)
