"""What judges answers: guard models, rubrics for a language model, and how far judges agree."""
