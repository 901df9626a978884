"""Making a simulator: collect real searches, label them useful or noisy, fine-tune on them, and judge the result."""
