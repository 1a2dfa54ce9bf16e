"""Compare VoRA with an encoder on pictures of coloured shapes: `python benchmarks/vora.py`.

A ViT learns to classify the pictures, a small Llama learns caption-like text, and both are frozen.
VoRA then teaches the Llama to caption unseen pictures, with text in every fourth batch: as in the
paper, without distillation, and with a causal mask. The baseline has what VoRA avoids: the ViT and
a projector of two layers in front of the Llama, whose LoRA has as many parameters as VoRA's. VoRA
is merged and evaluated on text, and so is a run of route "vision". The learning rates of VoRA and
of the baseline are chosen on a separate seed.
"""

from __future__ import annotations

import copy
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import study
import torch
import transformers
from coloured_shapes import COLOURS, QUADRANTS, SHAPES, draw_picture
from study import Claim, Criterion, Gate, Interval, Row, Rows
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from lora_ext.methods import vora
from lora_ext.nn import LoraConfig, wrap

CLAIM = Claim(
    paper="Vision as LoRA (arXiv 2503.20680)",
    claim="LoRA inside a frozen language model, distilled block by block from a ViT and with "
    "bidirectional attention among the patches, makes it see as well as models with a vision "
    "tower. It is then merged.",
    setup="A shape on noise, at most 32 x 32, in patches of 8. A ViT of 4 blocks classifies, a "
    "Llama of 6 blocks learned captions. VoRA of rank 16 on 4 blocks, 2,400 steps, a quarter of "
    "them text. The encoder arm has the ViT, a projector and LoRA on the same blocks. 480 test "
    "pictures. Not tried on SmolLM2.",
    headline="share of right captions: VoRA at most 0.05 below the encoder, and above VoRA without "
    "distillation",
    use="the model must read pictures without a second model at inference, you have a ViT to "
    "distil from, and you merge the result into the language model",
    avoid='you can keep a vision tower, or text must not change, unless you use route "vision" '
    "without merging",
    seeds=3,
    earlier="600 steps without text: captions right 0.754 [0.725, 0.794], encoder 0.953, without "
    "distillation 0.330; text loss 1.1, with VoRA 2.9 (3 seeds, revision f862fdb): direction "
    "only",
    gate="VoRA has 0.3 of the captions right, the encoder 0.5, VoRA without distillation at most "
    "0.9, and rates are inside the grid",
)
SIZES, UNSEEN = ((32, 32), (24, 32), (32, 24)), ((24, 24), (40, 40), (32, 48))
PATCH, BLOCKS, RANK, WIDTH, TEACHER_WIDTH = 8, 4, 16, 96, 64
LINEARS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
BATCH, PLACEHOLDER, TEXT_EVERY = 16, -200, 4
RATES = study.Grid((2e-3, 4e-3, 8e-3), most=3)
CHOOSING, GATE_SEED, CHOOSING_PART = study.TRIALS, study.TRIALS + 1, 0.25
PICTURE = 1 / 480
WORDS = ["<s>", ";", *COLOURS, *SHAPES, *QUADRANTS, "digit", *map(str, range(10))]
IDS = {word: i for i, word in enumerate(WORDS)}
START = [IDS["<s>"], PLACEHOLDER, IDS[";"]]
KINDS = (COLOURS, SHAPES, QUADRANTS)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the runs."""

    teacher_steps: int = 300
    text_steps: int = 150
    steps: int = 2400
    pictures: tuple[int, int] = (3072, 480)  # numbers for training and testing


QUICK = Sizes(2, 2, 6, (48, 6))


@dataclass(frozen=True)
class Arm:
    """Settings of one way to train."""

    distill: bool = True
    lora: bool = True
    bidirectional: bool = True
    route: Any = "all"
    part: float = 1.0  # share of the training steps
    tower: bool = False  # the ViT and a projector in place of VoRA


ENCODER = "encoder"
ARMS = {
    "VoRA": Arm(),
    ENCODER: Arm(distill=False, tower=True),
    "no distillation": Arm(distill=False),
    "causal": Arm(bidirectional=False),
    "embedding only": Arm(distill=False, lora=False),
    # A tenth of the steps is enough, because only the effect on text is measured.
    "vision": Arm(route="vision", part=0.1),
}


class Pictures:
    """Images in the model's format, with captions as token ids.

    Args:
        images: Images ``(3, H, W)`` uint8.
        captions: Captions, all with the same number of words.
    """

    def __init__(self, images: Sequence[Tensor], captions: Sequence[Sequence[str]]):
        processor = vora.VoraImageProcessor(
            patch=PATCH, min_pixels=PATCH**2, image_mean=(0.5,) * 3, image_std=(0.5,) * 3
        )
        self.images = processor(list(images))["pixel_values"]
        self.captions = torch.tensor([[IDS[word] for word in words] for words in captions])
        self.states: list[list[Tensor]] = []  # states of the teacher's blocks, per image
        self.grids: list[tuple[int, int]] = []

    @classmethod
    def of_shapes(cls, count: int, sizes: Sequence[tuple[int, int]], seed: int) -> Pictures:
        """Draw pictures of these sizes in turn."""
        generator = torch.Generator().manual_seed(seed)
        turns = itertools.islice(itertools.cycle(sizes), count)
        drawn = [draw_picture(size, generator) for size in turns]
        return cls([p.image for p in drawn], [(p.colour, p.shape, p.quadrant) for p in drawn])

    def watched_by(self, teacher: nn.Module) -> Pictures:
        """Store the states of the teacher, which is frozen."""
        states, self.grids = vora.teacher_states(teacher, self.images, BLOCKS)
        counts = [rows * columns for rows, columns in self.grids]
        self.states = [
            list(of_image) for of_image in zip(*(s.split(counts) for s in states), strict=True)
        ]
        return self

    def batch(self, places: Sequence[int], distill: bool) -> dict[str, Any]:
        """Return arguments of the model: the image between ``<s>`` and ``;``, then the caption.

        Only the caption has labels.
        """
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
# Frozen models: the teacher and the language model


def steps(
    parameters: Any,
    lr: float,
    count: int,
    bar: Any,
    loss_of: Callable[[], Tensor],
    kept: list[float] | None = None,
) -> None:
    """Run AdamW with a warm-up and a linear decay.

    If the list of losses ``kept`` is given, a run of a study saves it with the state every five
    minutes, and restores both.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    saved, done = study.checkpoint("model"), 0
    if kept is not None and (state := saved.restored()) is not None:
        done, kept[:] = state["steps"], state["losses"]
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for parameter, value in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(value)
    for step in range(done, count):
        part = (step + 1) / count
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 10 * part, 2.5 * (1 - part) + 0.02)
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update()
        if kept is not None:
            now, values = step + 1, [p.detach() for p in parameters]
            state = {"steps": now, "losses": kept, "parameters": values}
            saved.offer(lambda state=state: {**state, "optimizer": optimizer.state_dict()})


def train_teacher(pictures: Pictures, count: int, bar: Any) -> Any:
    """Train a ViT to name colour, shape and quadrant from its class token."""
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
    """Return sequences of captions: ``(rows, 13)``."""

    def words(kind: Any) -> Tensor:
        first = IDS[next(iter(kind))]
        return torch.randint(first, first + len(kind), (rows, 3), generator=generator)

    columns = [*map(words, KINDS), torch.full((rows, 3), IDS[";"])]
    return torch.cat([torch.full((rows, 1), IDS["<s>"]), torch.stack(columns, 2).flatten(1)], 1)


def train_language_model(count: int, bar: Any) -> Any:
    """Train a Llama on captions, without images."""
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
# Trained models


class Encoder(nn.Module):
    """ViT, projector of two layers, and the frozen language model with LoRA."""

    def __init__(self, model: Any, teacher: Any):
        super().__init__()
        blocks = list(range(BLOCKS))
        config = LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=LINEARS, layers_to_transform=blocks
        )
        self.model = wrap(copy.deepcopy(model).requires_grad_(False), config)
        self.__dict__["teacher"] = teacher  # frozen, and shared
        width = model.config.hidden_size
        self.projector = nn.Sequential(
            nn.Linear(TEACHER_WIDTH, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(
        self, input_ids: Tensor, images: Sequence[Sequence[Tensor]], labels: Tensor | None = None
    ) -> Any:
        """Return the output of the language model, its loss also as ``lm_loss``."""
        batch = self._spliced(input_ids, images, labels)
        out = self.model(
            inputs_embeds=batch.inputs_embeds,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            labels=batch.labels,
            use_cache=False,
        )
        out["lm_loss"] = out.loss
        return out

    def generate(
        self, input_ids: Tensor, images: Sequence[Sequence[Tensor]], **options: Any
    ) -> Tensor:
        batch = self._spliced(input_ids, images, None, "left")
        mask = batch.attention_mask
        return self.model.generate(
            inputs_embeds=batch.inputs_embeds, attention_mask=mask, **options
        )

    def _spliced(
        self,
        ids: Tensor,
        images: Sequence[Sequence[Tensor]],
        labels: Tensor | None,
        side: Any = "right",
    ) -> Any:
        with torch.no_grad():
            states = [
                self.teacher(one[None], interpolate_pos_encoding=True).last_hidden_state[0, 1:]
                for (one,) in images
            ]
        tokens = self.projector(torch.cat(states)).split([len(state) for state in states])
        embed = self.model.get_input_embeddings()
        return vora.splice_images(
            ids,
            embed,
            [[t] for t in tokens],
            labels=labels,
            placeholder=PLACEHOLDER,
            padding_side=side,
        )


def seeing(stage: Stage, arm: Arm) -> Any:
    """Return a copy of the language model with the parts that the arm trains."""
    model = stage.model
    if arm.tower:
        return Encoder(model, stage.teacher)
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
    with torch.no_grad():  # Image tokens are six times as large as text tokens.
        seer.vision.out_proj.weight *= 3**0.5 * model.get_input_embeddings().weight.std()
    return seer


def train(
    seer: Any, arm: Arm, pictures: Pictures, seed: int, count: int, rate: float
) -> list[float]:
    """Train the model; return the caption losses, which exclude the distillation losses.

    Every fourth batch is text. Batches depend only on the seed and the step.
    """
    losses: list[float] = []

    def loss() -> Tensor:
        step = len(losses)
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        if step % TEXT_EVERY == TEXT_EVERY - 1:
            ids = text(BATCH, generator)
            found = seer.model(input_ids=ids, labels=ids, use_cache=False).loss
            if found.requires_grad:  # otherwise, text has no trained parameter
                losses.append(losses[-1])
                return found
        places = torch.randint(len(pictures.images), (BATCH,), generator=generator).tolist()
        out = seer(**pictures.batch(places, arm.distill))
        losses.append(out.lm_loss.item())
        return out.loss

    trained = [p for p in seer.parameters() if p.requires_grad]
    steps(trained, rate, count, tqdm(disable=True), loss, losses)
    seer.eval()
    return losses


@torch.no_grad()
def accuracy(seer: Any, pictures: Pictures) -> float:
    """Return the share of pictures with a greedy caption that is right in every word."""
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
    """Return the logits of the language model alone."""
    return model(input_ids=ids, use_cache=False).logits


@dataclass(frozen=True)
class Stage:
    """Models and pictures that all runs share and do not change."""

    model: Any
    teacher: Any
    pictures: Pictures
    testing: Pictures
    others: dict[tuple[int, int], Pictures]
    steps: int


@functools.cache
def staged(quick: bool) -> Stage:
    """Train the ViT and the language model, and draw pictures."""
    sizes = QUICK if quick else Sizes()
    torch.manual_seed(0)
    pictures = Pictures.of_shapes(sizes.pictures[0], SIZES, seed=1)
    with tqdm(total=sizes.teacher_steps + sizes.text_steps, unit="step", mininterval=1) as bar:
        teacher = train_teacher(pictures, sizes.teacher_steps, bar)
        model = train_language_model(sizes.text_steps, bar)
    pictures.watched_by(teacher)
    testing = Pictures.of_shapes(sizes.pictures[1], SIZES, seed=2)
    others = {size: Pictures.of_shapes(sizes.pictures[1] // 3, [size], 3) for size in UNSEEN}
    return Stage(model, teacher, pictures, testing, others, sizes.steps)


def settings(quick: bool) -> Mapping[str, object]:
    return {"sizes": str(Sizes()), "arms": str(ARMS), "rates": RATES.rates, "text": TEXT_EVERY}


def trials(rows: Rows, quick: bool) -> Iterator[Row]:
    """Yield the runs that choose the learning rates, with a quarter of the steps, and the runs that
    the gate judges."""
    for name in ("VoRA", ENCODER):
        for rate in RATES.asked(errors(rows, name)):
            yield {"seed": CHOOSING, "arm": name, "rate": rate}
    for name in ("VoRA", ENCODER, "no distillation"):
        yield {"seed": GATE_SEED, "arm": name}


def errors(rows: Rows, arm: str) -> dict[float, float]:
    """Return the share of wrong captions for each learning rate that was tried."""
    own = [row for row in rows if (row["seed"], row["arm"]) == (CHOOSING, arm)]
    return {row["rate"]: 1 - row["accuracy"] for row in own}


def arms(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    for seed in seeds:
        for name in ARMS:
            yield {"seed": seed, "arm": name}


def minutes(row: Row) -> float:
    return 16.0 * (CHOOSING_PART if row["seed"] == CHOOSING else ARMS[row["arm"]].part)


def measure(row: Row, quick: bool, rows: Rows) -> Iterator[Row]:
    """Yield the share of right captions, the effect of merging, and the effect on text."""
    torch.set_num_threads(1)
    stage, name = staged(quick), row["arm"]
    torch.manual_seed(row["seed"])
    arm = ARMS[name]
    rate = row.get("rate") or RATES.best(errors(rows, ENCODER if name == ENCODER else "VoRA"))
    part = CHOOSING_PART if row["seed"] == CHOOSING else arm.part
    seer = seeing(stage, arm)
    count = max(2, round(part * stage.steps))
    losses = train(seer, arm, stage.pictures, row["seed"], count, rate)
    trained = sum(p.numel() for p in seer.parameters() if p.requires_grad)
    found: Row = {"rate": rate, "parameters": trained, **curve(losses)}
    found["accuracy"] = accuracy(seer, stage.testing)
    if name == "VoRA":
        for (height, width), pictures in stage.others.items():
            found[f"accuracy_{height}x{width}"] = accuracy(seer, pictures)
        found |= merged(seer, stage.testing)
    if name in ("VoRA", "vision"):
        found |= of_text(seer.model, stage.model)
    yield found


def curve(losses: Sequence[float]) -> Row:
    """Return the mean loss over the first half and over each tenth of the steps."""
    half, tenth = max(1, len(losses) // 2), max(1, len(losses) // 10)
    tenths = [losses[i * tenth : (i + 1) * tenth] or losses[-1:] for i in range(10)]
    means = {f"loss_{i}": sum(part) / len(part) for i, part in enumerate(tenths)}
    return {"first_half": sum(losses[:half]) / half, **means}


@torch.no_grad()
def merged(seer: Any, testing: Pictures) -> Row:
    """Merge the model; return the largest change of a logit and the number of VoRA layers left."""
    batch = testing.batch(range(min(96, len(testing.images))), distill=False)
    before = seer(**batch).logits
    vora.merge(seer.model)
    left = sum(isinstance(m, vora.VoraLinear) for m in seer.modules())
    return {"merge_error": (seer(**batch).logits - before).abs().max().item(), "left": left}


@torch.no_grad()
def of_text(model: Any, base: Any) -> Row:
    """Return the losses of the language model and the base model on text, and whether their logits
    are equal."""
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


# -------------------------------------------------------------------------------------------------
# Judging, by means over the seeds


def less(rows: Rows, other: str) -> Interval:
    """Return VoRA's accuracy minus that of the arm ``other``."""
    columns = (study.column(rows, "accuracy", arm=name) for name in ("VoRA", other))
    return study.interval([a - b for a, b in zip(*columns, strict=True)])


def gate(rows: Rows) -> list[Gate]:
    """Check that VoRA and the encoder learn, and that distillation has room to help."""
    own = [row for row in rows if row["seed"] == GATE_SEED]
    found = {row["arm"]: row["accuracy"] for row in own}
    return [
        study.gate_above("captions right, VoRA", found["VoRA"], 0.3),
        study.gate_above("captions right, encoder", found[ENCODER], 0.5),
        Gate(
            "captions right, no distillation",
            "at most 0.9",
            f"{found['no distillation']:.3f}",
            found["no distillation"] <= 0.9,
        ),
        *(RATES.gate(errors(rows, name), name) for name in ("VoRA", ENCODER)),
    ]


def criteria(rows: Rows) -> list[Criterion]:
    """Check parity with the encoder, and that distillation helps (the headline)."""
    encoder, apart = less(rows, ENCODER), less(rows, "no distillation")
    causal, blind = less(rows, "causal"), less(rows, "embedding only")
    error = max(study.column(rows, "merge_error", arm="VoRA"))
    left = max(study.column(rows, "left", arm="VoRA"))
    equal = all(study.column(rows, "text_equal", arm="vision"))
    change = study.mean(rows, "text_loss", arm="VoRA") - study.mean(
        rows, "base_text_loss", arm="VoRA"
    )
    return [
        Criterion(
            "share of right captions, VoRA - encoder",
            ">= -0.05",
            f"{encoder:+.3f}",
            encoder.middle >= -0.05,
            headline=True,
            points=encoder.middle >= -0.2 + 2 * PICTURE,
        ),
        Criterion(
            "share of right captions, VoRA - no distillation",
            "interval above 0 by two pictures",
            f"{apart:+.3f}",
            apart.low > 2 * PICTURE,
            headline=True,
            points=apart.middle > 2 * PICTURE,
        ),
        Criterion(
            "share of right captions, VoRA - causal",
            ">= -0.01",
            f"{causal:+.3f}",
            causal.middle >= -0.01,
        ),
        Criterion(
            "share of right captions, VoRA - embedding only",
            ">= 0.15",
            f"{blind:+.3f}",
            blind.middle >= 0.15,
        ),
        Criterion("text loss, VoRA - base", "<= 0.1", f"{change:+.3f}", change <= 0.1),
        Criterion("largest change of a logit by merging", "<= 1e-4", f"{error:.1e}", error <= 1e-4),
        Criterion("VoRA layers left after merging", "0", str(left), left == 0),
        Criterion(
            'text logits of route "vision"',
            "equal to the base's",
            "equal" if equal else "differ",
            equal,
        ),
    ]


def figure(rows: Rows) -> str:
    """Return a text with the share of right captions in every arm, and the loss on text."""
    each = ", ".join(
        f"{name} {study.interval(study.column(rows, 'accuracy', arm=name)):.3f}"
        for name in ARMS
        if name != "vision"
    )
    loss, base = (study.mean(rows, c, arm="VoRA") for c in ("text_loss", "base_text_loss"))
    return f"share of right captions: {each}; text loss {base:.3f}, with VoRA {loss:.3f}"


def panels(rows: Rows) -> study.Panels:
    own = [row for row in rows if row["seed"] < study.TRIALS]
    return {
        "captions right": {
            name: study.interval(study.column(own, "accuracy", arm=name))
            for name in ARMS
            if name != "vision"
        }
    }


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
