"""What the LM is told: the layout of a prompt, events as text and tokens, packs of users."""
