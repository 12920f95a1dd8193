"""All families, by chapter and by name."""

from __future__ import annotations

from tests.families import decoders, encoders, experts, others, vision_language

CHAPTERS = {
    "Decoders": decoders.FAMILIES,
    "Decoders with experts": experts.FAMILIES,
    "Text encoders": encoders.FAMILIES,
    "Encoders beside images": others.TEXT_TOWERS,
    "Image encoders": others.IMAGES,
    "Vision-language models whole": vision_language.FAMILIES,
    "Encoder-decoders": others.ENCODER_DECODERS,
    "State space and recurrence": others.STATES,
    "Sound": others.SOUNDS,
}
FAMILIES = {family.name: family for families in CHAPTERS.values() for family in families}
