"""The embedded default: a small invented world, its questions and passages, and two tiny models."""
