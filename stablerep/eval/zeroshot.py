"""Zero-shot classification by class names, for encoders that were trained beside a text tower (CLIP, arXiv 2103.00020)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from stablerep.eval.datasets import TOP_1
from stablerep.eval.metrics import measure
from stablerep.eval.score import Score
from stablerep.text import ImageText, tokenize

PHOTO = "a photo of a {}."
TEMPLATES = {  # CLIP's for these data sets, the plainest of each; ImageNet's are 80, see `templates_for`
    "fashion": ["a photo of a {}"],  # as in the captions of the demo
    "fashion-probe": ["a photo of a {}"],
    "aircraft": ["a photo of a {}, a type of aircraft."],
    "dtd": ["a photo of a {} texture."],
    "flowers": ["a photo of a {}, a type of flower."],
    "food101": ["a photo of {}, a type of food."],
    "pets": ["a photo of a {}, a type of pet."],
}


def templates_for(dataset: str) -> list[str]:
    """The templates of a data set, each with one `{}`: CLIP's 80 for `imagenet`, one short one for the others."""
    if dataset == "imagenet":
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    return TEMPLATES.get(dataset, [PHOTO])


def class_names(dataset: str, classes: Sequence[str]) -> list[str]:
    """What the classes are called in a text: CLIP's names for `imagenet`, whose folders are named by WordNet ids (sorted, as
    CLIP's names are); elsewhere the names of the folders, underscores read as spaces."""
    if dataset == "imagenet":
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

        if len(classes) == len(IMAGENET_CLASSNAMES):
            return list(IMAGENET_CLASSNAMES)
    return [name.replace("_", " ") for name in classes]


@torch.inference_mode()
def class_weights(image_text: ImageText, classes: Sequence[str], templates: Sequence[str], device: str) -> Tensor:
    """A unit vector a class, float32 [classes, embed]: the mean over templates of the normalised text features, normalised
    again (arXiv 2103.00020, section 3.1.4)."""
    tower = image_text.to(device).eval()
    rows = []
    for name in classes:  # a class at a time: 80 templates are a batch
        tokens = tokenize([template.format(name) for template in templates], tower.text.context_length)
        rows.append(normalize(tower.encode_text(tokens.to(device)).float(), dim=1).mean(dim=0))
    return normalize(torch.stack(rows), dim=1)


@torch.inference_mode()
def zeroshot(
    image_text: ImageText,
    features: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    templates: Sequence[str],
    device: str = "cpu",
    metric: str = TOP_1,
) -> Score:
    """The metric in percent where each picture goes to the class whose text is nearest by cosine.

    `image_text` is `stablerep.text.load_image_text(RUN)`; `features` float32 [N, width] are those of the same run's encoder
    (`stablerep.eval.features.extract`), `labels` int [N] index `classes`.
    """
    weights = class_weights(image_text, classes, templates, device)
    images = normalize(torch.from_numpy(features).to(device) @ image_text.image_projection.float(), dim=1)
    return measure(metric, (images @ weights.T).cpu().numpy(), labels, {"templates": len(templates)})
