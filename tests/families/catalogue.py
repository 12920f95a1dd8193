"""All families, by name."""

from __future__ import annotations

from tests.families import decoders, encoders, experts, others

FAMILIES = {
    family.name: family
    for module in (decoders, encoders, experts, others)
    for family in module.FAMILIES
}
