"""The bundled mini suite: drawn scenes and questions whose answers lie in known regions of the image."""
