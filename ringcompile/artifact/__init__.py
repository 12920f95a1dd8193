"""Save and load compiled models: JSON graphs and safetensors, nothing that executes code."""

from ringcompile.artifact.store import Artifact, load, save

__all__ = ["Artifact", "load", "save"]
