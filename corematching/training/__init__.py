"""Training of the bundled tiny LLaVA."""
