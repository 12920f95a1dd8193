"""Save and load compiled models: JSON graphs and safetensors, nothing that executes code."""

from ringcompile.artifact.store import Artifact, load, load_carried, load_prefill, save

__all__ = ["Artifact", "load", "load_carried", "load_prefill", "save"]
