"""From models to programs: what a model spec names, Hugging Face hooks, torch.export."""
