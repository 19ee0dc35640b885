"""One method, one file: frozen dataclasses that decide; the engine does the dropping."""
