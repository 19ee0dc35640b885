"""Train the bundled tiny LLaVA from nothing (see `--help`)."""

from corematching.training.cli import main

if __name__ == "__main__":
    main()
