"""Models: loading them, and the one attention function that training and the embedded engine share."""
