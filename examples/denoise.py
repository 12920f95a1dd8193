"""A denoising loop on several ranks: guidance as two replicas, each with its image over a ring.

    python examples/denoise.py --parallel dp=2,ring=2 --backend gloo

The model is a small Stable Diffusion 3 with random weights and random embeddings of a prompt.
Classifier-free guidance asks it twice a step, without the prompt and with it: that is a batch of
two, which `dp=2` gives to two replicas. `ring=2` splits the tokens of each replica's image.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from rich.console import Console
from rich.progress import track

import ringcompile as rc

TEXT, WIDTH = 12, 32


def build() -> torch.nn.Module:
    """The transformer; of a checkpoint: `from_pretrained(FOLDER, subfolder="transformer")`."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=4,
        attention_head_dim=16, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
        caption_projection_dim=64, pos_embed_max_size=16,
    ).eval()


def request(latents: torch.Tensor, step: torch.Tensor) -> dict[str, torch.Tensor]:
    """The model's inputs at a step, for the same image without the prompt and with it.

    Args:
        latents: float [1, 4, height, width].
        step: the time step, a number.
    """
    draw = torch.Generator().manual_seed(1)
    text = torch.randn(1, TEXT, WIDTH, generator=draw)  # from the text encoders
    pooled = torch.randn(1, WIDTH, generator=draw)
    return {
        "hidden_states": latents.repeat(2, 1, 1, 1),
        "encoder_hidden_states": torch.cat([torch.zeros_like(text), text]),
        "pooled_projections": torch.cat([torch.zeros_like(pooled), pooled]),
        "timestep": step.expand(2),
    }


def denoise(
    predict: Callable[[dict[str, torch.Tensor]], Any], steps: int, guidance: float
) -> torch.Tensor:
    """From noise to an image: float [1, 4, 16, 16].

    Args:
        predict: what the model says of a batch of two.
        steps: how often it is asked.
        guidance: how much further than with the prompt alone.
    """
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    for step in track(scheduler.timesteps, "denoising", console=Console(stderr=True)):
        without, prompted = predict(request(latents, step))[0].chunk(2)
        flow = without + guidance * (prompted - without)
        latents = scheduler.step(flow, step, latents, return_dict=False)[0]
    return latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parallel", default="dp=2,ring=2")
    parser.add_argument("--backend", default="lockstep", choices=["lockstep", "gloo", "nccl"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=4.0)
    asked = parser.parse_args()

    example = request(torch.zeros(1, 4, 16, 16), torch.tensor(500.0))
    program = rc.capture(
        build(), (), {**example, "return_dict": False},
        dims={name: {0: "batch"} for name in example},
    )
    with rc.Session(rc.transform(program, asked.parallel), asked.backend) as session:
        latents = denoise(session.run, asked.steps, asked.guidance)
    print(f"latents {list(latents.shape)} from {latents.min():.3f} to {latents.max():.3f}")


if __name__ == "__main__":
    main()
