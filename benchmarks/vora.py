"""VoRA on pictures of coloured shapes, with a ViT as teacher: `python benchmarks/vora.py --check`.

A ViT learns to classify the pictures, a small Llama learns caption-like text, and both are frozen.
VoRA then teaches the Llama to caption pictures that it has not seen: with everything that the paper
has, without distillation, with a causal mask, and with nothing trained but the embedding. The
result is merged, and compared on text; so is a run of route "vision". Last, the same with the
digits of scikit-learn.
"""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import study
import torch
import transformers
from coloured_shapes import COLOURS, QUADRANTS, SHAPES, draw_picture
from study import DIRECTION, NOT_REPRODUCED, REPRODUCED, Claim, Criterion, Row, Rows, Verdict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from lora_ext.methods import vora

CLAIM = Claim(
    paper="Vision as LoRA (arXiv 2503.20680)",
    claim="LoRA inside a frozen language model, distilled block by block from a ViT and with "
    "attention in both directions among the patches, makes it see without a vision tower; then it "
    "is merged.",
    setup="Pictures of at most 32 x 32 in patches of 8, in three resolutions: a shape (6 colours x "
    "4 shapes x 4 quadrants) on noise. A ViT of 4 blocks (width 64) learned to classify them, a "
    "Llama of 6 (width 96) learned text of captions. VoRA of rank 16 on 4 blocks, 600 steps of 16; "
    "480 pictures to test.",
    seeds=3,
)
SIZES, UNSEEN = ((32, 32), (24, 32), (32, 24)), ((24, 24), (40, 40), (32, 48))
PATCH, BLOCKS, RANK, WIDTH, TEACHER_WIDTH = 8, 4, 16, 96, 64
BATCH, RATE, PLACEHOLDER = 16, 4e-3, -200
WORDS = ["<s>", ";", *COLOURS, *SHAPES, *QUADRANTS, "digit", *map(str, range(10))]
IDS = {word: i for i, word in enumerate(WORDS)}
START = [IDS["<s>"], PLACEHOLDER, IDS[";"]]
KINDS = (COLOURS, SHAPES, QUADRANTS)


@dataclass(frozen=True)
class Sizes:
    """Of the runs."""

    teacher_steps: int = 300
    text_steps: int = 150
    steps: int = 600
    pictures: tuple[int, int] = (3072, 480)  # to train, to test
    digits: tuple[int, int] = (1300, 497)


QUICK = Sizes(2, 2, 3, (48, 6), (40, 10))


@dataclass(frozen=True)
class Arm:
    """One way of training."""

    distill: bool = True
    lora: bool = True
    bidirectional: bool = True
    route: Any = "all"
    part: float = 1.0  # of the steps


ARMS = {
    "VoRA": Arm(),
    "no distillation": Arm(distill=False),
    "causal": Arm(bidirectional=False),
    "embedding only": Arm(distill=False, lora=False),
    "vision": Arm(route="vision", part=0.1),  # asked what it does to text, which no step changes
}


class Pictures:
    """Images as the model takes them, and their captions as token ids.

    Args:
        images: ``(3, H, W)`` uint8. captions: as many words each.
    """

    def __init__(self, images: Sequence[Tensor], captions: Sequence[Sequence[str]]):
        processor = vora.VoraImageProcessor(
            patch=PATCH, min_pixels=PATCH**2, image_mean=(0.5,) * 3, image_std=(0.5,) * 3
        )
        self.images = processor(list(images))["pixel_values"]
        self.captions = torch.tensor([[IDS[word] for word in words] for words in captions])
        self.states: list[list[Tensor]] = []  # of each image, what the teacher's blocks compute
        self.grids: list[tuple[int, int]] = []

    @classmethod
    def of_shapes(cls, count: int, sizes: Sequence[tuple[int, int]], seed: int) -> Pictures:
        """Drawn at these sizes in turn."""
        generator = torch.Generator().manual_seed(seed)
        turns = itertools.islice(itertools.cycle(sizes), count)
        drawn = [draw_picture(size, generator) for size in turns]
        return cls([p.image for p in drawn], [(p.colour, p.shape, p.quadrant) for p in drawn])

    def watched_by(self, teacher: nn.Module) -> Pictures:
        """Keep the teacher's states: the pictures do not change, and it is frozen."""
        states, self.grids = vora.teacher_states(teacher, self.images, BLOCKS)
        counts = [rows * columns for rows, columns in self.grids]
        self.states = [
            list(of_image) for of_image in zip(*(s.split(counts) for s in states), strict=True)
        ]
        return self

    def batch(self, places: Sequence[int], distill: bool) -> dict[str, Any]:
        """Arguments of the model: the image between ``<s>`` and ``;``, then the caption, alone
        predicted."""
        captions = self.captions[list(places)]
        start = torch.tensor([START]).expand(len(captions), -1)
        batch: dict[str, Any] = {
            "input_ids": torch.cat([start, captions], 1),
            "labels": torch.cat([torch.full_like(start, -100), captions], 1),
            "images": [[self.images[i]] for i in places],
        }
        if distill:
            own = [self.states[i] for i in places]
            batch["teacher_states"] = [torch.cat(of_block) for of_block in zip(*own, strict=True)]
            batch["teacher_grids"] = [self.grids[i] for i in places]
        return batch


# -------------------------------------------------------------------------------------------------
# What is frozen: the teacher, and the language model


def steps(
    parameters: Any, lr: float, count: int, bar: Any, loss_of: Callable[[], Tensor]
) -> list[float]:
    """AdamW with a warm-up and a linear end; the losses."""
    optimizer = torch.optim.AdamW(list(parameters), lr=lr, weight_decay=0.0)
    losses = []
    for step in range(count):
        part = (step + 1) / count
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 10 * part, 2.5 * (1 - part) + 0.02)
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        bar.update()
    return losses


def train_teacher(pictures: Pictures, count: int, bar: Any) -> Any:
    """A ViT that has learned to name colour, shape and quadrant from its class token."""
    config = transformers.ViTConfig(
        hidden_size=TEACHER_WIDTH,
        intermediate_size=2 * TEACHER_WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        image_size=32,
        patch_size=PATCH,
        initializer_range=0.08,
    )
    teacher = transformers.ViTModel(config, add_pooling_layer=False)
    head = nn.Linear(TEACHER_WIDTH, len(WORDS))
    by_grid: dict[Any, list[int]] = {}
    for i, image in enumerate(pictures.images):
        by_grid.setdefault(image.shape, []).append(i)
    groups = itertools.cycle([torch.tensor(group) for group in by_grid.values()])

    def loss() -> Tensor:
        group = next(groups)
        chosen = group[torch.randint(len(group), (48,))]
        pixels = torch.stack([pictures.images[i] for i in chosen])
        state = teacher(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        logits, targets = head(state), pictures.captions[chosen]
        parts = [logits[:, IDS[next(iter(kind))] :][:, : len(kind)] for kind in KINDS]
        firsts = [IDS[next(iter(kind))] for kind in KINDS]
        losses = [cross_entropy(p, targets[:, k] - firsts[k]) for k, p in enumerate(parts)]
        return torch.stack(losses).sum()

    steps([*teacher.parameters(), *head.parameters()], 2e-3, count, bar, loss)
    return teacher.eval().requires_grad_(False)


def text(rows: int, generator: torch.Generator) -> Tensor:
    """Caption after caption: ``(rows, 13)``."""

    def words(kind: Any) -> Tensor:
        first = IDS[next(iter(kind))]
        return torch.randint(first, first + len(kind), (rows, 3), generator=generator)

    columns = [*map(words, KINDS), torch.full((rows, 3), IDS[";"])]
    return torch.cat([torch.full((rows, 1), IDS["<s>"]), torch.stack(columns, 2).flatten(1)], 1)


def train_language_model(count: int, bar: Any) -> Any:
    """A Llama that has read captions, and seen nothing."""
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        bos_token_id=IDS["<s>"],
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.1,
    )
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        ids = text(32, generator)
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    steps(model.parameters(), 2e-3, count, bar, loss)
    return model.eval()


# -------------------------------------------------------------------------------------------------
# What is trained


def seeing(model: Any, arm: Arm) -> vora.VoraForCausalLM:
    """A copy of the language model with what is trained."""
    config = vora.VoraConfig(
        n_blocks=BLOCKS,
        rank=RANK,
        route=arm.route,
        image_size=32,
        patch=PATCH,
        embed_dim=WIDTH,
        bidirectional=arm.bidirectional,
    )
    seer = vora.VoraForCausalLM(
        copy.deepcopy(model), config, TEACHER_WIDTH if arm.distill else None
    )
    if not arm.lora:
        seer.model.requires_grad_(False)
    with torch.no_grad():  # tokens of images start as large as those of text, not six times so
        seer.vision.out_proj.weight *= 3**0.5 * model.get_input_embeddings().weight.std()
    return seer


def train(seer: Any, arm: Arm, pictures: Pictures, seed: int, count: int) -> list[float]:
    """Losses of the captions, without the distillation's."""
    generator = torch.Generator().manual_seed(seed)
    losses = []

    def loss() -> Tensor:
        places = torch.randint(len(pictures.images), (BATCH,), generator=generator).tolist()
        out = seer(**pictures.batch(places, arm.distill))
        losses.append(out.lm_loss.item())
        return out.loss

    steps([p for p in seer.parameters() if p.requires_grad], RATE, count, tqdm(disable=True), loss)
    seer.eval()
    return losses


@torch.no_grad()
def accuracy(seer: Any, pictures: Pictures) -> float:
    """The part of pictures whose greedily generated caption is right, word for word."""
    right = 0
    for places in torch.arange(len(pictures.images)).split(120):
        batch = pictures.batch(places.tolist(), distill=False)
        wanted = pictures.captions[places]
        found = seer.generate(
            batch["input_ids"][:, : len(START)],
            batch["images"],
            max_new_tokens=wanted.shape[1],
            do_sample=False,
            pad_token_id=IDS["<s>"],
        )
        right += int((found == wanted).all(1).sum())
    return right / len(pictures.images)


@torch.no_grad()
def text_logits(model: Any, ids: Tensor) -> Tensor:
    """Of the language model alone."""
    return model(input_ids=ids, use_cache=False).logits


@dataclass(frozen=True)
class Stage:
    """What all runs share, and none changes."""

    model: Any
    pictures: Pictures
    testing: Pictures
    others: dict[tuple[int, int], Pictures]
    steps: int
    digits: tuple[int, int]


STAGE: Stage | None = None  # of this process


def measure(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """The arms of every seed, then the digits; two runs side by side, each on one thread, since
    products this small gain little from a second."""
    torch.set_num_threads(1)
    sizes = QUICK if quick else Sizes()
    torch.manual_seed(0)
    pictures = Pictures.of_shapes(sizes.pictures[0], SIZES, seed=1)
    with tqdm(total=sizes.teacher_steps + sizes.text_steps, unit="step", mininterval=1) as bar:
        pictures.watched_by(train_teacher(pictures, sizes.teacher_steps, bar))
        model = train_language_model(sizes.text_steps, bar)
    testing = Pictures.of_shapes(sizes.pictures[1], SIZES, seed=2)
    others = {size: Pictures.of_shapes(sizes.pictures[1] // 3, [size], 3) for size in UNSEEN}
    stage = Stage(model, pictures, testing, others, sizes.steps, sizes.digits)
    runs = [(seed, name) for seed in seeds for name in ARMS] + [(seeds[0], "digits")]
    if quick:
        enter(stage)
        yield from map(run, runs)
        return
    with multiprocessing.get_context("fork").Pool(2, enter, (stage,)) as pool:
        yield from tqdm(pool.imap(run, runs), total=len(runs), unit="run")


def enter(stage: Stage) -> None:
    """The stage of this process."""
    global STAGE
    STAGE = stage
    torch.set_num_threads(1)


def run(which: tuple[int, str]) -> Row:
    """A row of one seed and arm, or of the digits."""
    assert STAGE is not None
    seed, name = which
    torch.manual_seed(seed)
    if name == "digits":
        return {"seed": seed, "part": name, **of_digits(STAGE, seed)}
    arm = ARMS[name]
    seer = seeing(STAGE.model, arm)
    losses = train(seer, arm, STAGE.pictures, seed, max(1, round(arm.part * STAGE.steps)))
    row: Row = {"seed": seed, "part": "arm", "arm": name, **curve(losses)}
    row["accuracy"] = accuracy(seer, STAGE.testing)
    if name == "VoRA":
        for (height, width), pictures in STAGE.others.items():
            row[f"accuracy_{height}x{width}"] = accuracy(seer, pictures)
        row |= merged(seer, STAGE.testing)
    if name in ("VoRA", "vision"):
        row |= of_text(seer.model, STAGE.model)
    return row


def curve(losses: Sequence[float]) -> Row:
    """Means of the loss over the first half and over each tenth."""
    half, tenth = max(1, len(losses) // 2), max(1, len(losses) // 10)
    tenths = [losses[i * tenth : (i + 1) * tenth] or losses[-1:] for i in range(10)]
    means = {f"loss_{i}": sum(part) / len(part) for i, part in enumerate(tenths)}
    return {"first_half": sum(losses[:half]) / half, **means}


@torch.no_grad()
def merged(seer: Any, testing: Pictures) -> Row:
    """Merge, and how far that moves a logit; VoRA layers that are left."""
    batch = testing.batch(range(min(96, len(testing.images))), distill=False)
    before = seer(**batch).logits
    vora.merge(seer.model)
    left = sum(isinstance(m, vora.VoraLinear) for m in seer.modules())
    return {"merge_error": (seer(**batch).logits - before).abs().max().item(), "left": left}


@torch.no_grad()
def of_text(model: Any, base: Any) -> Row:
    """What the language model says of text, beside the base model."""
    ids = text(64, torch.Generator().manual_seed(4))
    logits, expected = text_logits(model, ids), text_logits(base, ids)
    losses = [
        cross_entropy(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for x in (logits, expected)
    ]
    return {
        "text_equal": torch.equal(logits, expected),
        "text_loss": losses[0].item(),
        "base_text_loss": losses[1].item(),
    }


def of_digits(stage: Stage, seed: int) -> Row:
    """Handwritten digits, captioned "digit 7": pictures that nobody drew for this."""
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = torch.from_numpy(data.images * 15.9).to(torch.uint8)  # 8 x 8, from 0 to 254
    images = grey.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand(-1, 3, -1, -1)
    captions = [("digit", str(digit)) for digit in data.target]
    count, tested = stage.digits
    pictures = Pictures(list(images[:count]), captions[:count])
    testing = Pictures(list(images[count:][:tested]), captions[count:][:tested])
    arm = ARMS["no distillation"]
    seer = seeing(stage.model, arm)
    losses = train(seer, arm, pictures, seed, max(1, stage.steps // 2))
    return {**curve(losses), "accuracy": accuracy(seer, testing)}


# -------------------------------------------------------------------------------------------------
# What the rows say; means over the seeds


def of(rows: Rows, arm: str, column: str = "accuracy") -> float:
    """A column of an arm."""
    return study.mean(rows, column, part="arm", arm=arm)


def criteria(rows: Rows) -> list[Criterion]:
    """Those of the specification; the text loss of route "all" is told by the verdict."""
    found, blind = of(rows, "VoRA"), of(rows, "embedding only")
    sooner = of(rows, "VoRA", "first_half"), of(rows, "no distillation", "first_half")
    causal = of(rows, "causal")
    arms = [row for row in rows if row["part"] == "arm"]
    error = max(row["merge_error"] for row in arms if row["arm"] == "VoRA")
    left = max(row["left"] for row in arms if row["arm"] == "VoRA")
    equal = all(row["text_equal"] for row in arms if row["arm"] == "vision")
    return [
        Criterion("captions right, VoRA", ">= 0.9", f"{found:.3f}", found >= 0.9),
        Criterion(
            "VoRA - embedding only", ">= 0.15", f"{found - blind:+.3f}", found - blind >= 0.15
        ),
        Criterion(
            "loss over the first half, with and without distillation",
            "lower with",
            "{:.3f}, {:.3f}".format(*sooner),
            sooner[0] < sooner[1],
        ),
        Criterion(
            "both directions - causal", ">= -0.01", f"{found - causal:+.3f}", found >= causal - 0.01
        ),
        Criterion("merging moves a logit by", "<= 1e-4", f"{error:.1e}", error <= 1e-4),
        Criterion("VoRA layers after merging", "0", str(left), left == 0),
        Criterion(
            'text logits of route "vision"', "the base's", "equal" if equal else "differ", equal
        ),
    ]


def verdict(rows: Rows) -> Verdict:
    """Reproduced where all criteria are met; a direction where it sees, and better than without
    LoRA."""
    found = criteria(rows)
    digit = study.mean(rows, "accuracy", part="digits")
    loss, base = (of(rows, "VoRA", c) for c in ("text_loss", "base_text_loss"))
    figure = (
        f"captions right: VoRA {of(rows, 'VoRA'):.3f}, without distillation "
        f"{of(rows, 'no distillation'):.3f}, causal {of(rows, 'causal'):.3f}, embedding only "
        f"{of(rows, 'embedding only'):.3f}; digits "
        f"{digit:.3f}; text loss {base:.3f}, with VoRA {loss:.3f}"
    )
    word = DIRECTION if found[1].passed else NOT_REPRODUCED
    return Verdict(figure, REPRODUCED if all(c.passed for c in found) else word)


def show(rows: Rows) -> None:
    """A line for each arm, and other resolutions."""
    lines = [
        (name, *(f"{of(rows, name, c):.3f}" for c in ("accuracy", "first_half", "loss_9")))
        for name in ARMS
    ]
    print(study.markdown(("arm", "captions right", "loss, first half", "last tenth"), lines) + "\n")
    sizes = [f"{height}x{width}" for height, width in UNSEEN]
    line = [f"{of(rows, 'VoRA', f'accuracy_{size}'):.3f}" for size in sizes]
    print(study.markdown(("resolution not trained on", *sizes), [("captions right", *line)]) + "\n")


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
