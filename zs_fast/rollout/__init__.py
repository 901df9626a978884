"""Playing the game: engines that sample, and the player that turns questions into groups."""
