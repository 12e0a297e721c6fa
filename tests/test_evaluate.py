"""Scores, probes and evaluate.py against independent oracles."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import command, wait_for
from PIL import Image

from launch.evaluate import elements, evaluate
from stablerep import arch
from stablerep.eval.config import EvaluateConfig, FewshotConfig, KnnConfig, SgdConfig
from stablerep.eval.datasets import MEAN_AP, PER_CLASS, TOP_1, Files, Labelled, load
from stablerep.eval.encoders import open_encoder
from stablerep.eval.features import extract
from stablerep.eval.finetune_config import FinetuneConfig
from stablerep.eval.knn import neighbours, votes
from stablerep.eval.linear import DECADES, QUARTERS, _path, linear_scores
from stablerep.eval.linear_sgd import Heads, choose, hold_out, make_optimizer, sgd_scores, train_heads
from stablerep.eval.metrics import measure, value_of
from stablerep.eval.score import of_proportion, over_repetitions
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import read_jsonl, write_json


def test_intervals_are_those_of_scipy():
    from scipy.stats import binomtest, sem, t

    values = [40.0, 44.5, 43.0, 41.2, 47.9]
    score = over_repetitions(values, "top-1", 2000, {"labels_per_class": 10})
    low, high = t.interval(0.95, 4, loc=np.mean(values), scale=sem(values))
    assert (score.value, score.low, score.high) == pytest.approx((np.mean(values), low, high))
    for correct, n in ((0, 50), (13, 50), (50, 50), (1420, 2000)):
        score = of_proportion(correct, n, "top-1", {})
        expected = binomtest(correct, n).proportion_ci(0.95, "wilson")
        assert score.value == pytest.approx(100 * correct / n)
        assert (score.low, score.high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


def clouds(seed, n=60, width=6, classes=4, spread=1.0):
    """Features of n pictures a class around class means, float32, and labels."""
    means = np.random.default_rng(7).normal(size=(classes, width))
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), n)
    return (means[labels] + spread * random.normal(size=(len(labels), width))).astype(np.float32), labels


def eleven_points(scores, truth):
    """VOC2007's definition, word for word: at recalls 0, 0.1 .. 1 the best precision over all thresholds that reach it."""
    found = []
    for recall in range(11):
        best = 0.0
        for threshold in scores:
            taken = scores >= threshold
            if truth[taken].sum() / truth.sum() >= recall / 10 - 1e-12:
                best = max(best, truth[taken].mean())
        found.append(best)
    return sum(found) / 11


def test_eleven_point_map_is_that_of_voc2007():
    random = np.random.default_rng(0)
    labels = (random.random((80, 5)) < [0.5, 0.2, 0.05, 0.9, 0.3]).astype(np.int64)
    scores = random.normal(size=(80, 5)) + 1.5 * labels
    scores[:, 4] = scores[:, 4].round()  # with ties
    expected = [eleven_points(scores[:, c], labels[:, c]) for c in range(5)]
    assert value_of(MEAN_AP, scores, labels) == pytest.approx(100 * np.mean(expected))
    score = measure(MEAN_AP, scores, labels, {})
    assert score.low < score.value < score.high and score.n == 80


def test_mean_per_class_is_balanced_accuracy():
    from sklearn.metrics import balanced_accuracy_score

    random = np.random.default_rng(0)
    labels = random.choice([0, 1, 2, 4, 5], 300, p=[0.5, 0.3, 0.1, 0.07, 0.03])  # class 3 is in no test picture
    scores = random.normal(size=(300, 6)) + 2 * np.eye(6)[labels]
    scores[:, 3] = -np.inf
    expected = balanced_accuracy_score(labels, scores.argmax(1))
    assert value_of(PER_CLASS, scores, labels) == pytest.approx(100 * expected)
    score = measure(PER_CLASS, scores, labels, {})
    assert score.low < score.value < score.high and score.value != value_of(TOP_1, scores, labels)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5), (1000, 0.2)])
def test_knn_is_scikit_learns(k, temperature):
    from sklearn.neighbors import KNeighborsClassifier

    (train, labels), (test, _) = clouds(0), clouds(1)
    similarity, nearest = neighbours(train, test, k, "cpu")
    oracle = KNeighborsClassifier(min(k, len(train)), metric="cosine", weights=lambda d: np.exp((1 - d) / temperature))
    expected = oracle.fit(train, labels).predict_proba(test)
    scores = votes(similarity, labels[nearest], 4, temperature)
    assert np.allclose(scores / scores.sum(1, keepdims=True), expected, atol=1e-4)
    several = votes(similarity, np.eye(4, dtype=int)[labels][nearest], 4, temperature)
    assert np.allclose(several, scores)


def test_linear_probe_is_the_minimum_of_its_loss():
    """At the probe's solution for one C, the gradient of C * sum of cross-entropies + |W|^2 / 2 is zero (float64)."""
    from scipy.special import softmax
    from sklearn.preprocessing import StandardScaler

    (train, labels), (test, _) = clouds(0, spread=2.0), clouds(1, spread=2.0)
    train, test = train.astype(np.float64), test.astype(np.float64)
    scores = next(_path([0.1], (train, labels), test, 4))
    scaler = StandardScaler().fit(train)
    z = np.c_[scaler.transform(test), np.ones(len(test))]
    weights = np.linalg.lstsq(z, scores, rcond=None)[0]  # scores are linear in the features
    assert np.allclose(z @ weights, scores, atol=1e-8)
    x = np.c_[scaler.transform(train), np.ones(len(train))]
    error = softmax(x @ weights, axis=1) - np.eye(4)[labels]
    gradient = 0.1 * x.T @ error
    gradient[:-1] += weights[:-1]
    assert np.abs(gradient).max() < 0.02 * np.abs(0.1 * x.T @ np.eye(4)[labels]).max()


def test_linear_probe_chooses_on_val_and_refits_on_all():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train, val, test = clouds(0, 15, 40, spread=3.0), clouds(1, 150, 40, spread=3.0), clouds(2, 200, 40, spread=3.0)
    found = linear_scores(train, val, test[0], 4, TOP_1, 0)
    strengths = sorted({round(float(np.log10(c) * 4)) for d in DECADES for c in d * QUARTERS})
    values = {}
    for step in strengths:
        scaler = StandardScaler().fit(train[0])
        model = LogisticRegression(C=10 ** (step / 4), max_iter=2000).fit(scaler.transform(train[0]), train[1])
        values[step] = model.score(scaler.transform(val[0]), val[1])
    everything = np.concatenate([train[0], val[0]]), np.concatenate([train[1], val[1]])
    scaler = StandardScaler().fit(everything[0])
    agreeing = []
    for step in (s for s in strengths if values[s] >= max(values.values()) - 0.005):
        model = LogisticRegression(C=10 ** (step / 4), max_iter=2000).fit(scaler.transform(everything[0]), everything[1])
        agreeing.append((model.predict(scaler.transform(test[0])) == found.argmax(1)).mean())
    assert max(agreeing) > 0.995
    only_train = linear_scores(train, None, test[0], 4, TOP_1, 0)
    assert value_of(TOP_1, found, test[1]) > value_of(TOP_1, only_train, test[1]) + 5


def test_linear_probe_of_several_classes_a_picture():
    random = np.random.default_rng(0)
    labels = (random.random((400, 6)) < 0.3).astype(np.int64)
    features = (labels @ random.normal(size=(6, 16)) + 0.5 * random.normal(size=(400, 16))).astype(np.float32)
    scores = linear_scores((features[:200], labels[:200]), None, features[200:], 6, MEAN_AP, 0)
    assert value_of(MEAN_AP, scores, labels[200:]) > 90 > value_of(MEAN_AP, np.roll(scores, 1, axis=1), labels[200:])


def test_sgd_heads_follow_their_formula():
    """Momentum SGD with a cosine schedule against NumPy, for one rate without and with standardised features."""
    torch.manual_seed(0)
    (x, y), steps, batch, rate = clouds(0, 16), 5, 64, 0.3
    heads = Heads(6, 4, [rate])
    start = [[p.detach().double().numpy().copy() for p in head.parameters()] for head in heads.linear]
    train_heads([(torch.from_numpy(x), torch.from_numpy(y))] * steps, heads, make_optimizer(heads, batch), steps)
    for head, (weight, bias), norm in zip(heads.linear, start, (False, True), strict=True):
        features = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6) if norm else x
        speed = [np.zeros_like(weight), np.zeros_like(bias)]
        for step in range(steps):
            logits = features @ weight.T + bias
            p = np.exp(logits - logits.max(1, keepdims=True))
            error = (p / p.sum(1, keepdims=True) - np.eye(4)[y]) / len(y)
            speed = [0.9 * v + g for v, g in zip(speed, (error.T @ features, error.sum(0)), strict=True)]
            now = rate * batch / 256 * 0.5 * (1 + np.cos(np.pi * step / steps))
            weight, bias = weight - now * speed[0], bias - now * speed[1]
        assert np.allclose(head.weight.detach(), weight, atol=1e-5) and np.allclose(head.bias.detach(), bias, atol=1e-5)


def test_held_out_pictures_choose_among_the_heads():
    heads = Heads(6, 4, [0.1, 0.2])
    x, y = clouds(0)
    for head in heads.linear:
        torch.nn.init.zeros_(head.weight)
    with torch.no_grad():
        means = torch.stack([torch.from_numpy(x[y == c].mean(0)) for c in range(4)])
        heads.linear[1].weight.copy_(means)
    best, value = choose(heads, x, y, TOP_1, "cpu")
    assert heads.names[best] == (0.2, False) and value == 100 * ((x @ means.numpy().T).argmax(1) == y).mean()
    kept, held = hold_out(Labelled(np.zeros((240, 3, 2, 2), np.uint8), y), 0)
    assert len(held) == 24 and np.bincount(held.labels).tolist() == [6] * 4 and len(kept) == 216


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A small encoder in final/ form, randomly initialised."""
    folder = tmp_path_factory.mktemp("encoder")
    description = arch.describe("vit_micro", 32)
    description["model_args"] |= {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 4}
    torch.manual_seed(0)
    arch.save_final(folder, description, {"encoder": arch.create(description).state_dict()})
    return folder


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """FOLDER/{train,test}/<class>/*.png: pictures of two kinds of stripes."""
    folder, random = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 12)):
        for label, name in enumerate(("across", "down")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                wave = 60 * np.sin(np.arange(32) * random.uniform(0.6, 1.2) + random.uniform(0, 6))
                grey = np.broadcast_to(wave[:, None], (32, 32)) if label == 0 else np.broadcast_to(wave, (32, 32))
                rgb = np.repeat((128 + grey + random.normal(0, 10, (32, 32)))[..., None], 3, 2).clip(0, 255).astype(np.uint8)
                Image.fromarray(rgb).save(folder / part / name / f"{i}.png")
    return folder


def config_of(encoder, dataset, out, **changes):
    words = {"protocol": ["linear", "knn"], "labels": [5, 0], "resamples": 2, "random_encoders": 1, "device": "cpu"}
    return EvaluateConfig(checkpoint=[str(encoder)], dataset=[str(dataset)], out=str(out), **{**words, **changes})


def test_results_are_appended_once_and_features_kept(encoder, stripes, tmp_path, capsys):
    config = config_of(encoder, stripes, tmp_path)
    found = evaluate(config)
    lines = list(read_jsonl(tmp_path / "results.jsonl"))
    assert found == lines and len(lines) == 8
    first, random = lines[0], lines[4]
    assert first["checkpoint"] == str(encoder) and first["run"] is None and first["dataset"] == str(stripes)
    assert first["setting"] == {"labels_per_class": 5} and len(first["values"]) == 2 and first["metric"] == "top-1"
    assert lines[1]["setting"] == {"labels_per_class": "all"} and lines[3]["setting"] == {
        "labels_per_class": "all", "k": 20, "temperature": 0.07
    }  # fmt: skip
    assert random["checkpoint"] == "random-0" and random["method"] == "random"
    assert all(r["low"] <= r["value"] <= r["high"] and r["n"] == 24 and len(r["commit"]) >= 40 for r in lines)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "features").iterdir()}
    assert len(files) == 4  # two encoders, two splits
    again = evaluate(config)
    assert again == lines == list(read_jsonl(tmp_path / "results.jsonl")) and "was there" in capsys.readouterr().out
    more = evaluate(
        config_of(encoder, stripes, tmp_path, protocol=["knn"], labels=[0], random_encoders=0, knn=KnnConfig([1], [0.1]))
    )
    assert [r["setting"]["k"] for r in more] == [1] and len(list(read_jsonl(tmp_path / "results.jsonl"))) == 9
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "features").iterdir()}


def test_features_are_the_encoders(encoder, stripes):
    model = arch.load_encoder(str(encoder))
    split = load(str(stripes), 32).test
    x = torch.from_numpy(split.pictures[:]).float() / 127.5 - 1
    with torch.no_grad():
        assert np.allclose(extract(model, split.pictures, "cpu", batch=5), model(x).numpy(), atol=1e-5)
        assert np.allclose(extract(model, split.pictures[:], "cpu", workers=2), model(x).numpy(), atol=1e-5)


def test_linear_by_sgd_learns_from_crops(encoder, stripes, tmp_path, capsys):
    config = config_of(
        encoder, stripes, tmp_path, protocol=["linear"], labels=[0], random_encoders=0, solver="sgd",
        sgd=SgdConfig(epochs=15, batch=12, rates=[0.1, 1.0], crop_min=0.5),
    )  # fmt: skip
    (record,) = evaluate(config)
    assert record["low"] > 50 and record["setting"]["solver"] == "sgd" and record["setting"]["epochs"] == 15
    assert "epoch 15/15" in capsys.readouterr().out
    (other,) = evaluate(dataclasses.replace(config, solver="lbfgs"))
    assert other["setting"] == {"labels_per_class": "all"}, "another solver's number is another number"


def test_linear_by_sgd_goes_on_where_it_was_killed(encoder, stripes, tmp_path):
    config, data, opened = SgdConfig(epochs=4, batch=12, rates=[0.1, 1.0]), load(str(stripes), 32), open_encoder(str(encoder))
    said = []

    def probe(folder, stop=None):
        def report(line):
            said.append(line)
            if stop and f"epoch {stop}/" in line:
                raise KeyboardInterrupt

        features = lambda split: extract(opened.model, split.pictures, "cpu")  # noqa: E731
        return sgd_scores(opened, data, features, config, 0, "cpu", 0, tmp_path / folder, report)

    whole = probe("whole")
    with pytest.raises(KeyboardInterrupt):
        probe("cut", stop=2)
    said.clear()
    assert np.array_equal(probe("cut"), whole) and "epoch 3/4" in said[0]


def test_a_finetuning_with_other_settings_is_another_number(encoder, stripes, tmp_path):
    quick = FinetuneConfig(epochs=1, batch=20, warmup_epochs=0.5, workers=0, mixup=0, cutmix=0, augment="")
    found = []
    for changes in ({}, {"lr": 2e-3}, {"batch": 10}, {"micro_batch": 10}):
        config = config_of(
            encoder, stripes, tmp_path, protocol=["finetune"], random_encoders=0,
            finetune=dataclasses.replace(quick, **changes),
        )  # fmt: skip
        found += [r["setting"] for r in evaluate(config)]
    assert [(s["lr"], s["batch"]) for s in found] == [(1e-3, 20), (2e-3, 20), (1e-3, 10), (1e-3, 20)]
    assert len(list(read_jsonl(tmp_path / "results.jsonl"))) == 3 and found[3] == found[0], "the memory that it takes is none"


def test_uncompressed_pictures_of_one_size_are_told_apart(tmp_path):
    digests = set()
    for shade in (10, 200):
        (tmp_path / str(shade)).mkdir()
        Image.new("RGB", (8, 8), (shade, shade, shade)).save(tmp_path / str(shade) / "0.bmp")
        digests.add(Files(["0.bmp"], 8, str(tmp_path / str(shade))).digest())
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "no valid JSON"), ("[]", "names no `architecture`"), ('{"architecture": "vit_none"}', "vit_none does not work"),
     ('{"architecture": "vit_tiny_patch16_224"}', "does not fit its config.json")],
)  # fmt: skip
def test_a_checkpoint_of_another_architecture_is_one_line(encoder, stripes, tmp_path, text, words):
    (tmp_path / "encoder.safetensors").write_bytes((encoder / "encoder.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=words) as error:
        evaluate(config_of(tmp_path, stripes, tmp_path / "x"))
    assert "\n" not in str(error.value) and not (tmp_path / "x").exists()


def test_a_timm_model_takes_our_range(tmp_path):
    """Folding timm's mean and std into the patch embedding changes no output."""
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=1).eval()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {
        "architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": {"img_size": 32, "depth": 1},
        "pretrained_cfg": {"mean": mean, "std": std, "input_size": [3, 32, 32]},
    })  # fmt: skip
    ours = open_encoder(str(tmp_path))
    pictures = torch.rand(2, 3, 32, 32)
    theirs = (pictures - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(ours.model(2 * pictures - 1), model(theirs), atol=1e-4)
    assert ours.size == 32 and ours.folder == tmp_path


def test_a_hub_out_of_reach_is_one_line(stripes, tmp_path):
    done = command(
        "launch/evaluate.py", "--checkpoint", "vit_tiny_patch16_224", "--dataset", stripes, "--out", tmp_path,
        "--random-encoders", "0", "--cluster", "local", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert done.returncode == 2 and "hub" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol": ["lineer"]}, "none of linear"),
        ({"solver": "adam"}, "none of auto"),
        ({"labels": [3]}, "at least 5"),
        ({"protocol": ["zeroshot"], "random_encoders": 0}, "text tower"),
        ({"device": "cuda"}, "not there"),
        ({"protocol": ["fewshot"], "fewshot": FewshotConfig(classifier="svm")}, "none of logistic"),
        ({"knn": KnnConfig([0], [0.1])}, "positive"),
    ],
)
def test_bad_requests_are_one_line(encoder, stripes, tmp_path, changes, words):
    with pytest.raises(UsageError, match=words) as error:
        evaluate(config_of(encoder, stripes, tmp_path / "x", **changes))
    assert "\n" not in str(error.value) and not (tmp_path / "x").exists()


def test_two_ranks_score_as_one(encoder, stripes, tmp_path):
    """Real processes: each encodes a share; SGD sees the same crops in the same order."""
    from launch.cluster import Shape, load_cluster, submit
    from launch.job import EvaluateTask
    from stablerep.runtime.events import read_events

    changes = {
        "protocol": ["linear", "knn", "finetune"], "labels": [0], "random_encoders": 0,
        "sgd": SgdConfig(epochs=2, batch=12, rates=[0.1], crop_min=0.5),
        "finetune": FinetuneConfig(epochs=1, batch=8, warmup_epochs=0, workers=0, augment=""),
    }  # fmt: skip
    config = config_of(encoder, stripes, tmp_path / "two", **changes)
    run = tmp_path / "two/evaluations"
    tasks = [EvaluateTask(str(run), s, dataclasses.replace(config, solver=s), 0) for s in ("lbfgs", "sgd")]
    submit(load_cluster("local"), run, Shape("evaluate", tasks_per_node=2), tasks, fresh=False)
    alone = [r for s in ("lbfgs", "sgd") for r in evaluate(config_of(encoder, stripes, tmp_path / "one", solver=s, **changes))]
    wait_for(lambda: len(list(read_events(run))) >= 2, 240, "two evaluations")
    assert {e["event"] for e in read_events(run)} == {"evaluated"}, list(read_events(run))
    together = list(read_jsonl(tmp_path / "two/results.jsonl"))
    pick = {(r["protocol"], r["setting"].get("solver")): r for r in together}
    assert len(pick) == 4 == len({(r["protocol"], r["setting"].get("solver")) for r in alone})
    for r in alone:
        other = pick[r["protocol"], r["setting"].get("solver")]
        assert other["setting"] == r["setting"] and other["dataset_sha256"] == r["dataset_sha256"]
        if r["protocol"] != "finetune":  # whose batches the ranks augment apart
            assert abs(other["value"] - r["value"]) <= 100 / 24 + 1e-6  # at most one picture lies at the border
    for path in (tmp_path / "one/features").iterdir():
        assert np.allclose(np.load(path), np.load(tmp_path / "two/features" / path.name), atol=1e-5)


@pytest.fixture
def language_run(tmp_path):
    """A run folder of CLIP as train.py leaves it, untrained, on a generation run."""
    from ranks import small_config

    from stablerep.methods import method_class
    from stablerep.runtime.config import to_yaml

    images, run = tmp_path / "images", tmp_path / "run"
    write_json(images / "plan.json", {"hash": "ab" * 32, "captions_sha256": "cd" * 32})
    (images / "config.yaml").write_text("captions: [/lists/cc12m.parquet]\nguidance_scale: 2.0\nmodel: sd\n")
    config = small_config(images, run, method="clip", seed=3)
    description = arch.describe("vit_micro", 32)
    torch.manual_seed(0)
    method = method_class("clip")(arch.create(description), config)
    held = {**description, "image_text": method.image_text.description}
    arch.save_final(
        run / "final", held, {p: m.state_dict() for p, m in (("encoder", method.encoder), ("image_text", method.image_text))}
    )
    (run / "config.yaml").write_text(to_yaml(config))
    write_json(run / "train.json", {"steps": 12, "ranks": 1})
    write_json(run / "index/index.json", {"sources": [{"name": str(images), "captions": 80, "images": 640}]})
    (run / "code/0123").mkdir(parents=True)
    (run / "code/0123/commit.txt").write_text("f00d\n")
    return run


def test_a_number_is_traced_to_its_captions(language_run, stripes, tmp_path):
    config = EvaluateConfig(
        checkpoint=[str(language_run)], protocol=["zeroshot", "fewshot"], dataset=[str(stripes)], random_encoders=0,
        device="cpu", fewshot=FewshotConfig(way=2, shot=[1, 2], queries=3, episodes=10),
    )  # fmt: skip
    zeroshot, one, two = evaluate(config)
    assert list(read_jsonl(language_run / "results.jsonl")) == [zeroshot, one, two]
    assert (zeroshot["method"], zeroshot["arch"], zeroshot["seed"], zeroshot["step"]) == ("clip", "vit_micro", 3, 12)
    assert zeroshot["run"] == str(language_run) and zeroshot["run_commit"] == "f00d" and zeroshot["n"] == 24
    assert (one["setting"]["shot"], two["setting"]["shot"], one["n"], len(two["values"])) == (1, 2, 10, 10)
    (data,) = zeroshot["data"]
    assert data["captions"] == ["/lists/cc12m.parquet"] and data["guidance_scale"] == 2.0 and data["kind"] == "generated"
    assert data["plan_sha256"] == "ab" * 32 and data["n_captions"] == 80 and data["n_images"] == 640


def test_the_array_has_an_element_for_each_checkpoint_and_data_set():
    config = EvaluateConfig(checkpoint=["a", "b"], dataset=["dtd", "pets"])
    found = [(e.checkpoint, e.dataset, e.random_encoders) for e in elements(config)]
    assert found == [(["a"], ["dtd"], 3), (["a"], ["pets"], 3), (["b"], ["dtd"], 0), (["b"], ["pets"], 0)]
