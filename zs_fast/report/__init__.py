"""A run to look at: reward.png and one HTML page with curves and rollouts."""
