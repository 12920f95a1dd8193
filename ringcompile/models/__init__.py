"""Plain PyTorch reference models: what a user would bring. Imports nothing else of ringcompile."""
