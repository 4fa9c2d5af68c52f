"""Training for segmentation and detection: steps, resuming, processes, checkpoints of other tasks."""

import copy
import csv
import io
import json
import signal
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import mvit3_kernels
from mvit3 import checkpoint
from mvit3.cli import main
from mvit3.config import TrainConfig
from mvit3.data.targets import IGNORED
from mvit3.names import task_of
from mvit3.network import build_model
from mvit3.options import UsageError
from mvit3.scores import SCORES
from mvit3_kernels.tasks import assign, ssd_loss

from ..replay import FakeRecorder
from .conftest import process, small_config
from .dense import SIZE, TASKS, arguments, config, options, trainer
from .test_mvit3_survival import equal, wait_for

PLAIN = {"name": "momentum", "lr": 0.05, "momentum": 0.0, "weight_decay": 0.0, "clip_grad": 0.3}


def plain_loss(task, model, images, targets):
    """With whole logits, and image by image."""
    if task == "segmentation":
        logits, auxiliary = model(images)
        losses = (
            F.cross_entropy(F.interpolate(one, targets.shape[1:], mode="bilinear", align_corners=True), targets)
            for one in (logits, auxiliary)
        )
        return sum(weight * loss for weight, loss in zip((1.0, 0.4), losses, strict=True))
    scores, offsets = model(images)
    present = [labels > 0 for labels in targets.labels]
    boxes, labels = ([one[p] for one, p in zip(part, present, strict=True)] for part in targets)
    return ssd_loss(scores, offsets, assign(boxes, labels, model.anchors(images.shape[2:])))


@pytest.mark.parametrize("task", TASKS)
def test_step_against_plain_modules(task):
    """Accumulation, the auxiliary head, clipping and the update of two batches, written out with PyTorch's own."""
    ours = trainer(task, optimizer=PLAIN, run={"accumulate": 2})
    model = copy.deepcopy(ours.model).train()
    batches = list(ours.loaders.train.epoch(0))[:2]
    with mvit3_kernels.backend("reference"):
        loss = sum(plain_loss(task, model, *batch) for batch in batches) / 2
        loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert gradient.norm() > 0.3
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    ours.train_epoch()  # a step of two batches
    assert ours.last_loss == pytest.approx(float(loss.detach()), rel=1e-5)
    moved = before - torch.cat([p.detach().flatten() for p in ours.model.parameters()])
    expected = 0.3 / gradient.norm() * gradient * ours.schedule.rate
    assert (moved - expected).norm() < 2e-3 * expected.norm()


def test_a_batch_without_a_labelled_pixel_counts_0():
    one = trainer("segmentation")
    images, labels = next(one.loaders.train.epoch(0))
    loss = one.criterion(one.task.network(one.model)(images), torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss == 0 and not any(p.grad.any() for p in one.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("task", TASKS)
def test_step_as_a_graph(task):
    """The criterion and what is called in training can be recorded; the recorder plays the part of CUDA graphs."""
    changes = {"run": {"ops": "reference"}, "optimizer": {"name": "momentum", "lr": 0.01, "clip_grad": 1.0}}
    plain, graphed = trainer(task, **changes), trainer(task, **changes)
    graphed._wrap()
    recorder = FakeRecorder()
    graphed._graph = mvit3_kernels.cuda_graph_step(
        graphed.network, graphed.criterion, graphed.optimizer, max_norm=1.0, warmup=1, recorder=recorder
    )
    for one in (plain, graphed):
        one.train_epoch()
    assert (recorder.records, recorder.replays) == (1, 2)
    assert graphed.progress.loss_sum == pytest.approx(plain.progress.loss_sum, rel=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_called_compiles(task):
    """In one graph, without the up-sampled logits."""
    one = trainer(task, run={"ops": "reference"})
    network = one.task.network(one.model)
    images, targets = one.criterion.mix(*next(one.loaders.train.epoch(0)))
    want = one.criterion(network(images), targets)
    network.compile(backend="eager", fullgraph=True)
    assert torch.equal(one.criterion(network(images), targets), want)


@pytest.mark.parametrize("task", TASKS)
def test_killed_run_ends_as_an_uninterrupted_one(task, tmp_path):
    """SIGKILL loses the steps since the last checkpoint and nothing else, to the last bit."""
    folder, more = tmp_path / "broken", ("--run.save_steps=1", "--quiet")
    running = process(*arguments(task, folder, *more))
    wait_for(folder / "last.pt", running)
    running.kill()
    assert running.wait(60) == -signal.SIGKILL
    assert 1 <= checkpoint.latest(folder, print)["progress"]["step"] < 6
    assert main(arguments(task, folder, *more)) == 0
    assert main(arguments(task, tmp_path / "whole", *more)) == 0
    broken, whole = (checkpoint.load(one / "last.pt") for one in (folder, tmp_path / "whole"))
    for part in ("state_dict", "ema_state_dict", "optimizer"):
        assert equal(broken[part], whole[part]), part
    progress = [{key: one["progress"][key] for key in ("classes", "samples", "best")} for one in (broken, whole)]
    assert equal(*progress)


@pytest.mark.parametrize("task", TASKS)
def test_two_processes(task, tmp_path, capsys):
    """Two processes learn what one does that adds up both batches, whose scenes are the same; and one process finds
    the scores that both have found together."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mvit3")
    changes = {"optimizer": {**PLAIN, "clip_grad": 0.0}, "data": {"batch_size": 4}, "schedule": {"epochs": 1}}
    both = arguments(task, tmp_path / "two", "--json", "--run.threads=1", **changes)
    out, err = (running := process(*both, launcher=launcher)).communicate(timeout=300)
    assert running.returncode == 0, err
    result, scores = json.loads(out), SCORES[task]
    assert (result["processes"], result["effective_batch"], result["steps"]) == (2, 8, 3)
    assert main(arguments(task, tmp_path / "one", "--run.accumulate=2", "--quiet", **changes)) == 0
    capsys.readouterr()
    states = [checkpoint.load(tmp_path / name / "last.pt")["state_dict"] for name in ("one", "two")]
    begun = build_model(config(task), 11, torch.device("cpu")).state_dict()
    # batch norms of one process see all batches, those of two each their own: running statistics differ
    names = [name for name in begun if "running" not in name and "num_batches" not in name]
    one, two = (torch.cat([(state[name] - begun[name]).flatten() for name in names]) for state in states)
    assert (one - two).norm() < 0.02 * one.norm() and one.norm() > 0
    assert main(["evaluate", f"--checkpoint={tmp_path / 'two' / 'last.pt'}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reproduced"] and found["classes"] == result["classes"]
    assert all(found[key] == result[key] for key in scores.heads)


@pytest.fixture(scope="module", params=TASKS)
def run(request, tmp_path_factory):
    """A finished run with its records, in 16 bits, and what it said."""
    folder, out, err = tmp_path_factory.mktemp(request.param), io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        more = ("--json", "--run.amp=bf16", "--run.keep_best=2", "--data.workers=1")
        assert main(arguments(request.param, folder, *more)) == 0
    return SimpleNamespace(task=request.param, folder=folder, result=json.loads(out.getvalue()), err=err.getvalue())


def test_records(run):
    scores, result = SCORES[run.task], run.result
    last, prefix = result["history"][-1], "ema_" if result["weights"] == "average" else ""
    for key in scores.heads:
        assert result[key] == last[prefix + key]
        assert result[key] is None or 0 <= result[key] <= 1
    assert last["total"] == 10 and last[f"{prefix}val_loss"] > 0 and last["ema_val_loss"] > 0
    rows = list(csv.DictReader((run.folder / "history.csv").open()))
    assert [float(row[scores.best]) for row in rows] == [row[scores.best] for row in result["history"]]
    best = max(result["history"], key=lambda row: row[("ema_" if row["weights"] == "average" else "") + scores.best])
    assert result[f"best_{scores.best}"] >= best[scores.best] and result["best_epoch"]
    assert f"{scores.name} " in run.err and "average " in run.err
    names = ["background", *"0123456789"] if run.task == "segmentation" else list("0123456789")
    assert [c["name"] for c in result["classes"]] == names and result["num_classes"] == 11
    content = checkpoint.load(run.folder / "best.pt")
    assert content.get("categories") == (list(range(1, 11)) if run.task == "detection" else None)
    assert len(list(run.folder.glob("best_*.pt"))) == 2
    assert task_of(result["model"]) == run.task and f"{scores.name}," in (run.folder / "report.html").read_text()


def test_samples(run):
    """Pictures of the best, the median and the worst images; each in one list, the lists by score."""
    samples = checkpoint.load(run.folder / "last.pt")["progress"]["samples"]
    assert [len(samples[kind]) for kind in ("best", "median", "worst")] == [4, 2, 4]
    assert min(s["score"] for s in samples["best"]) >= max(s["score"] for s in samples["worst"])
    for sample in (*samples["best"], *samples["median"], *samples["worst"]):
        assert sample["pixels"].shape == (SIZE, SIZE, 3) and sample["pixels"].dtype is torch.uint8
        if run.task == "segmentation":
            assert sample["truth"].shape == sample["guess"].shape == (SIZE, SIZE)
            assert sample["truth"].dtype is torch.uint8 and int(sample["truth"].max()) <= 10
        else:
            assert sample["truth"]["boxes"].shape == (len(sample["truth"]["labels"]), 4)
            assert len(sample["truth"]["labels"]) >= 2 and int(sample["truth"]["labels"].min()) >= 1
            assert len(sample["guess"]["boxes"]) == len(sample["guess"]["scores"]) == len(sample["guess"]["labels"])


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_evaluate_repeats_the_figure(run, weights, capsys):
    scores, last = SCORES[run.task], run.result["history"][-1]
    evaluation = ["evaluate", f"--checkpoint={run.folder / 'last.pt'}", f"--weights={weights}"]
    assert main([*evaluation, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    prefix = "ema_" if weights == "ema" else ""
    for key in (*scores.heads, "val_loss"):
        assert found[key] == last[prefix + key]
    assert found[f"recorded_{scores.best}"] == found[scores.best] and found["reproduced"] and found["total"] == 10
    assert main([*evaluation, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert rows[-1]["class"] == "all" and int(rows[-1][scores.counted]) == found[scores.counted]
    told = [{key: "" if c[key] is None else str(c[key]) for key in ("name", *scores.classes)} for c in found["classes"]]
    assert [{"name": row.pop("class"), **row} for row in rows[:-1]] == told
    assert main([*evaluation, "--per_class"]) == 0
    captured = capsys.readouterr()
    assert f"The recorded {scores.name} is reproduced." in captured.out
    for text in (*scores.heads.values(), *scores.classes.values()):
        assert text in captured.out


def test_evaluation_at_the_size_of_the_images(run, capsys):
    """The evaluation script's way of counting, which is another figure than the recorded one."""
    if run.task == "detection":
        with pytest.raises(SystemExit):
            main(["evaluate", f"--checkpoint={run.folder / 'last.pt'}", "--detection.score_threshold=1"])
        assert "detection.score_threshold must be at least 0 and below 1" in capsys.readouterr().err
        return
    evaluation = ["evaluate", f"--checkpoint={run.folder / 'last.pt'}", "--data.native_labels=true", "--json"]
    assert main(evaluation) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pixels"], found["recorded_miou"], found["reproduced"]) == (10 * 192**2, None, None)


def test_finetuning_to_other_classes(run, tmp_path, capsys):
    """The class layers are fresh, the rest is the checkpoint's; network and images are its too."""
    start = checkpoint.load(run.folder / "best.pt")
    shown = main(["finetune", f"--checkpoint={run.folder / 'best.pt'}", "--data.source=digits", "--print_config"])
    assert shown == 0 and f"name: {start['config']['model']['name']}" in capsys.readouterr().out
    with pytest.raises(mvit3_kernels.CheckpointError, match="Only layers of the head differ: drop_head=True"):
        build_model(config(run.task, model={"pretrained": str(run.folder / "best.pt")}), 5, torch.device("cpu"))
    for classes in (11, 5):
        model = {"pretrained": str(run.folder / "best.pt"), "drop_head": True}
        found = build_model(config(run.task, model=model, run={"seed": 9}), classes, torch.device("cpu"))
        fresh = build_model(config(run.task, run={"seed": 9}), classes, torch.device("cpu"))
        state = start["ema_state_dict" if start["weights"] == "average" else "state_dict"]
        own = {name for name, tensor in fresh.state_dict().items() if torch.equal(tensor, found.state_dict()[name])}
        heads = {
            name for name in own if not name.endswith(("bias", "running_mean", "running_var", "num_batches_tracked"))
        }
        layer = "loc_cls_layer" if run.task == "detection" else "seg_head"
        assert heads and all(layer in name for name in heads if not torch.equal(found.state_dict()[name], state[name]))
        name = next(name for name in state if name.startswith("encoder.") and name.endswith("conv.weight"))
        assert torch.equal(found.state_dict()[name], state[name])


@pytest.mark.parametrize("task", TASKS)
def test_a_classifier_is_the_backbone(task, tmp_path, capsys):
    """What is missing and what is unexpected is said in one line."""
    name = config(task).model.name.partition("_")[2]
    classifier = mvit3_kernels.create_model(name, 7)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pt")
    model, said = {"pretrained": str(tmp_path / "classifier.pt")}, []
    found = build_model(config(task, model=model), 11, torch.device("cpu"), say=said.append)
    for key, tensor in found.encoder.state_dict().items():
        assert torch.equal(tensor, classifier.state_dict()[key]), key
    (line,) = said
    heads = {"segmentation": "seg_head", "detection": "extra_layers, ssd_heads"}[task]
    assert f"missing, and fresh: {heads}; unexpected, and left out: classifier" in line and "\n" not in line


@pytest.mark.parametrize(("task", "changes", "message"), [
    ("detection", {"loss": {"mixup_alpha": 0.2}}, "loss.mixup_alpha is for classifiers, ssdlite_mobilevitv3_xxs is"),
    ("segmentation", {"loss": {"cutmix_alpha": 1.0}}, "loss.cutmix_alpha is for classifiers"),
    ("segmentation", {"loss": {"name": "bce"}}, "loss.name bce is for classifiers"),
    ("segmentation", {"loss": {"class_balance": 1.0}}, "loss.class_balance is for classifiers"),
    ("detection", {"loss": {"class_weights": [1.0] * 11}}, "loss.class_weights is for classifiers"),
    ("detection", {"distill": {"teacher": "resnet18"}}, "distill.teacher is for classifiers"),
    ("detection", {"model": {"output_stride": 16}}, "of ssdlite_mobilevitv3_xxs must be one of null, 32; got 16"),
    ("segmentation", {"model": {"output_stride": 4}}, "must be one of null, 8, 16, 32; got 4"),
    ("detection", {"model": {"freeze_stages": 7}}, "must be at most 6, the stages of its backbone; got 7"),
    ("detection", {"detection": {"iou_threshold": 2.0}}, "detection.iou_threshold must be at least 0"),
    ("detection", {"detection": {"iou_threshold": 0.0}}, "iou_threshold must be above 0 and at most 1, got 0.0"),
    ("detection", {"data": {"native_labels": True}}, "native_labels has no meaning for detection, got true; leave"),
    ("detection", {"data": {"keep_aspect": True, "eval_batch_size": 1}}, "keep_aspect has no meaning for detection"),
    ("detection", {"data": {"masks": "m"}}, "data.masks has no meaning for detection, got m; leave it at empty"),
    ("detection", {"loss": {"auxiliary_weight": 1.0}}, "loss.auxiliary_weight has no meaning for detection, got 1.0"),
    ("segmentation", {"data": {"annotations": "a.json"}}, "data.annotations has no meaning for segmentation"),
    ("segmentation", {"detection": {"per_class": 3}}, "detection.per_class has no meaning for segmentation, got 3"),
    ("detection", {"data": {"resize": 130}}, "data.resize has no meaning for detection, which sees the whole image at"),
])  # fmt: skip
def test_wrong_options(task, changes, message):
    with pytest.raises(UsageError) as error:
        TrainConfig.from_dict(options(task, **changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_the_data_does_not_allow(tmp_path, capsys):
    with pytest.raises(UsageError, match=r"data.batch_size must be at least 2 for pspnet_mobilevitv2_050: its head"):
        trainer("segmentation", data={"batch_size": 1})
    with pytest.raises(UsageError, match="for images of 64 pixels: the last map of one image is 1x1"):
        trainer("detection", data={"batch_size": 1})
    with pytest.raises(UsageError, match=r"loss.class_weights must be a number for each of the 11 classes, got 2"):
        trainer("segmentation", loss={"class_weights": [1.0, 2.0]})
    with pytest.raises(SystemExit):
        main(["demo", "--model.name=ssdlite_mobilevitv3_xxs", f"--run.output={tmp_path}"])
    assert "model.name must be a classifier for mvit3 demo" in capsys.readouterr().err


def test_options_reach_the_network():
    """Output stride, frozen stages, the rate of the head, stochastic depth."""
    one = trainer(
        "segmentation",
        model={"name": "deeplabv3_mobilevitv3_xxs", "output_stride": 8, "freeze_stages": 2, "drop_path_rate": 0.1},
        optimizer={"head_lr_scale": 10.0},
        loss={"class_weights": [0.5] + [1.0] * 10},
    )
    assert one.model.output_stride == 8
    assert {n.split(".")[1] for n, p in one.model.named_parameters() if not p.requires_grad} == {"conv_1", "layer_1"}
    scale = {id(p): group["lr_scale"] for group in one.optimizer.param_groups for p in group["params"]}
    for name, p in one.model.named_parameters():
        if p.requires_grad:
            assert scale[id(p)] == (10.0 if name.startswith("seg_head.") else 1.0)
    one.train_epoch()
    assert one.progress.step == 3 and one.last_loss > 0


def test_networks_are_listed(capsys):
    assert main(["models", "ssdlite_mobilevitv3_xxs", "deeplabv3_mobilevitv3_0*", "--json"]) == 0
    found = {model["name"]: model for model in json.loads(capsys.readouterr().out)}
    assert sorted(found) == ["deeplabv3_mobilevitv3_050", "deeplabv3_mobilevitv3_075", "ssdlite_mobilevitv3_xxs"]
    assert found["ssdlite_mobilevitv3_xxs"]["input"] == "3x320x320 BGR, 0 to 1"
    assert found["deeplabv3_mobilevitv3_050"]["input"] == "3x512x512 RGB, 0 to 1"
    with torch.device("meta"):
        model = mvit3_kernels.create_model("ssdlite_mobilevitv3_xxs")
    assert found["ssdlite_mobilevitv3_xxs"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert small_config().model.output_stride is None
