"""What goes into a model of transformers, guessed by the names that its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BATCH, LENGTH, TARGET, PADDED = 2, 12, 7, 4
VOCABULARY = 99


def padded(inputs: dict[str, Any], side: str) -> dict[str, Any] | None:
    """The inputs, with padding in the first row, on the "left" or the "right"; None where they take none."""
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if tokens is None or "attention_mask" not in inputs:
        return None
    real = torch.ones(tokens.shape[:2], dtype=torch.long)
    real[0, slice(PADDED) if side == "left" else slice(-PADDED, None)] = 0
    return {**inputs, "attention_mask": real}


PARTS = ("vision_config", "backbone_config", "audio_config", "encoder_config")
"""Where a configuration may keep a size that it does not have itself."""
MELS = (
    "num_mel_bins", "feature_size", "input_feat_per_channel", "input_channels", "input_dim",
    "feature_projection_input_dim", "input_feat_size",
)  # fmt: skip
"""What configurations call the numbers of a frame of sound."""


def candidates(model: Any) -> Iterator[dict[str, Any]]:
    """Inputs that a model may take, by the names in its forward: tokens first, then images, sound, states, series."""
    takes = inspect.signature(model.forward).parameters
    configs = [model.config, *(getattr(model.config, part, None) for part in PARTS)]
    generator = torch.Generator().manual_seed(1)

    def size(name: str, otherwise: Any) -> Any:
        return next((each for each in (getattr(one, name, None) for one in configs) if each is not None), otherwise)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    ids = torch.randint(3, VOCABULARY - 9, (BATCH, LENGTH), generator=generator)
    decoder = {"decoder_input_ids": ids[:, :TARGET]} if "decoder_input_ids" in takes else {}
    side = size("image_size", 32)
    side = (side, side) if isinstance(side, int) else tuple(side)[-2:]
    channels = size("num_channels", None) or size("in_channels", 3)
    image = numbers(BATCH, channels, *side)
    if "input_ids" in takes:
        text: dict[str, Any] = {"input_ids": ids, **decoder}
        if "attention_mask" in takes:
            text["attention_mask"] = torch.ones_like(ids)
        if "bbox" in takes:
            text["bbox"] = torch.arange(4).expand(BATCH, LENGTH, 4)
        yield text
        if "token_type_ids" in takes:
            yield {**text, "token_type_ids": torch.zeros_like(ids)}
        for name, pixels in (("pixel_values", image), ("pixel_values_videos", _film(image, size("num_frames", 2)))):
            if name in takes:
                yield {**text, name: pixels}
    for name in ("pixel_values", "pixel_values_videos"):
        if name in takes:
            yield from ({name: pixels} for pixels in (image, _film(image, size("num_frames", 2)), _film(image, 2)))
    if "grid_thw" in takes:
        for frames in (size("temporal_patch_size", 1), 1):
            patches = numbers(16, channels * frames * size("patch_size", 8) ** 2)
            for name in ("hidden_states", "pixel_values"):
                if name in takes:
                    yield {name: patches, "grid_thw": torch.tensor([[1, 4, 4]])}
    mels = next((each for each in (size(name, None) for name in MELS) if each), 16)
    frames = 2 * size("max_source_positions", 50)
    for name in ("input_features", "input_values", "audio_values"):
        if name in takes:
            for shape in ((mels, frames), (frames, mels), (1, frames, mels), (1600,), (1, 1600)):
                yield {name: numbers(BATCH, *shape), **decoder}
    if "audio_mel" in takes:
        real = torch.zeros(BATCH, 64, dtype=torch.bool)
        yield {"audio_mel": numbers(BATCH, 64, size("input_feat_size", 128)), "audio_mel_mask": real}
    width = size("hidden_size", None) or size("d_model", 32)
    for name in ("inputs_embeds", "hidden_states"):
        if name in takes:
            states = {name: numbers(BATCH, LENGTH, width)}
            if "attention_mask" in takes:
                yield {**states, "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)}
                yield {**states, "attention_mask": None}
            yield states
    if "query_embeds" in takes:
        yield {"query_embeds": numbers(BATCH, 5, width)}
    if "past_time_features" in takes:
        past, future = size("context_length", 8) + max(size("lags_sequence", [0])), size("prediction_length", 8)
        features = size("num_time_features", 1)
        yield {
            "past_values": numbers(BATCH, past), "past_time_features": numbers(BATCH, past, features),
            "past_observed_mask": torch.ones(BATCH, past), "future_values": numbers(BATCH, future),
            "future_time_features": numbers(BATCH, future, features),
        }  # fmt: skip
    elif "past_values" in takes:
        yield {"past_values": numbers(BATCH, size("context_length", 32), size("num_input_channels", 1))}


def _film(image: Tensor, frames: int) -> Tensor:
    """The image again and again, [batch, frames, channels, height, width]."""
    return image[:, None].repeat(1, frames, 1, 1, 1)
