"""zs_fast: train a language model to search, against a simulated search engine, on few GPUs or on a CPU."""

__version__ = "0.1.0"
