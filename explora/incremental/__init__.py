"""Class-incremental learning: tasks one after another, which task an image is of, and heads over all classes."""
