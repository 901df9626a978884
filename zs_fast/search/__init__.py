"""The game: questions, prompts, the tag parser, the environment, the reward, and who answers the searches. No torch."""
