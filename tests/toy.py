"""A small world for tests of the training loop: a COCO dataset of coloured blocks, and a detector that is nothing like YOLO."""
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from moe_lab import checkpoint, detectors
from moe_lab.boxes import Detections
from moe_lab.data.coco import CocoDetection
from moe_lab.data.core import make_loader
from moe_lab.evaluate import evaluate_coco, load_ground_truth, predict
from moe_lab.params import AugmentParams, DataParams, EvalParams, RunParams, TrainParams
from moe_lab.tier import make_deterministic
from moe_lab.train import finish, processes, train

SIZE, STRIDE = (64, 96), 16
COLOURS = [(230, 60, 40), (40, 90, 230)]


def write_dataset(root: Path, splits=(("train", 24), ("val", 8)), change=lambda split, data: None) -> Path:
    """Blocks on noise; `change` may damage the annotations before they are written."""
    for number, (split, count) in enumerate(splits):
        (root / split).mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        rng, images, annotations = np.random.default_rng(number), [], []
        for i in range(1, count + 1):
            picture = rng.integers(90, 130, (64, 96, 3), np.uint8)
            for _ in range(rng.integers(1, 3)):
                kind, w, h = int(rng.integers(2)), *map(int, rng.integers(14, 28, 2))
                x, y = int(rng.integers(0, 96 - w)), int(rng.integers(0, 64 - h))
                picture[y : y + h, x : x + w] = COLOURS[kind]
                annotations.append(dict(id=len(annotations) + 1, image_id=i, category_id=(1, 3)[kind], bbox=[x, y, w, h], area=w * h, iscrowd=0))
            Image.fromarray(picture).save(root / split / f"{i}.jpg", quality=95)
            images.append(dict(id=i, file_name=f"{i}.jpg", width=96, height=64, condition=("day", "fog")[i % 2]))
        data = dict(images=images, annotations=annotations, categories=[dict(id=1, name="person"), dict(id=3, name="car")])
        change(split, data)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
    return root


class CellDetector(torch.nn.Module):
    """One box per cell of 16 pixels: objectness, centre, size, classes. Dropout makes it depend on random state."""

    def __init__(self, num_classes: int, width: int = 16):
        super().__init__()
        conv = lambda a, b: [torch.nn.Conv2d(a, b, 3, 2, 1, bias=False), torch.nn.BatchNorm2d(b), torch.nn.ReLU()]
        self.body = torch.nn.Sequential(*conv(3, width), *conv(width, width), *conv(width, width), *conv(width, width), torch.nn.Dropout(0.1))
        self.head = torch.nn.Conv2d(width, 5 + num_classes, 1)

    def forward(self, batch):
        return self.head(self.body(batch["images"])).permute(0, 2, 3, 1)

    def loss(self, outputs, batch):
        objectness, box, cls = torch.zeros_like(outputs[..., 0]), outputs.new_zeros(()), outputs.new_zeros(())
        for b, target in enumerate(batch["targets"]):
            for corners, label in zip(target["boxes"], target["labels"]):
                centre, size = (corners[:2] + corners[2:]) / 2 / STRIDE, (corners[2:] - corners[:2]) / STRIDE
                column, row = (int(v) for v in centre.floor())
                row, column = min(row, outputs.shape[1] - 1), min(column, outputs.shape[2] - 1)
                cell, objectness[b, row, column] = outputs[b, row, column], 1.0
                box = box + (cell[1:3].sigmoid() - (centre - torch.tensor([column, row]))).abs().sum() + (cell[3:5].exp() - size).abs().sum()
                cls = cls + torch.nn.functional.cross_entropy(cell[5:], label)
        count = max(1, sum(len(t["labels"]) for t in batch["targets"]))
        return dict(obj=4 * torch.nn.functional.binary_cross_entropy_with_logits(outputs[..., 0], objectness), box=box / count, cls=cls / count)

    def detect(self, outputs, batch, evaluate):
        rows, columns = torch.meshgrid(*(torch.arange(n) for n in outputs.shape[1:3]), indexing="ij")
        centre = outputs[..., 1:3].sigmoid() + torch.stack([columns, rows], -1)
        boxes = torch.cat([centre - outputs[..., 3:5].exp() / 2, centre + outputs[..., 3:5].exp() / 2], -1) * STRIDE
        scores, labels = (outputs[..., :1].sigmoid() * outputs[..., 5:].softmax(-1)).max(-1)
        return [Detections(b.reshape(-1, 4), s.reshape(-1), n.reshape(-1)) for b, s, n in zip(boxes, scores, labels)]


def yolo():
    """The real detector, as small as it gets; seeded, since it is built before the run seeds everything."""
    make_deterministic(3, 1)
    return detectors.build("yolov7_tiny", num_classes=2, width=0.125)


def settings(**changes) -> RunParams:
    recipe = dict(epochs=3, batch_size=8, lr=0.02, optimizer="adamw", ema_decay=0.9, ema_warmup=4, clip_norm=5.0, warmup_steps=2, lr_final=0.1)
    augment = AugmentParams(mosaic=0.5, mixup=0.2, flip=0.5, scale=0.3, translate=0.1, hsv_h=0.02, hsv_s=0.3, hsv_v=0.3)
    workers = changes.pop("workers", 0)
    return RunParams(detector="toy", seed=3, data=DataParams(root="toy", image_size=SIZE, augment=augment, workers=workers),
                     train=TrainParams(**recipe | changes), evaluate=EvalParams(batch_size=8))


def run(root: Path, out: Path, resume: Path | None = None, save_seconds: float = 0.0, log=lambda line: None, model=None, files=(), **changes) -> dict:
    """What the training notebook does, in short: train, judge, write metrics, predictions, history and checkpoint."""
    params = settings(**changes)
    make_deterministic(params.seed, 1)
    sets = {"train": CocoDetection(root, "train", SIZE, augment=params.data.augment, seed=params.seed), "val": CocoDetection(root, "val", SIZE)}
    truth = load_ground_truth(sets["val"].annotations)
    share = dict(zip(("rank", "world_size"), processes()), workers=params.data.workers)
    judged = make_loader(sets["val"], params.evaluate.batch_size, **share)
    loader = make_loader(sets["train"], params.train.batch_size, shuffle=True, seed=params.seed, **share)
    evaluate = lambda model, epoch: evaluate_coco(truth, predict(model, judged, params.evaluate), detail=False).metrics
    model = model or CellDetector(len(sets["train"].names))
    trained = train(model, loader, params, out, resume, evaluate, run="toy", files=[sets["train"].annotations, *files], save_seconds=save_seconds, log=log)
    results = predict(trained.best, judged, params.evaluate)
    metrics = evaluate_coco(truth, results, dict(zip(sets["val"].image_ids, sets["val"].conditions))).rounded()
    checkpoint.write_json(out / "metrics.json", metrics)
    checkpoint.write_records(out / "predictions.json", {"val": results})
    if resume:
        finish(resume)
    return metrics


def contents(out: Path) -> dict[str, bytes]:
    """The files that must be reproducible, and no others."""
    return {name: (out / name).read_bytes() for name in ("metrics.json", "predictions.json", "history.csv", "checkpoint.safetensors")}
