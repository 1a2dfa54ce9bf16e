"""``VoraForCausalLM``: a language model that accepts text with images."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext._checks import require
from lora_ext._torch import zero_gradients
from lora_ext.layers import IGNORE, decoder_layers, shift_labels

from ._embed import VisionPatchEmbed
from ._modalities import modality
from ._placement import KEY, Applied, apply
from ._states import block_states, prefill
from .config import VoraConfig
from .distill import DistillHeads, Grid, block_distill_loss
from .splice import Spliced, build_vision_mask, splice_images

#: Names of transformers' caches that contain one key per token. All other caches have a fixed
#: length. Old generation configurations contain the name "hybrid", which transformers ignores.
_GROWING = (None, "dynamic", "offloaded", "quantized", "hybrid")

#: Images ``(3, H, W)`` of each sample, in the order of their placeholders.
Images = Sequence[Sequence[Tensor] | None]


class VoraForCausalLM(nn.Module):
    """transformers causal LM with a vision embedding and heads for the distillation.

    The factors of the :class:`lora_ext.nn.VoraLinear` layers, the vision embedding and the heads
    are trained; everything else is frozen. The model works with transformers' Trainer: a batch
    consists of ``input_ids``, ``labels``, ``attention_mask`` and ``images``.

    Shape letters: ``B`` samples, ``S`` ids per sample, ``T`` tokens per sample including those of
    images, ``M`` vision tokens of a batch, ``V`` vocabulary, ``d_v`` width of the teacher.

    Args:
        model: causal LM; it is changed in place by :func:`apply` unless it has VoRA layers already.
        config: settings of the layers, the embedding and the distillation.
        teacher_width: d_v, width of the teacher of the distillation; None creates no heads.

    Attributes:
        model: the language model.
        vision: the :class:`VisionPatchEmbed`.
        heads: the :class:`DistillHeads`, or None.
        vora_config: the argument ``config``. The attribute ``config`` is the language model's
            configuration, which Trainer reads.

    Raises:
        ValueError: If a configuration other than ``config`` was applied to the model, or as for
            :func:`apply`.

    Source: arXiv 2503.20680.
    """

    is_vora_wrapper = True

    model: Any
    heads: DistillHeads | None

    def __init__(self, model: Any, config: VoraConfig, teacher_width: int | None = None):
        super().__init__()
        state: Applied | None = model.__dict__.get(KEY)
        if state is None or state.merged:
            apply(model, config)
        else:
            same = state.config == config
            expected = f"the config that was applied, {state.config}"
            require(same, "VoraForCausalLM", "config", expected, config)
        weight = model.get_input_embeddings().weight
        width, dtype = weight.shape[1], torch.promote_types(weight.dtype, torch.float32)
        self.model = model
        self.vora_config = config
        sizes = config.embed_dim, config.patch, config.image_size
        self.vision = VisionPatchEmbed(width, *sizes, config.pos_mode).to(weight.device, dtype)
        self.heads = None
        if teacher_width is not None:
            heads = DistillHeads(config.n_blocks, width, teacher_width)
            self.heads = heads.to(weight.device, dtype)
        self.register_state_dict_post_hook(_apart)

    @property
    def config(self) -> Any:
        """The configuration of the language model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """The device of the language model."""
        return self.model.device

    def activation_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """Enable activation checkpointing in the language model, to which the arguments are
        passed."""
        self.model.activation_checkpointing_enable(*args, **options)

    def gradient_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """Enable activation checkpointing; this is the old name in transformers."""
        self.model.gradient_checkpointing_enable(*args, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Disable activation checkpointing; it is disabled by default."""
        self.model.gradient_checkpointing_disable()

    def forward(
        self,
        input_ids: Tensor,
        images: Images | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        teacher_states: Sequence[Tensor] | None = None,
        teacher_grids: Sequence[Grid] | None = None,
    ) -> Any:
        """Compute the logits and losses of a batch of samples with or without images.

        Args:
            input_ids: ids ``(B, S)``, with one placeholder per image.
            images: for each sample, a list of images ``(3, H, W)`` with sides that are multiples of
                the patch; None or an empty list for a sample without images.
            labels: target ids ``(B, S)``, aligned with ``input_ids``; labels of -100 are ignored.
            attention_mask: mask ``(B, S)`` with 0 for padding, on either side.
            teacher_states: hidden states of the teacher for the M' patches of all images of the
                batch in order, without a class token: one ``(M', d_v)`` for each of the
                ``n_blocks`` blocks, from :func:`teacher_states` with the ``pairing`` of the
                configuration.
            teacher_grids: rows and columns ``(h, w)`` of the teacher's patches of each image;
                default is the student's.

        Returns:
            :class:`VoraOutput`. A batch without images has a distillation loss of 0, and every
            trained parameter gets a gradient, which is zero for unused parameters.

        Raises:
            ValueError: If the numbers of images and placeholders differ; if images, labels, masks,
                states or grids have a wrong shape; if the attention implementation accepts no mask
                per pair of tokens; or if distillation is used with reentrant checkpoints.
        """
        from ._output import VoraOutput

        batch, flat = self._spliced(input_ids, images, attention_mask, labels=labels)
        config, states = self.vora_config, None
        with contextlib.ExitStack() as inside:
            if flat and config.route == "vision":
                inside.enter_context(modality(batch.vision_mask))
            if flat and teacher_states is not None:
                blocks = list(decoder_layers(self.model))[: config.n_blocks]
                states = inside.enter_context(block_states(blocks, config.pairing))
            logits = self.model(
                inputs_embeds=batch.inputs_embeds,
                attention_mask=self._mask(batch, flat, attention_mask),
                position_ids=batch.position_ids,
                use_cache=False,
            ).logits
        distill = None
        if not flat:  # Data-parallel training waits for a gradient of every parameter.
            zero = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
            distill = zero_gradients(zero, [p for p in self.parameters() if p.requires_grad])
        elif states is not None:
            hiddens = [state[batch.vision_mask] for state in states]  # (M, d) each
            grids = None if teacher_grids is None else [self.vision.grid(one) for one in flat]
            distill = block_distill_loss(self.heads, hiddens, teacher_states, grids, teacher_grids)
        lm = None
        if batch.labels is not None:  # mean cross entropy of the next tokens, 0 if all are ignored
            targets = shift_labels(batch.labels).flatten().to(logits.device)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
            total = F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="sum")
            lm = total / (targets != IGNORE).sum().clamp(min=1)
        terms = [] if lm is None else [lm]
        if distill is not None and (lm is not None or teacher_states is not None):
            terms.append(config.distill_weight * distill)
        loss = torch.stack([term.to(logits.device) for term in terms]).sum() if terms else None
        return VoraOutput(loss, logits, lm, distill, batch.vision_mask)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        images: Images | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Generate text that continues the samples of a batch.

        The images are processed by the prefill, which is a single forward over the whole prompt;
        decode steps use the cache. Arguments that are not listed are as in :meth:`forward`.

        Args:
            options: options of the language model's ``generate``, such as ``max_new_tokens``,
                ``do_sample`` and ``num_beams``.

        Returns:
            New tokens ``(B, n)``, or the output of ``generate`` with
            ``return_dict_in_generate=True``.

        Raises:
            ValueError: If options split the prefill or contain other inputs, or as for
                :meth:`forward`.
        """
        where = "VoraForCausalLM.generate"
        for name in ("inputs_embeds", "past_key_values", "position_ids", "inputs"):
            expected = "None, since input_ids and images determine it"
            found = type(options.get(name)).__name__
            require(options.get(name) is None, where, name, expected, f"a {found}")
        given: Any = options.get("generation_config") or self.model.generation_config
        chunk = options.get("prefill_chunk_size", given.prefill_chunk_size)
        expected = "None, since one forward must contain a whole image"
        require(chunk is None, where, "prefill_chunk_size", expected, chunk)
        cache = options.get("cache_implementation", given.cache_implementation)
        expected = "a cache that grows, since the mask of the images has one key per token"
        require(cache in _GROWING, where, "cache_implementation", expected, repr(cache))
        batch, flat = self._spliced(input_ids, images, attention_mask, padding_side="left")
        mask = self._mask(batch, flat, attention_mask)
        sees = batch.vision_mask if flat and self.vora_config.route == "vision" else None
        pairs = mask if isinstance(mask, dict) or (mask is not None and mask.dim() == 4) else None
        options |= {"inputs_embeds": batch.inputs_embeds, "attention_mask": batch.attention_mask}
        with prefill(self.model, pairs, sees):
            return self.model.generate(**options)

    # ---------------------------------------------------------------------------------------------

    def _spliced(
        self, input_ids: Tensor, images: Images | None, mask: Tensor | None, **options: Any
    ) -> tuple[Spliced, list[Tensor]]:
        """Return the batch with the tokens of its images, and the images in order."""
        flat, tokens = _flat(images), None
        if images is not None:
            device = self.vision.pos_embed.device
            each = iter(self.vision([image.to(device) for image in flat]))
            counts = [0 if sample is None else len(sample) for sample in images]
            tokens = [list(itertools.islice(each, count)) for count in counts]
        options |= {"placeholder": self.vora_config.placeholder, "attention_mask": mask}
        return splice_images(input_ids, self.model.get_input_embeddings(), tokens, **options), flat

    def _mask(
        self, batch: Spliced, flat: list[Tensor], attention_mask: Tensor | None
    ) -> Tensor | dict[str, Tensor] | None:
        """Return the attention mask for the language model.

        If all tokens attend in causal order, the result is the mask ``(B, T)`` or None, so that
        outputs for text are bitwise those of the base model. For a model with several types of
        attention layers, the result is a dict with one mask per type, by transformers' names.
        """
        if not flat or not self.vora_config.bidirectional:
            return batch.attention_mask if flat or attention_mask is not None else None
        where = "VoraForCausalLM"
        remedy = "(bidirectional=False avoids this)"
        implementation = str(getattr(self.config, "_attn_implementation", "eager"))
        fits = "flash" not in implementation and "flex" not in implementation
        expected = "'eager' or 'sdpa', which take a mask for pairs of tokens"
        require(fits, where, "attn_implementation", expected, f"{implementation!r} {remedy}")
        text = self.config.get_text_config()
        reason = None
        if getattr(text, "alibi", text.model_type == "bloom"):
            reason = "computes ALiBi from a mask per token"
        biases = [pair for pair in self.model.named_buffers() if pair[0].endswith(".bias")]
        # Attention such as GPT-Neo's also applies a causal mask that is stored as a buffer.
        triangles = (n for n, b in biases if b.shape == (1, 1, *b.shape[-1:] * 2))
        if name := next(triangles, None):
            reason = f"masks future tokens with a buffer ({name})"
        expected = "attention that takes a mask for pairs of tokens"
        found = f"{type(self.model).__name__}, which {reason} {remedy}"
        require(reason is None, where, "model", expected, found)
        sliding, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
        windows = {"full_attention": None, "sliding_attention": sliding}
        others = sorted({*(kinds or ())} - {*windows})
        found = f"{others[0]!r} {remedy}" if others else ""
        require(not others, where, "layer_types", f"only layers of type {list(windows)}", found)

        def mask(window: int | None) -> Tensor:
            # The mask is additive, since eager attention adds bools as 0 and 1.
            dtype, ids = batch.inputs_embeds.dtype, batch.image_ids
            return build_vision_mask(batch.attention_mask, ids, dtype=dtype, window=window)

        if kinds is None or "sliding_attention" not in kinds:
            return mask(sliding if kinds is None else None)
        return {kind: mask(window) for kind, window in windows.items()}


def _flat(images: Images | None) -> list[Tensor]:
    flat: list[Tensor] = []
    where = "VoraForCausalLM: images"
    expected = "(3, H, W) tensors as from VoraImageProcessor"
    for number, sample in enumerate(() if images is None else images):
        which = f"sample {number}"
        if isinstance(sample, Tensor):
            found = f"a tensor of shape {tuple(sample.shape)}"
            require(sample.dim() >= 4, where, which, "a list of (3, H, W) tensors", found)
        for image in () if sample is None else sample:
            known, found = isinstance(image, Tensor), type(image).__name__
            require(known, where, which, expected, found, TypeError)
            flat.append(image)
    return flat


def _apart(module: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    """Clone tensors of a state dict that share memory, such as a tied head and embedding.

    Trainer saves the state dict with safetensors, which rejects shared memory.
    """
    seen: set[int] = set()
    for key, tensor in state.items():
        if not isinstance(tensor, nn.Parameter) and tensor.numel():
            if tensor.data_ptr() in seen:
                state[key] = tensor.clone()
            seen.add(tensor.data_ptr())
