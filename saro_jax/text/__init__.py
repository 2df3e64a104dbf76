"""Text: the policy, chat templates and their masks, reasoning and its steps."""
